"""Real BUSI and STU files through the real commands: convert, plan, train, predict, evaluate, zero-shot.

Images are shrunk to 64x64 and the training is five short epochs, so the numbers mean nothing; that they come out, and
that ours are nnU-Net's where both exist, is what is tested.
"""

import csv
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]"),
]

TRAINER = "nnUNetTrainerLGMSNet_busiTest"
TRAINER_MODULE = f"""
import runpy
import torch

nnUNetTrainerLGMSNet_demo = runpy.run_path({str(ROOT / "demo" / "trainers" / "demo.py")!r})["nnUNetTrainerLGMSNet_demo"]

class {TRAINER}(nnUNetTrainerLGMSNet_demo):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        # nnU-Net gives PyTorch all cores: beside other processes, threads wait for each other on such small maps
        torch.set_num_threads(1)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 5, 30, 2
"""

# what the console scripts call
ENTRY_POINTS = {
    "nnUNetv2_plan_and_preprocess": (
        "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
        "plan_and_preprocess_entry",
    ),
    "nnUNetv2_train": ("nnunetv2.run.run_training", "run_training_entry"),
    "nnUNetv2_predict": ("nnunetv2.inference.predict_from_raw_data", "predict_entry_point"),
    "nnunet_lgms": ("nnunet_lgms.cli", "main"),
}


def test_busi_to_stu(shared_data: Path, tmp_path: Path):
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/busi_test.py").write_text(TRAINER_MODULE)
    environment = os.environ | {
        **{f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")},
        "nnUNet_extTrainer": os.pathsep.join([str(ROOT / "trainers"), str(tmp_path / "trainers")]),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }

    def run(command: str, *words) -> str:
        module, function = ENTRY_POINTS[command]
        code = f"import sys; from {module} import {function}; sys.argv[0] = {command!r}; sys.exit({function}())"
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        print(f"{command}: {time.monotonic() - start:.0f} s")
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    small = ("--size", 64, "--workers", 1)
    run(
        "nnunet_lgms", "convert", "busi", shared_data / "busi_original_sample", "--id", 801, "--splits", "paper", *small
    )
    run("nnunet_lgms", "convert", "stu", shared_data / "stu_hospital", "--id", 802, *small)
    run("nnUNetv2_plan_and_preprocess", "-d", 801, "-c", "2d", "-npfp", 1, "-np", 1)
    which = ("-d", 801, "-c", "2d", "-f", 0, "-tr", TRAINER)
    environment["nnUNet_n_proc_DA"] = "0"  # batches are made in the training process
    run("nnUNetv2_train", 801, "2d", 0, "-tr", TRAINER, "-device", "cpu")
    stu = tmp_path / "raw/Dataset802_STU"
    predictions = tmp_path / "predictions"
    parallel = ("-npp", 1, "-nps", 1)
    run("nnUNetv2_predict", "-i", stu / "imagesTr", "-o", predictions, *which, "-device", "cpu", *parallel)
    out = run("nnunet_lgms", "evaluate", predictions, stu / "labelsTr", "--dataset", 802)
    print(out)

    cases = list(csv.DictReader((predictions / "evaluation/cases.csv").open()))
    assert len(cases) == 42 and all(0 <= float(case["Dice"]) <= 1 for case in cases)
    summary = json.loads((predictions / "evaluation/summary.json").read_text())
    assert np.mean([float(case["Dice"]) for case in cases]) > 0.05  # it has learnt something: 0.58 was measured
    assert summary["unit"] == "pixels" and summary["models"]["model"]["mean"]["lesion"]["Dice"]["n"] == 42

    # the same predictions again, and nnU-Net's own numbers on its validation cases
    model = tmp_path / f"results/Dataset801_BUSI/{TRAINER}__nnUNetPlans__2d"
    print(run("nnunet_lgms", "zeroshot", model, 802, "--device", "cpu", "--workers", 1))
    table = {row["metric"]: row for row in csv.DictReader((model / "zeroshot/zeroshot.csv").open())}
    away = np.mean([float(case["Dice"]) for case in cases])
    assert float(table["Dice"]["zero_shot_mean"]) == pytest.approx(away, abs=1e-6)
    home = json.loads((model / "fold_0/validation/summary.json").read_text())["mean"]["1"]["Dice"]
    assert float(table["Dice"]["in_domain_mean"]) == pytest.approx(home, abs=1e-6)
    assert float(table["Dice"]["drop"]) == pytest.approx(home - away, abs=1e-6)
    assert "data:image/png;base64," in (model / "zeroshot/Dataset802_STU/report.html").read_text()
