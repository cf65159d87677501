"""The data sets of the evidence: every row gathers, splits and packs alike."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from evidence_parts import packs, verdicts
from evidence_parts.report import Results
from evidence_parts.runs import STAGES, Run, models_of, runs_of
from evidence_parts.sets import PIXELS, SETS, gather, pixels, splits_of
from PIL import Image

FLAT = [name for name, row in SETS.items() if row.is_flat]


def lay_out(folder, row, n=10, size=40):
    """Files of a flat set as it is published: images with an edge of its own size, masks with grey edges."""
    random = np.random.default_rng(0)
    for i in range(n):
        name = row.images.replace("\\", "").replace("(.+)", f"case ({i})").replace("(d+)", str(i))
        inner = name.split("/")[-1].split(".")[0].removeprefix("Test_Image_")
        image, mask = folder / row.source / name, folder / row.source / row.masks.format(inner)
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (size, size, 3), np.uint8)).save(image)
        Image.fromarray(np.where(np.arange(size * size) < 200, 255, 3).reshape(size, size).astype(np.uint8)).save(mask)


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_set_becomes_what_nnunet_reads(tmp_path, name):
    row = SETS[name]
    lay_out(tmp_path, row, 3)
    gather(row, tmp_path, tmp_path / "raw")
    folder = tmp_path / "raw" / row.name
    description = json.loads((folder / "dataset.json").read_text())
    images, labels = (sorted((folder / sub).iterdir()) for sub in ("imagesTr", "labelsTr"))
    assert description["numTraining"] == len(images) == len(labels) == 3
    assert [p.name.replace("_0000", "") for p in images] == [p.name for p in labels]
    assert all(c.isalnum() or c in "_." for p in images for c in p.name)
    with Image.open(labels[0]) as label, Image.open(images[0]) as image:
        assert set(np.unique(label)) == {0, 1} and label.size == image.size == (PIXELS, PIXELS)
        assert len(image.getbands()) == len(description["channel_names"])


def test_a_lost_mask_is_named(tmp_path):
    lay_out(tmp_path, SETS["kvasir"], 2)
    next((tmp_path / "kvasir" / "masks").iterdir()).unlink()
    with pytest.raises(ValueError, match="has no mask"):
        gather(SETS["kvasir"], tmp_path, tmp_path / "raw")


def test_seeded_splits_repeat_and_keep_sides_apart(tmp_path):
    lay_out(tmp_path, SETS["kvasir"])
    folds = splits_of(SETS["kvasir"], tmp_path)
    assert folds == splits_of(SETS["kvasir"], tmp_path) and len(folds) == 3
    assert all(len(f["train"]) == 8 and len(f["val"]) == 2 and not set(f["train"]) & set(f["val"]) for f in folds)
    assert len({tuple(f["val"]) for f in folds}) == 3


def test_a_patient_is_on_one_side():
    cases = [f"patient{i:03d}_frame{j:02d}" for i in range(12) for j in (1, 9)]
    folds = SETS["acdc"].rule(None, cases)
    assert len(folds) == 5 and sorted(c for fold in folds for c in fold["val"]) == sorted(cases)
    for fold in folds:
        assert not {c.split("_")[0] for c in fold["train"]} & {c.split("_")[0] for c in fold["val"]}


@pytest.mark.parametrize("wrong, said", [("case_9", "which is not in isic2017"), ("case_0", "on both sides")])
def test_lists_that_do_not_fit_are_refused(tmp_path, wrong, said):
    lay_out(tmp_path, SETS["isic"], 3)
    (tmp_path / "isic2017" / "train.txt").write_text("case_0\ncase_1\n")
    (tmp_path / "isic2017" / "val.txt").write_text(f"case_2\n{wrong}\n")
    with pytest.raises(ValueError, match=said):
        splits_of(SETS["isic"], tmp_path)


def test_every_set_is_trained_on_its_splits():
    assert [run.fold for run in runs_of("sets_acdc:lgmsnet:5:0,1,2,6")] == [0, 1, 2, 1]
    assert {run.fold for run in runs_of("sets_isic:lgmsnet:5:0,1,2")} == {0}
    assert {"lgmsnet", "lgmsnet_nnunetda", "nnunet", "resenc_m", "plain"} <= set(models_of(STAGES["sets_la2018"]))
    assert runs_of("sets_kvasir:nnunet:50")[0].name == "sets_kvasir-nnunet-50x100-s0"


def test_a_jpeg_travels_in_place_of_its_values(tmp_path):
    """Also where nnU-Net cut a border off, and not if the preprocessed image is something else."""
    lay_out(tmp_path, SETS["kvasir"], 1, size=PIXELS)
    (file,) = (tmp_path / "kvasir" / "images").iterdir()
    properties = {"bbox_used_for_cropping": [[0, 1], [3, 200], [0, PIXELS]]}
    image = (pixels(file, 3).transpose(2, 0, 1)[:, None, 3:200] / np.float32(255)).astype(np.float32)
    levels = packs._levels_of_jpeg(image, file.read_bytes(), properties)
    codes = packs._codes_of_jpeg(file.read_bytes(), pickle.loads(pickle.dumps(properties)), 3)
    assert np.array_equal(np.stack([v[c] for v, c in zip(levels, codes)]), image)
    image[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="is not its JPEG file"):
        packs._levels_of_jpeg(image, file.read_bytes(), properties)


def made_up(stage, model, dice, seed=0):
    run = Run(stage, model, 50, seed, 100)
    cases = {f"{seed}_{i}": {"x": {"IoU": d, "Dice": d, "HD95": 1.0}} for i, d in enumerate(dice)}
    scores = {"unit": "mm", "mean": {"x": {}}, "cases": cases}
    about = {"date": "", "device": "", "versions": {"torch": "", "nnunetv2": ""}, "commit": None, "seconds": 1.0}
    about |= {"iterations": 5000, "iterations_per_epoch": 100, "parameters": 1, "step_ms_alone": None}
    return about | {
        "run": run.as_dict(),
        "waiting_for_batches": 0.0,
        "scores": {"validation": scores, "validation-mirrored": scores},
    }


def test_sets_are_counted_as_ahead_level_and_behind(tmp_path):
    """p is adjusted for the number of sets: one that is level stays so."""
    random = np.random.default_rng(0)
    base = random.uniform(0.6, 0.9, 30)
    runs = []
    for stage, gain in (("sets_kvasir", 0.05), ("sets_acdc", 0.0), ("sets_la2018", -0.05)):
        for seed in (0, 1):
            ours = base + gain + random.normal(0, 0.01, 30)
            runs += [made_up(stage, "lgmsnet", ours, seed), made_up(stage, "nnunet", base, seed)]
    (tmp_path / "evidence").mkdir()
    for run in runs:
        (tmp_path / "evidence" / f"{Run(**run['run']).name}.json").write_text(json.dumps(run))
    lines = verdicts.verdicts(Results(tmp_path))
    (row,) = [line for line in lines if line.startswith("| LGMSNet")]
    assert row.endswith("| 1 / 1 / 1 |") and row.count("not run") == 4 and "+0.05" in row
    text = "\n".join(verdicts.seven_lines(Results(tmp_path)))
    assert "no spacing" in text and text.count("### ") == 7 and "| 0, 1 |" in text
