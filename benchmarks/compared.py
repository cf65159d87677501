"""The networks that the benchmarks compare, as nnU-Net would build them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

NETWORKS = ("lgmsnet", "plain", "resenc_m", "mednext_s")
FEATURES = {2: 512, 3: 320}  # nnU-Net's widest level


def build(name: str, dim: int, input_channels: int, classes: int, n_stages: int) -> nn.Module:
    """The network by its name in the tables.

    Args:
        name: "lgmsnet" (the published one, always five levels), "plain" (PlainConvUNet), "resenc_m" (nnU-Net's), or
            "mednext_s" (five levels, see `mednext.py`).
        dim: 2 or 3.
        input_channels: channels of the image.
        classes: channels of the output.
        n_stages: resolution levels of nnU-Net's networks.

    Raises:
        ValueError: there is no such network.
    """
    if name == "lgmsnet":
        from nnunet_lgms import LGMSNet

        return LGMSNet.paper(input_channels, classes, dim=dim)

    if name == "mednext_s":
        from mednext import MedNeXtS

        return MedNeXtS(dim, input_channels, classes)

    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    shared = {
        "input_channels": input_channels,
        "num_classes": classes,
        "n_stages": n_stages,
        "features_per_stage": [min(32 * 2**i, FEATURES[dim]) for i in range(n_stages)],
        "conv_op": nn.Conv3d if dim == 3 else nn.Conv2d,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    if name == "plain":
        network = PlainConvUNet(**shared, n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    elif name == "resenc_m":
        blocks = [1, 3, 4, 6, 6, 6, 6][:n_stages]
        network = ResidualEncoderUNet(**shared, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1)
    else:
        raise ValueError(f"There is no network {name!r} in the benchmarks: choose one of {', '.join(NETWORKS)}.")
    network.apply(network.initialize)
    return network


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def loss_function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy; the binary one for a single class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float())
    return F.cross_entropy(logits, target)
