"""Linear upsampling by whole factors, cropped to the size of a skip (paper's Up block).

PyTorch's own gradient of trilinear upsampling adds into memory with atomics and walks channels-last maps badly: on an
H100 it takes longer than the convolution behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import wants_channels_last

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


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first ``size`` voxels of every axis; (B, C, *spatial) -> (B, C, *size).

    The gradient of a slice is a padded copy, of another memory format, also where nothing was cut off.
    """
    for axis, length in enumerate(size, start=2):
        if torch.compiler.is_compiling() or x.shape[axis] != length:  # a compiler drops it, but may not know the sizes
            x = x.narrow(axis, 0, length)
    return x
