"""Linear upsampling by whole factors, cropped to the size of a skip (paper's Up block).

PyTorch's own gradient of trilinear upsampling adds into memory with atomics and walks channels-last maps badly: on an
H100 it takes longer than the convolution behind it. Here both directions gather: an output reads its 2^d neighbours,
an input's gradient reads the (2 * scale)^d outputs that it has reached. On CUDA they are two operators registered with
`torch.library`; everything else, and everything when the environment variable NNUNET_LGMS_KERNELS is `off`, is
`F.interpolate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, channels_last, wants_channels_last

MODE = {2: "bilinear", 3: "trilinear"}


def linear_upsample(x: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """`F.interpolate(scale_factor=scale, align_corners=False)`, then the first `size` voxels of every axis.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W).
        scale: whole factor per axis.
        size: size of the result, at most `scale` times that of x per axis.

    Returns:
        (B, C, *size) in the dtype and memory format of x.
    """
    if kernels_fit_upsample(x, size):
        return _upsample(x, list(scale), list(size))
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


def linear_upsample_transposed(grad: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """Gradient of the input, (B, C, *size), from that of the result of a :func:`linear_upsample` by the kernels."""
    return _transposed(to_channels_last(grad), list(scale), list(size))


@triton_op("nnunet_lgms::linear_upsample", mutates_args=())
def _upsample(x: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    from nnunet_lgms.ops.triton import upsample as upsample_triton

    return upsample_triton.upsample(x, scale, size)


@triton_op("nnunet_lgms::linear_upsample_transposed", mutates_args=())
def _transposed(grad: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """Gradient of the input, (B, C, *size), from that of the output."""
    from nnunet_lgms.ops.triton import upsample as upsample_triton

    return upsample_triton.transposed(grad, scale, size)


def _setup(ctx, inputs, output):
    x, ctx.scale, _ = inputs
    ctx.size = list(x.shape[2:])


def _upsample_backward(ctx, grad):
    return _transposed(to_channels_last(grad), ctx.scale, ctx.size), None, None


def _transposed_backward(ctx, grad):
    return _upsample(to_channels_last(grad), ctx.scale, ctx.size), None, None


# Each operator is the other's transpose, so second derivatives work too.
_upsample.register_autograd(_upsample_backward, setup_context=_setup)
_transposed.register_autograd(_transposed_backward, setup_context=_setup)


def kernels_fit_upsample(x: Tensor, size: Sequence[int]) -> bool:
    """Channels-last float16, bfloat16 or float32, and offsets that fit 32 bits."""
    return (
        use_kernels(x)
        and channels_last(x)
        and x.dtype in (*HALF, torch.float32)
        and x.shape[0] * x.shape[1] * math.prod(size) < 2**31
    )
