"""Between the two memory formats: channels innermost for dense convolutions and norms, x innermost for depthwise ones.

It is a transposed copy, at the speed of memory; the loops that Inductor writes for it take five times as long on an
H100.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, as_channels_last, channels_last, wants_channels_last


@operator
def to_channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous."""
    if x.is_contiguous():
        return x
    if use_kernels(x):
        from nnunet_lgms.ops.triton import layout as kernels

        return kernels.to_channels_first(x)
    return _Copy.apply(x, False) if wants_channels_last(x) and channels_last(x) else x.contiguous()


@operator
def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost, and with the strides of that."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import layout as kernels

        return kernels.to_channels_last(x)
    is_copied = x.is_contiguous() and not x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
    return _Copy.apply(x, True) if is_copied and wants_channels_last(x) else as_channels_last(x)


def to_fastest_layout(x: Tensor) -> Tensor:
    """x (B, C, *spatial) in the memory format in which a network runs fastest on its device.

    Tensor cores want channels innermost; any other layout costs two transposes around every convolution. On the CPU,
    the loops of pooling, upsampling and norms want it too.
    """
    return to_channels_last(x) if use_kernels(x) or wants_channels_last(x) else x


class _Copy(Function):
    """`Tensor.contiguous` for the CPU, with a gradient in the layout of x: PyTorch's has that of the result."""

    @staticmethod
    def forward(ctx, x, channels_last):
        ctx.channels_last = channels_last
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim] if channels_last else torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return to_channels_first(grad) if ctx.channels_last else to_channels_last(grad), None
