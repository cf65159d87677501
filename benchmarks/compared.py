"""The networks that the benchmarks compare, as nnU-Net would build them, and their training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_lgms import LGMSNet
from nnunet_lgms.config.planned import MOST_FEATURES
from nnunet_lgms.planning.training_step import TrainingStep

NETWORKS = {"lgmsnet": "LGMSNet", "plain": "nnU-Net's U-Net"}  # and what pictures call them


def build(name: str, shape: Sequence[int], classes: int, n_stages: int) -> nn.Module:
    """The network by its name in the tables.

    Args:
        name: "lgmsnet" (the published one, always five levels) or "plain" (nnU-Net's PlainConvUNet).
        shape: of a batch, (B, C, *patch).
        classes: channels of the output.
        n_stages: resolution levels of nnU-Net's network.
    """
    torch.manual_seed(0)
    dim = len(shape) - 2
    if name == "lgmsnet":
        return LGMSNet.paper(shape[1], classes, dim)
    network = PlainConvUNet(
        shape[1],
        n_stages=n_stages,
        features_per_stage=[min(32 * 2**i, MOST_FEATURES[dim]) for i in range(n_stages)],
        conv_op=nn.Conv3d if dim == 3 else nn.Conv2d,
        kernel_sizes=3,
        strides=[1] + [2] * (n_stages - 1),
        n_conv_per_stage=2,
        num_classes=classes,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return network.apply(network.initialize)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def training_step(network: nn.Module, shape: Sequence[int], classes: int, device: torch.device) -> TrainingStep:
    """With random data and labels: cross entropy, the binary one for a single class."""

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if classes == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float())
        return F.cross_entropy(logits, target)

    data = torch.randn(tuple(shape), device=device)
    target = torch.randint(0, max(classes, 2), (shape[0], *shape[2:]), device=device)
    return TrainingStep(network.to(device).train(), loss, data, target)
