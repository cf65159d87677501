"""Trained folders of nnU-Net's own U-Net, tiny and with random weights, and images that such a model may be given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

LABELS = {"background": 0, "a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "c": 3}


def resampling(kind: str = "skimage", order_data: int = 3, order_probabilities: int = 1) -> dict:
    """Entries of a configuration: `skimage`, nnU-Net's default, or `torch`."""
    if kind == "torch":
        function, orders = "resample_torch_fornnunet", {}
        own = {"force_separate_z": False, "memefficient_seg_resampling": False}
    else:
        function, own = "resample_data_or_seg_to_shape", {"order_z": 0, "force_separate_z": None}
        orders = {"data": order_data, "seg": 1, "probabilities": order_probabilities}
    entries = {}
    for what in ("data", "seg", "probabilities"):
        entries[f"resampling_fn_{what}"] = function
        order = {"order": orders[what]} if orders else {}
        entries[f"resampling_fn_{what}_kwargs"] = {"is_seg": what == "seg", **order, **own}
    return entries


def configuration(
    patch: Sequence[int], spacing: Sequence[float], normalization: Sequence[str] = ("ZScoreNormalization",), **more
) -> dict:
    dim = len(patch)
    return {
        "data_identifier": "plans",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": list(normalization),
        "use_mask_for_norm": [False] * len(normalization),
        "batch_dice": False,
        **resampling(),
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": [[3] * dim] * 2,
                "strides": [[1] * dim, [2] * dim],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **more,
    }


def model(
    folder: Path,
    configurations: dict[str, dict],
    *,
    name: str = "3d_fullres",
    labels: dict | None = None,
    transpose: Sequence[int] = (0, 1, 2),
    folds: Sequence[int] = (0,),
    mirror: Sequence[int] | None = (0, 1),
    reader: str = "SimpleITKIO",
    ending: str = ".nii.gz",
) -> Path:
    """A folder as nnU-Net's training leaves it, of the configuration `name`."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    labels = labels or LABELS
    n_channels = len(configurations[name]["normalization_schemes"])
    content = {
        "channel_names": {str(i): f"channel {i}" for i in range(n_channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ending,
    }
    if any(isinstance(value, list) for value in labels.values()):
        content["regions_class_order"] = [1, 2, 3]
    properties = {"mean": 30.0, "std": 50.0, "percentile_00_5": -90.0, "percentile_99_5": 160.0}
    plans = {
        "dataset_name": "Dataset903_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": reader,
        "label_manager": "LabelManager",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(i) for i in np.argsort(transpose)],
        "foreground_intensity_properties_per_channel": {str(i): properties for i in range(n_channels)},
        "configurations": configurations,
    }
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(content))
    manager = PlansManager(plans)
    chosen = manager.get_configuration(name)
    heads = manager.get_label_manager(content).num_segmentation_heads
    channels = determine_num_input_channels(manager, chosen, content)
    for fold in folds:
        torch.manual_seed(fold)
        network = get_network_from_plans(
            chosen.network_arch_class_name,
            chosen.network_arch_init_kwargs,
            chosen.network_arch_init_kwargs_req_import,
            channels,
            heads,
            deep_supervision=False,
        )
        with torch.no_grad():
            network.decoder.seg_layers[-1].weight *= 20  # differences between classes as a trained network has them
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "trainer_name": "nnUNetTrainer",
            "init_args": {"configuration": name},
            "inference_allowed_mirroring_axes": mirror and tuple(mirror),
            "network_weights": network.state_dict(),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def image(
    file: Path, shape: Sequence[int], spacing: Sequence[float], seed: int = 0, margin: int = 0, kind: str = "float32"
) -> Path:
    """A NIfTI file of shape (z, y, x): smooth structures and noise, `margin` voxels of zero around them."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(seed)
    samples = gaussian_filter(random.normal(size=shape), 1.5) * 400 + random.normal(size=shape) * 10 + 40
    if margin:
        inside = np.zeros(shape, bool)
        inside[tuple(slice(margin, size - margin) for size in shape)] = True
        samples[~inside] = 0
    picture = sitk.GetImageFromArray(samples.astype(kind))
    picture.SetSpacing([float(mm) for mm in spacing[::-1]])
    picture.SetOrigin((-3.0, 7.5, 11.0))
    picture.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(picture, str(file))
    return file
