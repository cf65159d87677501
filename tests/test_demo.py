"""The demo's data, and the steps of demo/run.py around nnU-Net's commands (which tests of their own run)."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "demo" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(folder: Path, ending: str) -> list[str]:
    return sorted(path.name.removesuffix(ending) for path in folder.iterdir())


def test_data_is_24_training_and_6_test_cases_with_attribution(hippocampus: Path) -> None:
    training, test = names(hippocampus / "labelsTr", ".nii.gz"), names(hippocampus / "labelsTs", ".nii.gz")
    assert (len(training), len(test)) == (24, 6) and not set(training) & set(test)
    assert names(hippocampus / "imagesTr", "_0000.nii.gz") == training
    assert names(hippocampus / "imagesTs", "_0000.nii.gz") == test
    assert json.loads((hippocampus / "dataset.json").read_text())["numTraining"] == 24
    notice = (hippocampus / "README.md").read_text()
    assert "CC-BY-SA 4.0" in notice and "Simpson" in notice and "arXiv 1902.09063" in notice


def test_images_and_labels_fit(hippocampus: Path) -> None:
    for label_file in hippocampus.glob("labelsT?/*.nii.gz"):
        image_file = Path(str(label_file).replace("labels", "images").replace(".nii.gz", "_0000.nii.gz"))
        image, label = sitk.ReadImage(str(image_file)), sitk.ReadImage(str(label_file))
        assert image.GetSize() == label.GetSize() and image.GetSpacing() == label.GetSpacing() == (1, 1, 1)
        assert set(np.unique(sitk.GetArrayFromImage(label))) == {0, 1, 2}


def test_cases_are_chosen_by_name_alone() -> None:
    training, test = load("select_cases").select([f"case_{i:03d}" for i in range(230)])
    assert training[:5] == ["case_000", "case_007", "case_014", "case_021", "case_035"]
    assert test == ["case_028", "case_063", "case_098", "case_133", "case_168", "case_203"]


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """demo/run.py in an empty work folder, with a stand-in for nnU-Net that predicts the reference."""
    module = load("run")
    work = tmp_path / "work"
    for name in ("RAW", "MODEL", "PREDICTIONS", "PICTURE", "WORK"):
        monkeypatch.setattr(module, name, work / getattr(module, name).relative_to(module.WORK))
    monkeypatch.setattr(module, "DEMO", tmp_path)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    module.commands = []

    def nnunet(command: str, *args: str | Path, **environment: str) -> None:
        assert command == "train" or not environment, "nnU-Net cannot plan without processes for augmentation"
        module.commands.append(command)
        if command == "predict":
            shutil.copytree(module.RAW / "labelsTs", module.PREDICTIONS, dirs_exist_ok=True)
        if command == "evaluate_folder":
            perfect = {label: {"Dice": 1.0} for label in ("1", "2")}
            cases = [
                {
                    "reference_file": str(file),
                    "prediction_file": str(module.PREDICTIONS / file.name),
                    "metrics": perfect,
                }
                for file in sorted((module.RAW / "labelsTs").iterdir())
            ]
            summary = {"metric_per_case": cases, "mean": perfect, "foreground_mean": {"Dice": 1.0}}
            (module.PREDICTIONS / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(module, "nnunet", nnunet)
    return module


def test_demo_reports_dice_and_a_picture_and_does_nothing_twice(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main() == 0
    assert demo.commands == ["plan_and_preprocess", "train", "predict", "evaluate_folder"]
    out = capsys.readouterr().out
    assert "anterior     1.000" in out and "posterior    1.000" in out and "mean         1.000" in out
    assert demo.PICTURE.read_bytes().startswith(b"\x89PNG")

    demo.commands.clear()
    assert demo.main() == 0
    assert demo.commands == []
    assert "mean         1.000" in capsys.readouterr().out


def test_demo_goes_on_where_it_failed(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(device: str) -> None:
        raise subprocess.CalledProcessError(137, ["nnUNetv2_train", "4"])

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", killed)
        assert demo.main() == 1
    assert "train failed (exit code 137); the reason is above: nnUNetv2_train 4" in capsys.readouterr().out
    demo.commands.clear()
    assert demo.main() == 0
    assert demo.commands == ["train", "predict", "evaluate_folder"]


def test_interrupted_training_continues_from_its_checkpoint(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr(demo, "nnunet", lambda *line, **environment: lines.append((*line, environment)))
    demo.train("cpu")
    (demo.MODEL / f"fold_{demo.FOLD}").mkdir(parents=True)
    (demo.MODEL / f"fold_{demo.FOLD}" / "checkpoint_latest.pth").touch()
    demo.train("cpu")
    assert ["--c" in line for line in lines] == [False, True]
    assert all(demo.TRAINER in line and "cpu" in line and line[-1] == {"nnUNet_n_proc_DA": "0"} for line in lines)
