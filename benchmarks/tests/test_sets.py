"""The data sets of the evidence: every row gathers and splits alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from evidence_parts.runs import STAGES, models_of, runs_of
from evidence_parts.sets import FLAT, PIXELS, SETS, gather, with_unseen
from PIL import Image

from .laid_out import lay_out


@pytest.fixture(autouse=True)
def here(monkeypatch, verify_in_threads):
    """A conversion starts no processes."""
    monkeypatch.setattr("nnunet_lgms.data.convert.default_workers", lambda: 1)


@pytest.mark.parametrize("name", [name for name, row in SETS.items() if row.configuration == FLAT])
def test_a_flat_set_becomes_what_nnunet_reads(tmp_path, name):
    row = SETS[name]
    lay_out(tmp_path, row, 3)
    for file in ("train.txt", "val.txt"):
        (tmp_path / row.source / file).write_text("benign_40" if file == "train.txt" else "benign_41")
    gather(row, tmp_path, tmp_path / "raw", tmp_path / "preprocessed")
    folder = tmp_path / "raw" / row.name
    description = json.loads((folder / "dataset.json").read_text())
    images, labels = (sorted((folder / sub).iterdir()) for sub in ("imagesTr", "labelsTr"))
    assert description["numTraining"] == len(images) == len(labels) == 3
    assert description["labels"] == {"background": 0, row.labels[0]: 1}
    assert [p.name.replace("_0000", "") for p in images] == [p.name for p in labels]
    assert all(c.isalnum() or c in "_." for p in images for c in p.name)
    with Image.open(labels[0]) as label, Image.open(images[0]) as image:
        assert set(np.unique(label)) == {0, 1} and label.size == image.size == (PIXELS, PIXELS)
        assert len(image.getbands()) == len(description["channel_names"])
    assert (tmp_path / "preprocessed" / row.name / "splits_final.json").is_file() == (row.rule is not None)


def test_volumes_are_copied_and_read_with_nibabel(tmp_path):
    row = SETS["chaos"]
    lay_out(tmp_path, row, 5)
    gather(row, tmp_path, tmp_path / "raw", tmp_path / "preprocessed")
    folder = tmp_path / "raw" / row.name
    description = json.loads((folder / "dataset.json").read_text())
    assert description["overwrite_image_reader_writer"] == "NibabelIO" and len(description["labels"]) == 5
    source = tmp_path / "chaos_t2" / "images" / "benign (43).nii.gz"
    assert (folder / "imagesTr" / "benign_43_0000.nii.gz").read_bytes() == source.read_bytes()
    splits = tmp_path / "preprocessed" / row.name / "splits_final.json"
    assert len(json.loads(splits.read_text())) == 5


def test_a_lost_mask_is_named(tmp_path, capsys):
    lay_out(tmp_path, SETS["kvasir"], 2)
    next((tmp_path / "kvasir" / "masks").iterdir()).unlink()
    with pytest.raises(ValueError, match="cannot be converted"):
        gather(SETS["kvasir"], tmp_path, tmp_path / "raw", tmp_path / "preprocessed")
    assert "has no mask" in capsys.readouterr().err


def test_what_is_tested_on_comes_along():
    assert [row.title for row in with_unseen(["busi", "isic", "stu"])] == ["BUSI", "ISIC2017", "STU", "PH2"]


def test_seeded_splits_repeat_and_keep_sides_apart(tmp_path):
    cases = [f"case_{i}" for i in range(10)]
    folds = SETS["kvasir"].rule(tmp_path, cases)
    assert folds == SETS["kvasir"].rule(tmp_path, cases) and len(folds) == 3
    assert all(len(f["train"]) == 8 and len(f["val"]) == 2 and not set(f["train"]) & set(f["val"]) for f in folds)
    assert len({tuple(f["val"]) for f in folds}) == 3


def test_a_patient_is_on_one_side(tmp_path):
    cases = [f"patient{i:03d}_frame{j:02d}" for i in range(12) for j in (1, 9)]
    folds = SETS["acdc"].rule(tmp_path, cases)
    assert len(folds) == 5 and sorted(c for fold in folds for c in fold["val"]) == sorted(cases)
    for fold in folds:
        assert not {c.split("_")[0] for c in fold["train"]} & {c.split("_")[0] for c in fold["val"]}


@pytest.mark.parametrize("wrong, said", [("case_9", "'case_9' has no image"), ("case_0", "'case_0' .* in both")])
def test_lists_that_do_not_fit_are_refused(tmp_path, wrong, said):
    (tmp_path / "train.txt").write_text("case_0\ncase_1\n")
    (tmp_path / "val.txt").write_text(f"case_2\n{wrong}\n")
    with pytest.raises(ValueError, match=said):
        SETS["isic"].rule(tmp_path, ["case_0", "case_1", "case_2"])


def test_every_set_is_trained_on_its_splits():
    def folds(name):
        return [run.fold for run in runs_of([name], ["lgmsnet"], [0, 1, 2, 6], epochs=5)]

    assert folds("acdc") == [0, 1, 2, 1] and set(folds("isic")) == {0}
    assert {"lgmsnet", "lgmsnet_nnunetda", "nnunet", "resenc_m", "plain"} <= set(models_of(STAGES["sets_la2018"]))
    assert runs_of(["kvasir"], ["nnunet"], [0], epochs=50)[0].name == "sets_kvasir-nnunet-50x100-s0"
