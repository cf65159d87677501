"""Dense "same" convolution, and the norm and activation behind it.

At full resolution LGMSNet has 4 to 64 channels where cuDNN's kernels are made for hundreds: on an H100 its input
gradients there take up to six times as long as a product that reads every voxel once (4 to 16 channels, 128^3), and
grouped convolutions twice as long as dense ones. Channels-last maps of that kind go to a kernel on a GPU, other maps to
the libraries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.concatenate import concatenate
from nnunet_lgms.ops.cpu import conv as cpu
from nnunet_lgms.ops.norm_act import norm_act

CONV = {2: F.conv2d, 3: F.conv3d}


@operator
def same_conv(x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Stride-1 convolution with zero padding that keeps the size.

    Args:
        x: (B, C_in, H, W) or (B, C_in, D, H, W); or one such map for each group, of C_in / groups channels.
        weight: (C_out, C_in / groups, *k), odd k.
        bias: (C_out,) or None.
        groups: groups of channels that are convolved apart.

    Returns:
        (B, C_out, *spatial) in the dtype of x, or of autocast where that is on.
    """
    xs = _maps(x)
    if use_kernels(xs[0]):
        from nnunet_lgms.ops.triton import conv as kernels

        return kernels.same_conv(xs, weight, bias, groups)
    if xs[0].device.type == "cpu":
        return cpu.same_conv(xs, weight, bias, groups)
    padding = [k // 2 for k in weight.shape[2:]]
    return CONV[xs[0].ndim - 2](concatenate(xs), weight, bias, padding=padding, groups=groups)


@operator
def conv_norm_act(
    x: Tensor | Sequence[Tensor], conv: _ConvNd, norm: nn.Module, activation: str, residual: Tensor | None = None
) -> Tensor:
    """:func:`same_conv`, and :func:`nnunet_lgms.ops.norm_act.norm_act` of its result.

    Args:
        x: (B, C_in, *spatial), or one such map for each group of the convolution.
        conv: stride 1, "same" padding.
        norm: norm of its output channels.
        activation: as in ``norm_act``.
        residual: added last, (B, C_out, *spatial).

    Returns:
        (B, C_out, *spatial).
    """
    xs = _maps(x)
    if use_kernels(xs[0]):
        from nnunet_lgms.ops.triton import conv as kernels

        if kernels.fits_epilogue(xs, conv, norm):
            return kernels.conv_norm_act(xs[0], conv, norm, activation, residual)
        if kernels.leaves_bias(xs, conv, norm, activation):
            out = same_conv(xs, conv.weight, None, conv.groups)
            return norm_act(out, norm, activation, residual, conv.bias)
    return norm_act(same_conv(xs, conv.weight, conv.bias, conv.groups), norm, activation, residual)


def logits(x: Tensor, head: _ConvNd) -> Tensor:
    """A segmentation head, which is a 1x1 convolution: (B, C, *spatial) -> (B, num_classes, *spatial)."""
    return same_conv(x, head.weight, head.bias)


def _maps(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)
