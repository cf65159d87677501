"""Plans as nnU-Net writes them, small enough to build networks from by the dozen."""

from __future__ import annotations

from typing import Any

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


def configuration(
    patch_size: list[int],
    strides: list[list[int]] | None = None,
    kernel_sizes: list[list[int]] | None = None,
    spacing: list[float] | None = None,
    **more: Any,
) -> dict:
    """One configuration; ``patch_size`` gives the dimension, strides default to 3 stages of 2 per axis."""
    dim = len(patch_size)
    strides = strides or [[1] * dim, [2] * dim, [2] * dim]
    kernel_sizes = kernel_sizes or [[3] * dim] * len(strides)
    n_stages = len(strides)
    convolution = f"torch.nn.modules.conv.Conv{dim}d"
    return {
        "data_identifier": f"nnUNetPlans_{dim}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch_size,
        "median_image_size_in_voxels": patch_size,
        "spacing": spacing or [1.0] * dim,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n_stages,
                "features_per_stage": [min(32 * 2**i, 320) for i in range(n_stages)],
                "conv_op": convolution,
                "kernel_sizes": kernel_sizes,
                "strides": strides,
                "n_conv_per_stage": [2] * n_stages,
                "n_conv_per_stage_decoder": [2] * (n_stages - 1),
            },
            "_kw_requires_import": ["conv_op"],
        },
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
