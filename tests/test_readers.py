"""The runtime's readers against nnU-Net's, over a family of images: voxels, spacing, what the network sees, and labels
written on the grid of the image.

`python tests/test_readers.py` prints how many files of each format are read alike and refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from exported import hippocampus_plans
from image_family import Entry, family
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

pytest.importorskip("onnx", reason="needs the extra [export]")
pytest.importorskip("onnxruntime", reason="needs the extra [runtime]")

import onnx_stub  # noqa: E402

from nnunet_lgms.image_files import check_image_file  # noqa: E402
from nnunet_lgms.nnunet.checks import check_cases  # noqa: E402
from nnunet_lgms.prediction import cases  # noqa: E402
from nnunet_lgms.runtime import Predictor  # noqa: E402
from nnunet_lgms.runtime.description import Resampling  # noqa: E402
from nnunet_lgms.runtime.images import Case, read_case, write_labels  # noqa: E402
from nnunet_lgms.runtime.preprocessing import preprocess  # noqa: E402
from nnunet_lgms.runtime.readers import READERS  # noqa: E402
from nnunet_lgms.runtime.schema import READERS as NAMES  # noqa: E402

ALIKE, BOTH, OURS = "alike", "both refuse", "ours refuses"
#: what the runtime alone may refuse, and reads nothing else of
REASONS = (
    "damaged or was cut short",
    "holds NaN or infinity",
    "complex numbers",
    "several values a voxel",
    "no place in space",
    "holds values beyond 1e+18",
    "a spacing of",
    "viewers turn it",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the libraries."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.disable()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def kind_of(name: str) -> str:
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    return {"hdr": "nii", "img": "nii", "tiff": "tif", "mhd": "mha", "nhdr": "nrrd"}.get(ending, ending)


KINDS = sorted({kind_of(entry.name) for entry in family()})
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "nii" else ()) for kind in KINDS]  # most of the files


def test_the_family_is_large_and_has_every_reader():
    files = list(family())
    assert len({entry.name for entry in files}) == len(files) >= 200
    assert {reader for entry in files for reader in entry.readers} == set(READERS) == set(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_and_labels_written_as_by_nnunet(tmp_path, kind):
    with quiet():
        for entry, file in made(tmp_path, kind):
            for reader in entry.readers:
                verdict(entry, file, reader)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_in_python_reads_them_as_nnunet(tmp_path, kind):
    with quiet():
        for entry, file in made(tmp_path, kind):
            for reader in entry.readers:
                theirs = by_nnunet(file, reader)
                ours = in_python(file, reader, 1 if isinstance(theirs, str) else len(theirs[0]))
                if isinstance(ours, str):
                    check_refusal(entry, file, reader, ours, theirs)
                else:
                    same_samples(entry, file, reader, ours[0], theirs)
                    assert list(ours[1]["spacing"]) == list(theirs[1]["spacing"])


@pytest.mark.parametrize("name", ["sform_flipped.nii", "sheared.nii", "units_micron.nii", "nifti2.nii"])
@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_whole_predictions_are_nnunets(tmp_path, name, reader):
    """The way through nnU-Net's own predictor, the network the same single convolution."""
    entry = next(entry for entry in family() if entry.name == name)
    entry.write(tmp_path / name)
    about = description(reader, 1)
    manager = PlansManager(about.plans)
    dataset = {"labels": {"background": 0, "bright": 1}, "file_ending": ".nii", "channel_names": {"0": "MRI"}}
    network = torch.nn.Conv3d(1, 2, 1)
    network.load_state_dict({"weight": torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -1.0])})
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    configuration = manager.get_configuration("3d_fullres")
    theirs.manual_initialization(network, manager, configuration, [network.state_dict()], dataset, "none", (0,))
    model = onnx_stub.threshold_model(
        tmp_path / "m.onnx",
        tuple(configuration.patch_size),
        reader=reader,
        file_ending=".nii",
        spacing=about.spacing,
        mirror_axes=(0,),
        resampling_data=about.resampling_data,
        resampling_probabilities=about.resampling_probabilities,
    )
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        theirs.predict_from_files_sequential([[str(tmp_path / name)]], [str(tmp_path / "theirs")], False, True)
        Predictor(model).predict_file(tmp_path / name, tmp_path / "ours.nii")
    one, other = nib.load(tmp_path / "theirs.nii"), nib.load(tmp_path / "ours.nii")
    np.testing.assert_array_equal(one.dataobj, other.dataobj)
    np.testing.assert_array_equal(one.affine, other.affine)
    np.testing.assert_allclose(other.affine, nib.load(tmp_path / name).affine, atol=1e-5)
    assert 0 < np.mean(other.dataobj) < 0.5


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_channels_are_compared_with_the_tolerance_of_nnunet(tmp_path, reader):
    def channel(number: int, scale: float = 1.0, away: float = 0.0) -> Path:
        affine = np.diag([scale, scale, scale, 1.0])
        affine[0, 3] = away
        nib.save(nib.Nifti1Image(np.full((4, 5, 6), number, np.float32), affine), tmp_path / f"scan[1]_{number}.nii.gz")
        return tmp_path / f"scan[1]_{number}.nii.gz"

    first = channel(1)
    case = read_case([first, channel(2, 1 + 1e-6, 0.2)], description(reader, 2))
    np.testing.assert_array_equal(case.samples[:, 0, 0, 0], [1, 2])
    with pytest.raises(ValueError, match="The channels of a case differ"):
        read_case([first, channel(2, 1.001)], description(reader, 2))
    with pytest.raises(ValueError, match="lie in different places: .* up to 0.7 mm"):
        read_case([first, channel(2, away=0.7)], description(reader, 2))


@pytest.mark.parametrize("name", ["scan[1]_0000.tif", "scan*_0000.tif", "scan?_0000.tif", "a%b;c _0000.tif"])
@pytest.mark.parametrize("reader", ["NaturalImage2DIO", "Tiff3DIO"])
def test_a_name_is_no_pattern(tmp_path, name, reader):
    tifffile.imwrite(tmp_path / "scan1_0000.tif", np.ones((6, 7, 3), np.uint8))
    tifffile.imwrite(tmp_path / name, np.full((6, 7, 3), 5, np.uint8))
    n_channels = 3 if reader == "NaturalImage2DIO" else 1
    assert np.unique(read_case([tmp_path / name], description(reader, n_channels)).samples) == [5]


def test_pages_that_go_round_have_an_end(tmp_path):
    file = tmp_path / "ring.tif"
    tifffile.imwrite(file, np.ones((6, 7), np.uint8), photometric="minisblack", metadata=None)
    content = bytearray(file.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    end = first + 2 + 12 * int.from_bytes(content[first : first + 2], "little")
    content[end : end + 4] = content[4:8]
    file.write_bytes(content)
    with pytest.raises(ValueError, match="go round in a circle"):
        check_image_file(file)


def test_labels_of_two_files_are_written_together_or_not_at_all(tmp_path, monkeypatch):
    case = Case(np.ones((1, 2, 3, 4), np.float32), (1.5, 1.0, 1.0), False, "Tiff3DIO", (1.5, 1.0, 1.0))
    labels = np.zeros((2, 3, 4), np.uint8)
    write_labels(labels, case, tmp_path / "a.tif")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.tif"]

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match=r"b.tif cannot be written: \[Errno 28\] No space left on device"):
        write_labels(labels, case, tmp_path / "b.tif")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.tif"]


def test_a_model_that_names_no_reader_is_refused(tmp_path):
    model = onnx_stub.threshold_model(tmp_path / "m.onnx")
    content = json.loads(model.with_suffix(".json").read_text())
    del content["reader"]
    model.with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="m.json .*reader"):
        Predictor(model)


def test_the_stage_before_a_cascade_is_found_by_name(tmp_path):
    stage = tmp_path / "predicted"
    stage.mkdir()
    (stage / "scan[1].npz").touch()
    with pytest.raises(ValueError, match="Case scan.1. has no"):  # of the preprocessed data, not of the stage before
        check_cases(tmp_path, ["scan[1]"], "again", stage, "3d_lowres")
    with pytest.raises(ValueError, match="no segmentation from 3d_lowres"):
        check_cases(tmp_path, ["scan[1]", "scan1"], "again", stage, "3d_lowres")


def made(folder: Path, kind: str | None = None) -> Iterator[tuple[Entry, Path]]:
    """Files of a kind, each in a folder of its own."""
    for number, entry in enumerate(family()):
        if kind in (None, kind_of(entry.name)):
            file = folder / str(number) / entry.name
            file.parent.mkdir()
            entry.write(file)
            yield entry, file


def attempt(function: Callable[[], Any]) -> Any:
    """What it gives, or what it says."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def by_nnunet(file: Path, reader: str) -> Any:
    """Samples and properties."""
    return attempt(lambda: recursive_find_reader_writer_by_name(reader)().read_images([str(file)]))


def preprocessed_by_nnunet(theirs: tuple, reader: str) -> Any:
    """What the network sees."""
    samples, properties = theirs
    manager = PlansManager(description(reader, len(samples)).plans)
    run = DefaultPreprocessor(verbose=False).run_case_npy
    configuration = manager.get_configuration("3d_fullres")
    return attempt(lambda: run(samples, None, dict(properties), manager, configuration, {"labels": {}})[0])


def in_python(file: Path, reader: str, n_channels: int) -> Any:
    """Samples and properties, as `nnunet_lgms.predict` and `nnunet_lgms predict` read them."""
    plans = SimpleNamespace(image_reader_writer_class=recursive_find_reader_writer_by_name(reader))
    dataset = {
        "file_ending": file.name[file.name.index(".") :],
        "channel_names": {str(i): "a" for i in range(n_channels)},
    }
    flat = SimpleNamespace(patch_size=(8, 8))  # takes volumes too, slice by slice
    return attempt(lambda: cases.read_case([str(file)], None, plans, flat, dataset)[::2])


def verdict(entry: Entry, file: Path, reader: str) -> str:
    """How a file fares; raises AssertionError if the two differ and ours does not say why."""
    theirs = by_nnunet(file, reader)
    about = description(reader, 1 if isinstance(theirs, str) else len(theirs[0]))
    ours = attempt(lambda: read_case([file], about))
    expected = theirs if isinstance(theirs, str) else preprocessed_by_nnunet(theirs, reader)
    if isinstance(ours, str):
        return check_refusal(entry, file, reader, ours, expected)
    where = f"{entry.name} with {reader}"
    same_samples(entry, file, reader, ours.samples, theirs)
    np.testing.assert_array_equal(ours.spacing, theirs[1]["spacing"], err_msg=where)
    same_labels(ours, theirs, file, reader, where)
    seen = attempt(lambda: preprocess(ours, about).data)
    if isinstance(seen, str):  # both would need more memory than there is
        assert isinstance(expected, str) and "correct the spacing" in seen, where
        return BOTH
    np.testing.assert_allclose(seen, expected, atol=2e-3, rtol=1e-3, err_msg=where)
    return ALIKE


def check_refusal(entry: Entry, file: Path, reader: str, ours: str, theirs: Any) -> str:
    assert ours.startswith("ValueError: ") and "\n" not in ours and str(file) in ours, ours
    if isinstance(theirs, str):
        return BOTH
    assert any(reason in ours for reason in REASONS), f"{entry.name} with {reader}: nnU-Net reads it, ours says {ours}"
    return OURS


def same_samples(entry: Entry, file: Path, reader: str, ours: np.ndarray, theirs: Any) -> None:
    where = f"{entry.name} with {reader}"
    assert not isinstance(theirs, str), f"{where}: ours reads it, nnU-Net says {theirs}"
    assert ours.dtype == theirs[0].dtype == np.float32
    np.testing.assert_array_equal(ours, theirs[0], err_msg=where)
    assert np.isfinite(ours).all(), where
    if entry.damaged:  # nothing but filling may be missing
        assert entry.whole, f"{where}: damaged, but read"
        entry.whole(file)
        whole = by_nnunet(file, reader)[0]
        entry.write(file)
        np.testing.assert_array_equal(ours, whole, err_msg=f"{where}: damaged, but read")


def same_labels(ours: Case, theirs: tuple, file: Path, reader: str, where: str) -> None:
    """Write the same labels with both, and read them again."""
    ending = file.name[file.name.index(".") :].lower().replace(".jpg", ".png").replace(".hdr", ".img")
    if ours.samples.shape[0] > 1 and reader.startswith("SimpleITK"):
        return  # channels in one file, which nnU-Net reads but cannot write labels for
    labels = (theirs[0][0] > np.median(theirs[0][0])).astype(np.uint8) * 3
    a, b = file.parent / f"theirs{ending}", file.parent / f"ours{ending}"
    recursive_find_reader_writer_by_name(reader)().write_seg(labels, str(a), theirs[1])
    write_labels(labels[0] if ours.flat else labels, ours, b)
    assert not list(file.parent.glob(".ours*"))
    for one, other in zip(content(a), content(b), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=where)
    if reader == "Tiff3DIO":
        assert json.loads(a.with_suffix(".json").read_text()) == json.loads(b.with_suffix(".json").read_text())


def content(file: Path) -> tuple:
    """Voxels and place of a label file, by libraries that know both."""
    if kind_of(file.name) == "nii":
        image = nib.load(file)
        return np.asarray(image.dataobj), image.affine, image.header.get_zooms(), image.get_data_dtype().str
    if kind_of(file.name) == "tif":
        return (tifffile.imread(file),)
    image = sitk.ReadImage(str(file))
    geometry = image.GetSpacing(), image.GetOrigin(), image.GetDirection(), image.GetPixelIDTypeAsString()
    return sitk.GetArrayFromImage(image), *geometry


def description(reader: str, n_channels: int) -> SimpleNamespace:
    """What reading and preprocessing ask of a model's description, with nnU-Net's plans that say the same."""
    flat = reader == "NaturalImage2DIO"
    plans = hippocampus_plans() | {"image_reader_writer": reader}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["normalization_schemes"] = ["ZScoreNormalization"] * n_channels
    configuration["use_mask_for_norm"] = [False] * n_channels
    configuration["spacing"] = [1.0, 1.0] if flat else [1.2, 1.0, 0.9]
    plans["foreground_intensity_properties_per_channel"] = {str(i): {} for i in range(n_channels)}
    return SimpleNamespace(
        reader=reader,
        channel_names=("a",) * n_channels,
        transpose_forward=(0, 1, 2),
        normalization_schemes=tuple(configuration["normalization_schemes"]),
        use_mask_for_norm=(False,) * n_channels,
        intensity_properties=({},) * n_channels,
        spacing=tuple(configuration["spacing"]),
        resampling_data=Resampling("resample_data_or_seg_to_shape"),
        resampling_probabilities=Resampling("resample_data_or_seg_to_shape", order=1),
        plans=plans,
    )


def main() -> None:
    counts: dict[str, Counter] = {}
    with TemporaryDirectory() as folder, quiet():
        for entry, file in made(Path(folder)):
            for reader in entry.readers:
                counts.setdefault(f"{kind_of(entry.name)} {reader}", Counter())[verdict(entry, file, reader)] += 1
    print(f"{'format and reader':32}{ALIKE:>14}{BOTH:>14}{OURS:>14}")
    for key, count in counts.items():
        print(f"{key:32}{count[ALIKE]:14}{count[BOTH]:14}{count[OURS]:14}")


if __name__ == "__main__":
    sys.exit(main())
