"""Linear upsampling by whole factors, cropped to the size of a skip (paper's Up block), and the convolution behind it.

PyTorch's own gradient of trilinear upsampling adds into memory with atomics and walks channels-last maps badly: on an
H100 it takes longer than the convolution behind it. And a convolution keeps its input for the gradient of its weight,
which is the upsampled map, at full resolution one of the largest of a training step: where the kernels run it is made
again instead, from the map below it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.conv import conv_norm_act
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import wants_channels_last
from nnunet_lgms.ops.norm_act import norm_act

MODE = {2: "bilinear", 3: "trilinear"}


@operator
def linear_upsample(x: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """`F.interpolate(scale_factor=scale, align_corners=False)`, then the first `size` voxels of every axis.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W).
        scale: whole factor per axis.
        size: size of the result, at most `scale` times that of x per axis.

    Returns:
        (B, C, *size) in the dtype and memory format of x.
    """
    if use_kernels(x):
        from nnunet_lgms.ops.triton import upsample as kernels

        if kernels.fits(x, size):
            return kernels.linear_upsample(x, list(scale), list(size))
    if wants_channels_last(x):
        x = to_channels_last(x)
    x = F.interpolate(x, scale_factor=[float(s) for s in scale], mode=MODE[len(scale)], align_corners=False)
    return crop(x, size)


@operator
def upsample_conv_norm_act(
    x: Tensor, scale: Sequence[int], size: Sequence[int], conv: _ConvNd, norm: nn.Module, activation: str
) -> Tensor:
    """:func:`linear_upsample` and :func:`nnunet_lgms.ops.conv.conv_norm_act` of its result.

    Args:
        x: (B, C_in, *spatial).
        scale: whole factor per axis.
        size: voxels per axis of the result, at most ``scale`` times those of x.
        conv: convolution of stride 1 with "same" padding.
        norm: norm of its output channels.
        activation: as in :func:`nnunet_lgms.ops.norm_act.norm_act`.

    Returns:
        (B, C_out, *size).
    """
    if use_kernels(x) and torch.is_grad_enabled():
        from nnunet_lgms.ops.triton import upsample as kernels
        from nnunet_lgms.ops.triton.conv import leaves_bias

        if kernels.fits(x, size):
            left = leaves_bias([x], conv, norm, activation)
            out = kernels.upsample_conv(x, scale, size, conv.weight, None if left else conv.bias)
            return norm_act(out, norm, activation, bias=conv.bias if left else None)
    return conv_norm_act(linear_upsample(x, scale, size), conv, norm, activation)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` voxels of every axis; (B, C, *spatial) -> (B, C, *size).

    The gradient of a slice is a padded copy, of another memory format, also where nothing was cut off.
    """
    for axis, length in enumerate(size, start=2):
        if torch.compiler.is_compiling() or x.shape[axis] != length:  # a compiler drops it, but may not know the sizes
            x = x.narrow(axis, 0, length)
    return x
