"""nnU-Net's training loop for benchmarks: its command, two datasets, and times of what `trainers/measured.py` saw."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = "3d_fullres"
HIPPOCAMPUS, SYNTHETIC = "Dataset004_Hippocampus", "Dataset990_Synthetic"
HIPPOCAMPUS_BATCH = 9  # what nnU-Net plans for all 260 cases of the set; for the demo's 24 it plans 2
TRAIN = [sys.executable, "-m", "nnunetv2.run.run_training"]  # what nnUNetv2_train calls
PLAN = [sys.executable, "-m", "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"]
#: SimpleITK is 52 MB, more than may travel to some machines
READER = {"overwrite_image_reader_writer": "NibabelIO"}


def prepare(folder: Path, synthetic: int) -> list[str]:
    """nnU-Net's folders, below ``folder``, and the two datasets, planned and preprocessed; their numbers.

    A folder where the same was prepared is used as it is.
    """
    folders = {name: folder / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    os.environ |= {name: str(path) for name, path in folders.items()}
    prepared, wanted = folder / "prepared.json", json.dumps({"synthetic": synthetic})
    if not prepared.is_file() or prepared.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        for path in folders.values():
            path.mkdir(parents=True)
        prepared.write_text("{}")  # nothing yet, but the folder is ours
        raw = folders["nnUNet_raw"]
        shutil.copytree(ROOT / "demo" / "data" / "hippocampus", raw / HIPPOCAMPUS)
        description = raw / HIPPOCAMPUS / "dataset.json"
        description.write_text(json.dumps(json.loads(description.read_text()) | READER))
        make_synthetic(raw / SYNTHETIC, synthetic)
        select = ["-d", "4", "990", "-c", CONFIGURATION, "-npfp", "4", "-np", "4"]
        subprocess.run([*PLAN, *select], check=True, stdout=subprocess.DEVNULL)
        file = folders["nnUNet_preprocessed"] / HIPPOCAMPUS / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        plans["configurations"][CONFIGURATION]["batch_size"] = HIPPOCAMPUS_BATCH
        file.write_text(json.dumps(plans))
        prepared.write_text(wanted)
    return ["4", "990"]


def make_synthetic(raw: Path, size: int) -> None:
    """Noise with two nested boxes, images of ``size`` voxels and more per axis, as a raw dataset."""
    import nibabel

    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(6):
        shape = tuple(size + int(n) for n in rng.integers(0, 1 + size // 8, 3))
        label = np.zeros(shape, np.uint8)
        for value, part in ((1, 0.3), (2, 0.15)):
            label[tuple(slice(int(n * (0.5 - part)), int(n * (0.5 + part))) for n in shape)] = value
        image = (rng.normal(100, 10, shape) + 40 * label).astype(np.float32)
        for array, name in ((image, f"imagesTr/case_{case}_0000"), (label, f"labelsTr/case_{case}")):
            nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), raw / f"{name}.nii.gz")
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1, "lesion": 2}, **READER}
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 6, "file_ending": ".nii.gz"}))


def timings(measured: dict, started: float) -> dict[str, float]:
    """Seconds from the start of the command to the end of the first epoch, seconds of an epoch (median) and share of
    waiting for batches, both after the first.
    """
    seconds, waiting = measured["seconds"][1:], measured["waiting"][1:]
    return {
        "first_epoch_s": measured["times"][0] + measured["seconds"][0] - started,
        "epoch_s": statistics.median(seconds),
        "waiting": sum(waiting) / sum(seconds),
    }
