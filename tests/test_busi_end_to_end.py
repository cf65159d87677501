"""Real BUSI and STU files through the real commands: convert, plan, train, predict, evaluate, zero-shot.

Images are shrunk to 64x64 and the training is five short epochs, so the numbers mean nothing; that they come out, and
that ours are nnU-Net's where both exist, is what is tested. The commands are called in this process; as processes,
``test_end_to_end.py`` runs them.
"""

import csv
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from workshop import Workshop

from nnunet_lgms.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]"),
]

TRAINER = "nnUNetTrainerLGMSNet_busiTest"
TRAINER_MODULE = f"""
import runpy

nnUNetTrainerLGMSNet_demo = runpy.run_path({str(ROOT / "demo" / "trainers" / "demo.py")!r})["nnUNetTrainerLGMSNet_demo"]

class {TRAINER}(nnUNetTrainerLGMSNet_demo):
    num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch = 5, 30, 2
"""


def test_busi_to_stu(shared_data: Path, tmp_path: Path, capsys):
    workshop = Workshop(tmp_path)
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/busi_test.py").write_text(TRAINER_MODULE)
    trainers = os.pathsep.join([str(ROOT / "trainers"), str(tmp_path / "trainers")])
    workshop.env |= {"nnUNet_extTrainer": trainers, "nnUNet_compile": "f"}

    def ours(*words) -> None:
        with workshop.environment():
            assert main([str(word) for word in words]) == 0, capsys.readouterr().err

    small = ("--size", 64, "--workers", 1)
    ours("convert", "busi", shared_data / "busi_original_sample", "--id", 801, "--splits", "paper", *small)
    ours("convert", "stu", shared_data / "stu_hospital", "--id", 802, *small)
    workshop("plan_and_preprocess", "-d", 801, "-c", "2d", "-npfp", 1, "-np", 1)
    workshop.train("801", "-tr", TRAINER, configuration="2d")
    stu, predictions = workshop.raw / "Dataset802_STU", tmp_path / "predictions"
    which = ("-d", 801, "-c", "2d", "-f", 0, "-tr", TRAINER, "-device", "cpu", "-npp", 0, "-nps", 0)
    workshop("predict", "-i", stu / "imagesTr", "-o", predictions, *which)
    ours("evaluate", predictions, stu / "labelsTr", "--dataset", 802)

    cases = list(csv.DictReader((predictions / "evaluation/cases.csv").open()))
    assert len(cases) == 42 and all(0 <= float(case["Dice"]) <= 1 for case in cases)
    summary = json.loads((predictions / "evaluation/summary.json").read_text())
    assert np.mean([float(case["Dice"]) for case in cases]) > 0.05  # it has learnt something: 0.58 was measured
    assert summary["unit"] == "pixels" and summary["models"]["model"]["mean"]["lesion"]["Dice"]["n"] == 42

    # the same predictions again, and nnU-Net's own numbers on its validation cases
    model = workshop.model("Dataset801_BUSI", "2d", TRAINER)
    ours("zeroshot", model, 802, "--device", "cpu", "--workers", 1)
    table = {row["metric"]: row for row in csv.DictReader((model / "zeroshot/zeroshot.csv").open())}
    away = np.mean([float(case["Dice"]) for case in cases])
    assert float(table["Dice"]["zero_shot_mean"]) == pytest.approx(away, abs=1e-6)
    home = json.loads((model / "fold_0/validation/summary.json").read_text())["mean"]["1"]["Dice"]
    assert float(table["Dice"]["in_domain_mean"]) == pytest.approx(home, abs=1e-6)
    assert float(table["Dice"]["drop"]) == pytest.approx(home - away, abs=1e-6)
    assert "data:image/png;base64," in (model / "zeroshot/Dataset802_STU/report.html").read_text()
