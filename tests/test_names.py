"""Names that others wrote lead nowhere when they become part of a path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_model
import tiny_plans
from conftest import ROOT

from nnunet_lgms import cli
from nnunet_lgms.inference import load_predictor
from nnunet_lgms.names import is_dataset_name, is_file_name, is_text


@pytest.mark.parametrize(
    "name", ["", "..", ".", ".x", "-x", "a/b", "a\\b", "a\nb", "a\x7f", "a\udce9", "x" * 201, None, 3]
)
def test_what_no_file_is_called(name: object):
    assert not is_file_name(name)


def test_what_may_be_shown_and_what_a_data_set_is_called():
    assert is_text("left/right kidney, 2 mm") and is_text("niño 肝") and is_file_name("3d_fullres v2")
    assert is_dataset_name("Dataset004_Hippocampus") and not is_dataset_name("Dataset004_../x")


@pytest.fixture
def model(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_extTrainer", str(ROOT / "trainers"))
    monkeypatch.chdir(tmp_path)
    return tiny_model.model_folder(tmp_path / "results", "Dataset901_Home")


def change(plans: Path, **content: object) -> None:
    plans.write_text(json.dumps(json.loads(plans.read_text()) | content))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["{}/outside", "../outside", "Dataset901_../../outside", None])
def test_export_writes_nowhere_else(model: Path, tmp_path: Path, capsys, name: str | None):
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    change(model / "plans.json", dataset_name=name and name.format(tmp_path))
    before = sorted(tmp_path.parent.rglob("*"))
    assert cli.main(["export", str(model)]) == 2
    assert "plans.json has the dataset_name " in capsys.readouterr().err
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_every_name_of_a_model_is_checked(model: Path):
    plans = model / "plans.json"
    original = json.loads(plans.read_text())
    for content in (
        {"plans_name": "a/b"},
        {"configurations": {"../2d": original["configurations"]["2d"]}},
        {"configurations": {"2d": {**original["configurations"]["2d"], "data_identifier": "/data"}}},
        {"configurations": {}},
    ):
        plans.write_text(json.dumps(original | content))
        with pytest.raises(ValueError, match=r"plans\.json has (the|no) (plans_name|configuration|data_identifier)"):
            load_predictor(model, device="cpu")
    plans.write_text("[]")
    with pytest.raises(ValueError, match=r"plans\.json holds \[\] instead of a table"):
        load_predictor(model, device="cpu")


def test_plans_to_override_are_checked(tmp_path: Path, monkeypatch, capsys):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / tiny_plans.DATASET_NAME
    folder.mkdir()
    plans = tiny_plans.plans(**{"2d": tiny_plans.configuration([32, 32])}) | {"dataset_name": "/outside"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert cli.main(["override", folder.name, "--apply", "kernels_3"]) == 2
    assert "it has the dataset_name '/outside': it must be such as Dataset004_" in capsys.readouterr().err
