"""Dense convolutions on a CPU.

oneDNN, behind `F.conv2d` and `F.conv3d`, works on channels-last maps as they are, and first copies any other map to a
layout of 16 channels side by side. Where a layer has more weights than its map has numbers, it is the other way round:
those are copied, unless the map is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.cpu.layout import to_channels_first, to_channels_last
from nnunet_lgms.ops.memory_format import channels_last, wants_channels_last

CONV = {2: F.conv2d, 3: F.conv3d}
BLOCK = 16  # channels that fill a register; groups of more are as fast side by side


def same_conv(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Stride-1 convolution with zero padding that keeps the size.

    Args:
        xs: one map (B, C_in, *spatial), or for each group a map of C_in / groups channels.
        weight: (C_out, C_in / groups, *k), odd k.
        bias: (C_out,) or None.
        groups: groups of channels that are convolved apart.

    Returns:
        (B, C_out, *spatial); of channels-last maps contiguous if their size is less than that of the weight.
    """
    if len(xs) == groups > 1 and wants_channels_last(xs[0]) and weight.shape[1] <= BLOCK:
        biases = [None] * groups if bias is None else bias.chunk(groups)
        parts = zip(xs, weight.chunk(groups), biases, strict=True)
        return torch.cat([same_conv([x], w, b, 1) for x, w, b in parts], 1)
    x = xs[0] if len(xs) == 1 else torch.cat(list(xs), 1)
    padding = [k // 2 for k in weight.shape[2:]]
    if not (wants_channels_last(x) and (channels_last(x) or x.shape[1] == 1)):
        return CONV[x.ndim - 2](x, weight, bias, padding=padding, groups=groups)
    if groups == 1 and not any(padding):
        return _pointwise(x, weight, bias)
    if weight.numel() > 2 * x.numel():
        x = to_channels_first(x)
    else:
        x = to_channels_last(x)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return CONV[x.ndim - 2](x, weight, bias, padding=padding, groups=groups)
    # PyTorch would take loops of its own for a single sample that it holds to be small: 12^3 of 128 channels.
    one = [1] * len(padding)
    return torch.mkldnn_convolution(x, weight, bias, padding, one, one, groups)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution as a matrix product; as a convolution, those of 3D maps take ten times as long."""
    out = F.linear(x.movedim(1, -1).flatten(0, -2), weight.flatten(1), bias)
    return out.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)
