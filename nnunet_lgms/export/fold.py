"""Batch norms that a pointwise convolution follows, as part of that convolution."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.fusion import FusionBlock


def fold_norms(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation whose Fusion blocks have no norm before their pointwise convolutions.

    There the activation comes before the norm, so that exporters and runtimes cannot fold it into the convolution
    before, as they do elsewhere.
    """
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(block, FusionBlock):
            block.norm1 = _folded(block.norm1, block.expand)
            block.norm2 = _folded(block.norm2, block.squeeze)
    return network


@torch.no_grad()
def _folded(norm: nn.Module, conv: _ConvNd) -> nn.Module:
    """What stays of the norm before a pointwise convolution: nothing of a BatchNorm with running statistics."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return norm
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    weight = conv.weight.double()
    conv.bias += weight.flatten(1) @ shift
    conv.weight.copy_(weight * scale.view(1, -1, *(1,) * (weight.ndim - 2)))
    return nn.Identity()
