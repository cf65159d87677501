"""How much a call gives LGMSNet to compute, and that it compiles nothing where that is little."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny_model
import torch
import unet_model
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from PIL import Image

import nnunet_lgms
from nnunet_lgms import inference
from nnunet_lgms.evaluation import zeroshot
from nnunet_lgms.inference import load_predictor
from nnunet_lgms.ops import compiling
from nnunet_lgms.prediction import logits, predictor
from nnunet_lgms.prediction.amount import grid_of, n_windows
from nnunet_lgms.prediction.cases import CasesFailed
from nnunet_lgms.prediction.predictor import Predictor

N_CASES = 4
#: of a window of 32² and its mirrored copy
WINDOW = 2 * 32 * 32


@given(st.data(), st.sampled_from([0.25, 0.5, 0.7, 1.0]), st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_windows_are_counted_as_nnunet_places_them(data, step: float, dim: int):
    shape = data.draw(st.lists(st.integers(1, 90), min_size=3, max_size=3))
    patch = data.draw(st.lists(st.integers(4, 40), min_size=dim, max_size=dim))
    deep = [max(n, size) for n, size in zip(shape[-dim:], patch)]
    placed = np.prod([len(starts) for starts in compute_steps_for_sliding_window(deep, patch, step)])
    assert n_windows(shape, patch, step) == np.prod(shape[: 3 - dim]) * placed


def test_the_size_of_an_image_is_that_of_its_reader(tmp_path: Path):
    def written(size: tuple[int, ...], spacing: tuple[float, ...], file: str) -> list[str]:
        image = sitk.GetImageFromArray(np.zeros(size, np.int16), isVector=False)
        image.SetSpacing(spacing)
        if len(size) == 3:  # its axes lie in another order in space
            image.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
        sitk.WriteImage(image, str(tmp_path / file))
        return [str(tmp_path / file)]

    volume = written((5, 6, 7), (0.5, 2.0, 3.0), "volume.nii.gz")
    flat, channels = written((6, 7), (0.5, 2.0), "flat.mha"), written((2, 5, 6, 7), (1.0, 2.0, 3.0, 1.0), "four.nrrd")
    for files, reader in (
        *((files, SimpleITKIO()) for files in (volume, flat, channels)),
        (volume, NibabelIO()),
        (volume, NibabelIOWithReorient()),
    ):
        samples, properties = reader.read_images(files)
        shape, spacing = grid_of(files, reader)
        assert tuple(shape) == samples.shape[1:]
        thick = int(files is flat)  # a flat image has no spacing across
        np.testing.assert_allclose(spacing[thick:], properties["spacing"][thick:], rtol=1e-6)

    (header,) = written((5, 6, 7), (1.0, 1.0, 1.0), "header.nii")
    Path(header).write_bytes(Path(header).read_bytes()[:352])  # whose voxels nobody asks for
    assert grid_of([header], NibabelIO()) == grid_of([header], SimpleITKIO()) == ((5, 6, 7), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of LGMSNet, and pictures of as many voxels as one window."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(N_CASES):
        Image.fromarray(random.integers(0, 255, (32, 32), np.uint8)).save(folder / f"images/case_{i}_0000.png")
    return tiny_model.model_folder(folder, "Dataset001_Discs"), folder / "images"


def on_a_gpu(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has a predictor believe so; what its network is told of the batches that it is given."""
    cpu, told = torch.device("cpu"), []
    predictor.device = torch.device("cuda")
    monkeypatch.setattr(predictor, "_ways", lambda: [(cpu, cpu)])
    predictor.network.register_forward_pre_hook(lambda network, _: told.append(network.few_predictions))
    return told


@pytest.fixture
def told(flat: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """What the network is told where so many voxels are much."""
    predictor = load_predictor(flat[0], device="cpu")
    batches = on_a_gpu(predictor, monkeypatch)

    def ask(voxels: int, call: Callable[[Predictor], object]) -> bool:
        monkeypatch.setattr(logits, "LITTLE", voxels)
        batches.clear()
        call(predictor)
        (answer,) = set(batches)  # one for all cases
        return answer

    return ask


def test_what_goes_through_the_network_decides(flat: tuple[Path, Path], told, tmp_path: Path, monkeypatch):
    images, out = str(flat[1]), str(tmp_path / "out")
    array = np.zeros((1, 1, 32, 32), np.float32)
    several = [array] * 3, None, [{"spacing": (999, 1, 1)}] * 3, None

    def in_python(predictor: Predictor) -> None:
        monkeypatch.setattr(inference, "load_predictor", lambda *_, **__: predictor)
        nnunet_lgms.predict(flat[0], [array[:, 0]] * 5)
        predictor.n_cases = 1

    calls = (  # and how many cases they predict
        (N_CASES, lambda predictor: predictor.predict_from_files(images, out)),
        (N_CASES, lambda predictor: predictor.predict_from_files_sequential(images, out)),
        (1, lambda predictor: predictor.predict_from_files(images, out, num_parts=3, part_id=1)),
        (3, lambda predictor: predictor.predict_from_list_of_npy_arrays(*several)),
        (1, lambda predictor: predictor.predict_single_npy_array(array, {"spacing": (999, 1, 1)})),
        (5, in_python),
    )
    for n_cases, call in calls:
        assert told(n_cases * WINDOW + 1, call) is True
        assert told(n_cases * WINDOW, call) is False


def test_folds_mirrors_and_the_models_grid_count(tmp_path: Path, monkeypatch):
    predictor = load_predictor(tiny_model.model_folder(tmp_path, "Dataset001_Discs", folds=(0, 1)), device="cpu")
    on_a_gpu(predictor, monkeypatch)

    def little(voxels: int, shape=(1, 32, 32), spacing=(999.0, 1.0, 1.0)) -> bool:
        monkeypatch.setattr(logits, "LITTLE", voxels)
        return predictor._is_little(1, lambda: (shape, spacing))

    assert little(2 * WINDOW + 1) and not little(2 * WINDOW)
    assert little(2 * 3 * WINDOW + 1, (1, 64, 32)) and not little(2 * 3 * WINDOW, (1, 64, 32))
    assert little(2 * 3 * WINDOW + 1, spacing=(999.0, 2.0, 1.0)) and not little(
        2 * 3 * WINDOW, spacing=(999.0, 2.0, 1.0)
    )
    assert little(2 * 9 * WINDOW + 1, (9, 32, 32)) and not little(2 * 9 * WINDOW, (9, 32, 32))
    predictor.use_mirroring = False
    assert little(WINDOW + 1) and not little(WINDOW)
    assert not little(1 << 60, spacing=(999.0, 0.0, 1.0))  # which is refused when it is preprocessed
    predictor.device = torch.device("cpu")  # where nothing is compiled
    assert not little(1 << 60)


def test_kernels_that_are_asked_for_are_compiled_for_little(flat: tuple[Path, Path], told):
    """And so its batches are those of kernels."""
    with nnunet_lgms.ops.kernels("on"):
        assert told(1 << 60, lambda predictor: predictor.predict_from_files(str(flat[1]), None)) is False


def test_a_list_is_batched_as_if_it_were_the_first(flat: tuple[Path, Path], told, monkeypatch):
    """Whatever the predictor was asked for before."""
    monkeypatch.setitem(logits.VOXELS, "cuda", 4 * WINDOW)
    monkeypatch.setattr(Predictor, "_warm_up", Predictor._expect)
    together = []

    def call(predictor: Predictor) -> None:
        in_batches = predictor._batches
        monkeypatch.setattr(
            predictor, "_batches", lambda device, n_windows: in_batches(torch.device("cuda"), n_windows)
        )
        hook = predictor.network.register_forward_pre_hook(lambda _, args: together.append(len(args[0])))
        predictor.predict_from_files(str(flat[1]), None)
        hook.remove()

    for little in (False, True, False):
        together.clear()
        assert told(N_CASES * WINDOW + int(little), call) is little
        assert together == ([2] * 4 if little else [8])  # of four windows and their copies


def test_where_pytorchs_operators_have_no_room_for_a_window_kernels_take_it(flat: tuple[Path, Path], told):
    said, failed = [], []

    def call(predictor: Predictor) -> None:
        def scarce(network, args) -> None:
            if network.few_predictions:
                failed.append(len(args[0]))
                raise torch.OutOfMemoryError("CUDA out of memory.")

        hook = predictor.network.register_forward_pre_hook(scarce, prepend=True)
        predictor.talk = said.append
        for _ in range(2):
            predictor.predict_from_files(str(flat[1]), None)
        hook.remove()

    assert told(1 << 60, call) is False
    assert failed == [8, 4, 2, 1]  # then it is known
    assert not any("the CPU computes" in line or "host's memory" in line for line in said)


def test_a_call_that_goes_on_decides_as_it_began(flat: tuple[Path, Path], told, tmp_path: Path):
    images, out = str(flat[1]), tmp_path / "out"
    for voxels, answer in ((N_CASES * WINDOW, False), (N_CASES * WINDOW + 1, True)):
        assert told(voxels, lambda predictor: predictor.predict_from_files(images, str(out))) is answer
        for case in (0, 2):
            (out / f"case_{case}.png").unlink()
        go_on = lambda predictor: predictor.predict_from_files(images, str(out), overwrite=False)  # noqa: E731
        assert told(voxels, go_on) is answer
        assert len(list(out.glob("case_*.png"))) == N_CASES


@pytest.mark.parametrize("workers", [None, 1])
def test_a_zero_shot_test_that_goes_on_decides_as_it_began(flat, told, tmp_path: Path, workers):
    cases = {f"case_{i}": [flat[1] / f"case_{i}_0000.png"] for i in range(N_CASES)}
    for voxels, answer in ((N_CASES * WINDOW, False), (N_CASES * WINDOW + 1, True)):
        for case in ("case_1", "case_3"):
            (tmp_path / f"{case}.png").unlink(missing_ok=True)
        there = tmp_path / "case_0.png"
        Image.new("L", (9, 9), 1).save(there)  # as no prediction would be
        before = there.read_bytes()
        assert told(voxels, lambda predictor: zeroshot._predict(predictor, cases, tmp_path, workers)) is answer
        assert len(list(tmp_path.glob("case_*.png"))) == N_CASES
        assert there.read_bytes() == before


def test_of_what_is_not_counted_kernels_are_compiled(flat: tuple[Path, Path], told):
    """Cases of whatever iterator, as those of a validation, and calls of the sliding window alone."""
    case = {"data": torch.zeros(1, 1, 32, 32), "data_properties": {"spacing": (999, 1, 1)}, "ofile": None}
    case["data_properties"] |= {
        "shape_before_cropping": (1, 32, 32),
        "bbox_used_for_cropping": [[0, 1], [0, 32], [0, 32]],
    }
    case["data_properties"]["shape_after_cropping_and_before_resampling"] = (1, 32, 32)

    def single(predictor: Predictor) -> None:
        predictor.predict_single_npy_array(case["data"].numpy(), {"spacing": (999, 1, 1)})

    for call in (
        lambda predictor: predictor.predict_from_data_iterator(iter([dict(case)])),
        lambda predictor: predictor.predict_logits_from_preprocessed_data(case["data"]),
        lambda predictor: predictor.predict_sliding_window_return_logits(case["data"]),
    ):
        assert told(1 << 60, single) is True
        assert told(1 << 60, call) is False


def test_a_first_image_that_cannot_be_read_says_nothing(flat: tuple[Path, Path], told, tmp_path: Path):
    (tmp_path / "broken_0000.png").write_text("no picture")
    files = [[str(tmp_path / "broken_0000.png")], [str(flat[1] / "case_0_0000.png")]]

    def call(predictor: Predictor) -> None:
        with pytest.raises(CasesFailed, match="1 of 2 cases are not predicted: image 1 "):
            predictor.predict_from_files(files, None)

    assert told(1 << 60, call) is False


def test_the_batch_that_goes_ahead_takes_the_same_path(flat: tuple[Path, Path], told, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: zeros(*size, **more))
    monkeypatch.setitem(logits.VOXELS, "cuda", WINDOW)  # a window and its copy fill a batch
    begun = []
    monkeypatch.setattr(compiling, "workers_begin", lambda device: begun.append(device) or nullcontext())

    def warm_up(predictor: Predictor) -> None:
        monkeypatch.setattr(predictor.network, "to", lambda device: predictor.network)
        monkeypatch.setattr(predictor, "_windows_of_flat", lambda data: 0)
        predictor.predict_from_files(str(flat[1]), None)

    for voxels, answer in ((N_CASES * WINDOW, False), (N_CASES * WINDOW + 1, True)):
        assert told(voxels, warm_up) is answer
        assert begun == ([] if answer else [torch.device("cuda")])
        begun.clear()


def test_nnunets_networks_are_not_asked(tmp_path: Path, monkeypatch):
    plans = {"2d": unet_model.configuration((32, 32), (1.0, 1.0))}
    model = unet_model.model(tmp_path / "model", plans, name="2d")
    image = unet_model.image(tmp_path / "images/case_0000.nii.gz", (2, 32, 32), (1.0, 1.0, 1.0))
    by_cpu = load_predictor(model, device="cpu").predict_from_files(str(image.parent), None)
    predictor_ = load_predictor(model, device="cpu")
    predictor_.device = torch.device("cuda")
    monkeypatch.setattr(predictor_, "_ways", lambda: [(torch.device("cpu"),) * 2])
    monkeypatch.setattr(predictor, "grid_of", lambda *_: pytest.fail("its size is of no interest"))
    np.testing.assert_array_equal(predictor_.predict_from_files(str(image.parent), None)[0], by_cpu[0])
    assert not hasattr(predictor_.network, "few_predictions")


def test_operators_that_need_more_memory_get_smaller_batches(flat: tuple[Path, Path]):
    predictor = load_predictor(flat[0], device="cpu")
    gpu = torch.device("cuda")
    _, with_kernels = predictor._batches(gpu, n_windows=logits.MANY)
    predictor._expect(little=True)
    _, without = predictor._batches(gpu, n_windows=logits.MANY)
    assert with_kernels == logits.WITHOUT_KERNELS * without
