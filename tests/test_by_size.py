"""`nnunet_lgms evaluate --by-size`: objects of each size, one by one."""

import csv

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_lgms.cli import main
from nnunet_lgms.evaluation.by_size import FoundObject, objects_of, size_classes


def test_every_object_has_its_own_numbers():
    reference, prediction = np.zeros((20, 40), bool), np.zeros((20, 40), bool)
    reference[2:6, 2:6] = True  # found whole, with 16 voxels around that are too many
    prediction[2:6, 2:10] = True
    reference[10:14, 2:6] = True  # half of it
    prediction[10:14, 4:6] = True
    reference[10:12, 30:32] = True  # missed
    first, second, third = sorted(objects_of("m", "c", "l", prediction, reference, (1, 2)), key=lambda o: -o.recall)
    assert (first.recall, first.dice, first.detected) == (1, pytest.approx(2 * 16 / (16 + 32)), True)
    assert (second.recall, second.dice) == (0.5, pytest.approx(2 * 8 / (16 + 8)))
    assert (third.recall, third.dice, third.detected) == (0, 0, False)
    assert first.diameter == pytest.approx(2 * np.sqrt(32 / np.pi))  # 16 pixels of 2 mm² each


def test_one_prediction_over_two_objects_counts_what_is_in_neither():
    reference, prediction = np.zeros((1, 8, 20), bool), np.zeros((1, 8, 20), bool)
    reference[0, :4, :4] = reference[0, :4, 10:14] = True
    prediction[0, :4, :14] = True
    for found in objects_of("m", "c", "l", prediction, reference, (5, 1, 1)):
        assert found.recall == 1 and found.dice == pytest.approx(2 * 16 / (16 + 16 + 24))
        assert found.diameter == pytest.approx(2 * np.sqrt(16 / np.pi))  # a slice of one voxel is flat


def test_classes_of_size_are_the_references():
    objects = [
        FoundObject(model, "c", "l", float(size), dice, dice, dice > 0)
        for size in range(1, 9)
        for model, dice in (("a", 1.0), ("b", float(size > 2)))
    ]
    a, b = ([c for c in size_classes(objects) if c.model == model] for model in "ab")
    assert [(c.smallest, c.largest, c.n) for c in a] == [(c.smallest, c.largest, c.n) for c in b]
    assert [c.n for c in a] == [2, 2, 2, 2] and [c.detected for c in b] == [0, 1, 1, 1]


@pytest.mark.slow
def test_the_command_writes_a_row_an_object_and_a_picture(tmp_path, capsys):
    pytest.importorskip("monai")
    for kind in ("predicted", "reference"):
        (tmp_path / kind).mkdir()
        labels = np.zeros((4, 24, 24), np.uint8)
        labels[1:3, 2:12, 2:12] = 1
        if kind == "reference":
            labels[1, 20:22, 20:22] = 1
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / kind / "a.nii.gz"))
    folders = [str(tmp_path / kind) for kind in ("predicted", "reference")]
    out = tmp_path / "out"
    assert main(["evaluate", *folders, "--labels", "lesion=1", "--by-size", "-o", str(out), "--bootstrap", "50"]) == 0
    said = capsys.readouterr().out
    assert "diameter (mm)" in said and "model, lesion" in said
    rows = list(csv.DictReader((out / "by_size.csv").open()))
    assert sorted((row["recall"], row["detected"]) for row in rows) == [("0.0", "0"), ("1.0", "1")]
    assert (out / "by_size.png").read_bytes()[:4] == b"\x89PNG"
