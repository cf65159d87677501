"""A whole plans file and its dataset.json, as ``nnUNetv2_train`` hands them to a trainer."""

from __future__ import annotations

from typing import Any

import planned

DATASET_NAME = "Dataset999_Tiny"
LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}


def dataset_json(labels: dict | None = None, n_channels: int = 1) -> dict:
    labels = labels or LABELS
    description = {
        "channel_names": {str(i): f"noNorm{i}" for i in range(n_channels)},
        "labels": labels,
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    if any(isinstance(value, list) for value in labels.values()):
        description["regions_class_order"] = [1, 2]
    return description


def configuration(patch_size: list[int], strides: list[list[int]] | None = None, **more: Any) -> dict:
    """One configuration with all that a trainer reads; strides default to 3 stages of 2 per axis."""
    dim = len(patch_size)
    strides = strides or [[1] * dim, [2] * dim, [2] * dim]
    return {
        **planned.configuration(tuple(patch_size), len(strides), strides=strides),
        "median_image_size_in_voxels": patch_size,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        **more,
    }


def plans(**configurations: dict) -> dict:
    """A plans file; ``continue_training`` is what ``nnUNetv2_train`` adds before it makes the trainer."""
    return {
        "dataset_name": DATASET_NAME,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "continue_training": False,
    }
