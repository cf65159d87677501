"""Small nnU-Net plans, as nnU-Net's planner writes them, for tests that need a plan but no dataset."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


def configuration(
    patch_size: tuple[int, ...],
    n_stages: int,
    settings: dict[str, Any] | None = None,
    spacing: tuple[float, ...] | None = None,
    strides: list | None = None,
    kernel_sizes: list | None = None,
) -> dict[str, Any]:
    """One resolved configuration; strides and kernels isotropic unless given."""
    dim = len(patch_size)
    planned = {
        "patch_size": list(patch_size),
        "batch_size": 2,
        "data_identifier": f"nnUNetPlans_{dim}d",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": list(spacing or (1.0,) * dim),
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n_stages,
                "features_per_stage": [min(32 * 2**i, 320) for i in range(n_stages)],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": kernel_sizes or [[3] * dim for _ in range(n_stages)],
                "strides": strides or [[1] * dim] + [[2] * dim for _ in range(n_stages - 1)],
                "n_conv_per_stage": [2] * n_stages,
                "n_conv_per_stage_decoder": [2] * (n_stages - 1),
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
    }
    if settings is not None:
        planned["lgmsnet"] = settings
    return planned


def manager(*args: Any, **kwargs: Any) -> ConfigurationManager:
    """:func:`configuration` as nnU-Net hands it to a trainer."""
    return ConfigurationManager(configuration(*args, **kwargs))
