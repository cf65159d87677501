"""The smoke test of a user's dataset: which patch and which case it takes, and that it goes the whole way."""

from __future__ import annotations

import json
import math

import pytest
from workshop import Workshop

from nnunet_lgms.nnunet import smoke
from nnunet_lgms.nnunet.smoke import smaller_patch, voxels_to_predict


@pytest.mark.parametrize(
    ("patch_size", "whole", "voxels", "expected"),
    [
        ([40, 56, 40], [8, 8, 8], 2**17, [40, 56, 40]),
        ([128, 128, 128], [32, 32, 32], 2**17, [64, 64, 64]),  # it cannot be smaller
        ([96, 160, 160], [8, 32, 32], 2**17, [32, 64, 64]),
        ([512, 512], [128, 128], 2**17, [256, 384]),
        ([20, 320, 256], [4, 64, 64], 2**17, [8, 128, 128]),
    ],
)
def test_patches_become_smaller_along_their_longest_axes(patch_size, whole, voxels, expected):
    assert smaller_patch(patch_size, whole, voxels) == expected


@pytest.mark.parametrize(
    ("size", "patch_size", "windows"),
    [
        ((40, 40, 40), (64, 64, 64), 1),
        ((96, 64, 64), (64, 64, 64), 2),
        ((1, 96, 80), (64, 64), 4),
        ((7, 9, 9), (9, 9), 7),
    ],
)
def test_voxels_to_predict(size, patch_size, windows):
    assert voxels_to_predict(size, patch_size) == windows * math.prod(patch_size)


@pytest.mark.slow
def test_it_goes_the_whole_way_and_says_what_is_smaller(tmp_path, monkeypatch):
    """Patches of 8 voxels as if the planned ones were large."""
    workshop = Workshop(tmp_path)
    workshop.pictures = True
    name = workshop.dataset(601, "Smoke", n_cases=5)
    monkeypatch.setattr(smoke, "STEP_VOXELS", 2 * 8**3)
    monkeypatch.setattr(smoke, "VALIDATION_VOXELS", 8**3)
    workshop.train(name, "-tr", "nnUNetTrainerLGMSNet_smoke")
    fold = workshop.model(name, trainer="nnUNetTrainerLGMSNet_smoke") / "fold_0"
    log = next(fold.glob("training_log_*.txt")).read_text()
    plans = json.loads((fold.parent / "plans.json").read_text())["configurations"]["3d_fullres"]
    (case,) = json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
    left = {file.name for file in fold.iterdir()}
    assert {"checkpoint_best.pth", "checkpoint_final.pth", "progress.png", "debug.json"} <= left
    assert "checkpoint_latest.pth" not in left and not any(name.startswith(".") for name in left)
    assert f"take the place of the planned {plans['batch_size']} of {plans['patch_size']}." in log
    assert "predicted without mirroring" in log and "case_" in case["prediction_file"]
    # what is trained, and what of the plans is not
    assert "LGMSNet, " in log and "level 1: width 16, strides 1x1x1, encoder " in log
    assert "features_per_stage of the plans are those of nnU-Net's own network and not used." in log
