"""A trained model becomes an ONNX file that says the same as PyTorch, and a JSON that is enough to predict."""

from __future__ import annotations

import json
import logging
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from conftest import ROOT
from exported import HIPPOCAMPUS, fit_hippocampus, hippocampus_plans, write_model

onnx = pytest.importorskip("onnx", reason="needs the extra [export]")
pytest.importorskip("onnxscript", reason="needs the extra [export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")

from nnunet_lgms.cli import main  # noqa: E402
from nnunet_lgms.inference import load_predictor  # noqa: E402
from nnunet_lgms.runtime import Predictor  # noqa: E402
from nnunet_lgms.runtime.description import Description, checksum  # noqa: E402
from nnunet_lgms.runtime.images import read_case  # noqa: E402
from nnunet_lgms.runtime.preprocessing import preprocess  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def trainers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, hippocampus: Path) -> Path:
    return fit_hippocampus(tmp_path_factory.mktemp("results"), hippocampus)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the export of `exported` printed."""
    return []


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_folder: Path, hippocampus: Path, said: list[str]) -> Path:
    """With the raw data set where nnU-Net has it, so that the file is compared on training images."""
    file = tmp_path_factory.mktemp("exported") / "hippocampus.onnx"
    raw = tmp_path_factory.mktemp("raw")
    (raw / HIPPOCAMPUS).symlink_to(hippocampus)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setenv("nnUNet_raw", str(raw))
        assert main(["export", str(model_folder), "--to", "onnx", "-o", str(file)]) == 0
    said += out.getvalue().splitlines()
    return file


@pytest.fixture(scope="module")
def two_folds(tmp_path_factory) -> tuple[Path, Path]:
    folder = tiny_model.model_folder(tmp_path_factory.mktemp("flat"), "Dataset901_Home", folds=(0, 1))
    file = tmp_path_factory.mktemp("exported") / "flat.onnx"
    assert main(["export", str(folder), "--folds", "0", "1", "-o", str(file)]) == 0
    return folder, file


def session(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest over the foreground labels of either."""
    values = set(np.unique(a)) | set(np.unique(b))
    return min(2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in values - {0})


def test_only_onnx_operators(exported, two_folds):
    for file in (exported, two_folds[1]):
        model = onnx.load(file)
        onnx.checker.check_model(model)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
        assert [entry.domain for entry in model.opset_import] == [""]


def test_an_export_tells_its_steps_and_a_verdict(exported, said, hippocampus):
    steps = [re.fullmatch(r"\[(\d)/4\] (.*): \d+ s", line) for line in said[:4]]
    assert [int(step[1]) for step in steps] == [1, 2, 3, 4]
    first, *_, middle = (sorted((hippocampus / "imagesTr").glob("*_0000.nii.gz"))[i].name[:-12] for i in (0, 12))
    sample = f"4 windows of {first} and {middle}"
    assert steps[2][2] == f"comparing with PyTorch on {sample}"
    (verdict,) = (line for line in said if line.startswith("Verdict: "))
    assert verdict == f"Verdict: within 1e-4 of PyTorch on {sample}; all labels are the same"


def test_logits_are_pytorchs_on_real_cases(exported, model_folder, hippocampus):
    """Windows of every test case, and of another size than the patch."""
    predictor = load_predictor(model_folder, device="cpu")
    network, description = predictor.network.eval(), Description.read(exported.with_suffix(".json"))
    runtime = session(exported)
    patch = np.array(description.patch_size)
    files = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))
    assert len(files) == 6 and all(description.steps)
    for i, file in enumerate(files):
        data = preprocess(read_case([file], description), description).data
        size = patch + np.array(description.steps) * (i % 2)
        window = np.pad(data, [(0, 0), *((0, max(0, n - s)) for n, s in zip(size, data.shape[1:]))])
        window = np.ascontiguousarray(window[:, : size[0], : size[1], : size[2]])[None].repeat(1 + i % 3, axis=0)
        with torch.inference_mode():
            expected = network(torch.from_numpy(window)).numpy()
        (found,) = runtime.run(None, {"image": window})
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_blank_window_is_background(exported, model_folder):
    """With no foreground made of rounding, in PyTorch and ONNX Runtime alike."""
    network = load_predictor(model_folder, device="cpu").network.eval()
    blank = np.zeros((1, 1, *Description.read(exported.with_suffix(".json")).patch_size), np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(blank)).numpy()
    logits = Predictor(exported).network(blank)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert logits.reshape(logits.shape[1], -1).std(1).max() < 1e-5 and (logits.argmax(1) == 0).all()


def test_folds_are_averaged_for_any_batch_and_size(two_folds):
    folder, file = two_folds
    predictor = load_predictor(folder, device="cpu")
    description = Description.read(file.with_suffix(".json"))
    assert description.folds == ("0", "1") and all(description.steps)
    runtime = session(file)
    for batch, steps in ((1, 0), (3, 1), (2, 2)):
        size = [p + steps * s for p, s in zip(description.patch_size, description.steps)]
        image = torch.randn(batch, 1, *size)
        logits = []
        for parameters in predictor.list_of_parameters:
            predictor.network.load_state_dict(parameters)
            with torch.inference_mode():
                logits.append(predictor.network.eval()(image))
        (found,) = runtime.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(found, torch.stack(logits).mean(0).numpy(), atol=1e-4)


def test_whole_cases_as_nnunets_predictor(exported, model_folder, hippocampus):
    """Crop, resampling, windows, mirrors and the way back: the labels that nnU-Net itself gives."""
    theirs, ours = load_predictor(model_folder, device="cpu"), Predictor(exported, threads=1)
    reader = theirs.plans_manager.image_reader_writer_class()
    for file in sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[:3]:
        expected = theirs.predict_single_npy_array(*reader.read_images([str(file)]))
        labels = ours.predict(file)
        assert labels.dtype == np.uint8 and set(np.unique(labels)) == {0, 1, 2}
        assert dice(labels, expected) >= 0.999


def test_the_description_has_all_that_prediction_needs(exported, model_folder):
    content = json.loads(exported.with_suffix(".json").read_text())
    plans = json.loads((model_folder / "plans.json").read_text())
    assert content["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    assert content["channel_names"] == ["MRI"] and content["reader"] == "SimpleITKIO"
    assert content["mirror_axes"] == [1] and content["patch_size"] == [22, 32, 24]
    assert content["spacing"] == plans["configurations"]["3d_fullres"]["spacing"]
    assert (content["dataset"], content["configuration"], content["folds"]) == (HIPPOCAMPUS, "3d_fullres", ["0"])


def test_half_precision(tmp_path, model_folder, exported, hippocampus, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_lgms.export.export.to_onnx", _translated(exported))
    file = tmp_path / "half.onnx"
    words = ["export", str(model_folder), "--fp16", "-o", str(file), "--images"]
    assert main([*words, str(hippocampus / "imagesTs")]) == 0
    said = capsys.readouterr().out  # of the file that was written, which is no more within 1e-4
    assert re.search(
        r"Verdict: within 0\.\d+ of PyTorch on 4 windows of .*; (99\.\d+% of|all) labels are the same", said
    )
    assert main([*words, str(tmp_path)]) == 2
    assert "has no image of 1 channel(s) named CASE_0000.nii.gz" in capsys.readouterr().err
    assert weights(file, onnx.TensorProto.FLOAT16) > 0.9 * weights(exported, onnx.TensorProto.FLOAT)
    case = next((hippocampus / "imagesTs").glob("*.nii.gz"))
    assert dice(Predictor(file).predict(case), Predictor(exported).predict(case)) > 0.99


def test_int8_reports_what_it_costs(tmp_path, model_folder, exported, hippocampus, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_lgms.export.export.to_onnx", _translated(exported))
    file = tmp_path / "int8.onnx"
    words = ["export", str(model_folder), "--int8", "--calibration", str(hippocampus), "--cases", "2", "-o", str(file)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Dice" in said and "[6/6] writing" in said
    assert "of PyTorch on one patch of noise (no training images; --images names others)" in said
    report = Description.read(file.with_suffix(".json")).quantisation
    assert len(report["calibration_cases"]) == len(report["evaluation_cases"]) == 2
    assert not set(report["calibration_cases"]) & set(report["evaluation_cases"])
    assert report["dice_fp32"] > 0.2 and abs(report["dice_loss"]) < 0.05  # a weak model, but its labels are no noise
    assert report["dice_loss"] == pytest.approx(report["dice_fp32"] - report["dice_int8"])
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert weights(file, onnx.TensorProto.INT8) > 0.8 * weights(exported, onnx.TensorProto.FLOAT)


def test_what_others_log_is_as_loud_afterwards(tmp_path, monkeypatch):
    """Also if it fails."""
    from nnunet_lgms.export import precision

    def fails(*args, **options) -> None:
        logging.warning("not heard")
        raise RuntimeError("no 8 bits")

    monkeypatch.setattr(precision, "quantize_static", fails)
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    with pytest.raises(RuntimeError, match="no 8 bits"):
        precision.quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", iter([]))
    assert logging.getLogger().level == logging.INFO


def weights(file: Path, kind: int) -> int:
    """Numbers of this type that the file holds."""
    return sum(int(np.prod(c.dims)) for c in onnx.load(file).graph.initializer if c.data_type == kind)


def _translated(file: Path):
    """The translation that was done already, in place of another."""
    from nnunet_lgms.export.onnx_file import Exported

    description = Description.read(file.with_suffix(".json"))
    return lambda *_: Exported(onnx.load(file), description.patch_size, description.steps)


def refused(words: list, capsys) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_another_trainers_model_is_refused_by_name(tmp_path, hippocampus, capsys):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = hippocampus_plans()
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=False,
    )
    description = json.loads((hippocampus / "dataset.json").read_text())
    folder = write_model(tmp_path, plans, description, network, "nnUNetTrainer")
    message = refused(["export", folder, "-o", tmp_path / "x.onnx"], capsys)
    assert "nnUNetTrainer" in message and "PlainConvUNet" in message and "nnUNetTrainerLGMSNet" in message
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob("*.json"))


def test_export_refuses(tmp_path, model_folder, hippocampus, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert "not a trained model" in refused(["export", tmp_path], capsys)
    assert "fold_3" in refused(["export", model_folder, "--folds", "3"], capsys)
    assert ".onnx" in refused(["export", model_folder, "-o", tmp_path / "model.pt"], capsys)
    assert "does not exist" in refused(["export", model_folder, "-o", tmp_path / "none" / "m.onnx"], capsys)
    assert "nnUNet_raw" in refused(["export", model_folder, "--int8"], capsys)
    assert "imagesTr" in refused(["export", model_folder, "--int8", "--calibration", tmp_path], capsys)


def test_other_json_files_are_not_replaced(tmp_path, model_folder, capsys):
    before = (model_folder / "plans.json").read_bytes()
    assert "which is no export's" in refused(["export", model_folder, "-o", model_folder / "plans.onnx"], capsys)
    assert (model_folder / "plans.json").read_bytes() == before and not (model_folder / "plans.onnx").exists()
    (tmp_path / "m.json").mkdir()
    assert "m.json is a folder" in refused(["export", model_folder, "-o", tmp_path / "m.onnx"], capsys)


def test_weights_of_a_failed_training_are_refused(tmp_path, model_folder, exported, capsys, monkeypatch):
    monkeypatch.setattr("nnunet_lgms.export.export.to_onnx", _translated(exported))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    next(iter(checkpoint["network_weights"].values())).fill_(torch.nan)
    torch.save(checkpoint, file)
    assert "gives NaN or infinity" in refused(["export", folder, "-o", tmp_path / "m.onnx"], capsys)
    assert not list(tmp_path.glob("m.*"))


def test_a_network_that_was_translated_wrongly_is_not_written(tmp_path, model_folder, exported, monkeypatch):
    model = onnx.load(exported)
    bias = next(c for c in model.graph.initializer if len(c.dims) == 1 and c.dims[0] == 3)
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    shutil.copy(exported.with_suffix(".json"), tmp_path / "wrong.json")
    monkeypatch.setattr("nnunet_lgms.export.export.to_onnx", _translated(tmp_path / "wrong.onnx"))
    with pytest.raises(RuntimeError, match="differs from PyTorch's by 1.0e"):
        main(["export", str(model_folder), "-o", str(tmp_path / "m.onnx")])
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("name", ["line\nbreak", "bell\a", "\u202eturned", ""])
def test_names_that_cannot_be_written_are_refused_before_anything_is_computed(
    tmp_path, model_folder, capsys, monkeypatch, name
):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"labels": {"background": 0, name: 1, "b": 2}}))
    monkeypatch.setattr("nnunet_lgms.export.export.to_onnx", lambda *_: pytest.fail("it was translated"))
    message = refused(["export", folder, "-o", tmp_path / "m.onnx"], capsys)
    assert message.count("\n") == 1 and "labels" in message and message.rstrip("\n").isprintable()
    assert not list(tmp_path.glob("m.*"))


def test_the_description_knows_its_file(exported):
    content = json.loads(exported.with_suffix(".json").read_text())
    assert content["sha256"] == checksum(exported.read_bytes(), content)


def test_runtime_refuses(tmp_path, exported, hippocampus, capsys):
    case = next((hippocampus / "imagesTs").glob("*.nii.gz"))
    out = ["-o", tmp_path / "out"]
    assert "give every channel once" in refused(["runtime", exported, "-i", case, case, *out], capsys)
    assert "does not exist" in refused(["runtime", exported, "-i", tmp_path / "none.nii.gz", *out], capsys)
    assert "CASE_0000" in refused(["runtime", exported, "-i", tmp_path, *out], capsys)
    assert "--threads 0" in refused(["runtime", exported, "-i", case, *out, "--threads", "0"], capsys)
    assert "step" in refused(["runtime", exported, "-i", case, *out, "--step", "0"], capsys)
    (tmp_path / "broken.nii.gz").write_bytes(b"no image")
    assert "cannot be read" in refused(["runtime", exported, "-i", tmp_path / "broken.nii.gz", *out], capsys)
    (tmp_path / "broken.nrrd").write_bytes(b"no image")
    assert "cannot be read" in refused(["runtime", exported, "-i", tmp_path / "broken.nrrd", *out], capsys)
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(exported.read_bytes())
    assert "two files" in refused(["runtime", alone, "-i", case, *out], capsys)
    alone.with_suffix(".json").write_text("{}")
    assert "is not what" in refused(["runtime", alone, "-i", case, *out], capsys)
    alone.with_suffix(".json").write_text(exported.with_suffix(".json").read_text())
    alone.write_bytes(b"no model")
    assert "are not the pair that was exported" in refused(["runtime", alone, "-i", case, *out], capsys)
    content = json.loads(alone.with_suffix(".json").read_text()) | {"sha256": ""}
    alone.with_suffix(".json").write_text(json.dumps(content))
    assert "no ONNX model" in refused(["runtime", alone, "-i", case, *out], capsys)
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    with pytest.raises(ValueError, match="2 channel"):
        Predictor(exported).predict(np.zeros((2, 8, 8, 8)), spacing=(1, 1, 1))
    with pytest.raises(ValueError, match="spacing"):
        Predictor(exported).predict(np.zeros((1, 8, 8, 8)))
