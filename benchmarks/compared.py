"""The networks that the benchmarks compare, as nnU-Net would build them, and the loss of their steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nnunet_lgms import LGMSNet
from nnunet_lgms.config.planned import MOST_FEATURES

NETWORKS = ("lgmsnet", "plain", "resenc_m")


def build(name: str, dim: int, input_channels: int, classes: int, n_stages: int) -> nn.Module:
    """The network by its name in the tables.

    Args:
        name: "lgmsnet" (the published one, always five levels), "plain" (nnU-Net's PlainConvUNet) or "resenc_m"
            (nnU-Net's ResEnc M).
        dim: 2 or 3.
        input_channels: channels of the image.
        classes: channels of the output.
        n_stages: resolution levels of nnU-Net's networks.
    """
    if name == "lgmsnet":
        return LGMSNet.paper(input_channels, classes, dim=dim)

    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    planned = {
        "input_channels": input_channels,
        "num_classes": classes,
        "n_stages": n_stages,
        "features_per_stage": [min(32 * 2**i, MOST_FEATURES[dim]) for i in range(n_stages)],
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
        network = PlainConvUNet(**planned, n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    else:
        blocks = [1, 3, 4, 6, 6, 6, 6][:n_stages]
        network = ResidualEncoderUNet(**planned, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1)
    network.apply(network.initialize)
    return network


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def loss_function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy; the binary one for a single class."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float())
    return F.cross_entropy(logits, target)
