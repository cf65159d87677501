"""Between the two memory formats: channels innermost for dense convolutions and norms, x innermost for depthwise ones.

A transposed copy, at the speed of memory; the loops that Inductor writes for it take five times as long on an H100. On
CUDA these are two operators registered with `torch.library`; everything else, and everything when the environment
variable NNUNET_LGMS_KERNELS is `off`, is `Tensor.contiguous`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last, wants_channels_last


def to_channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous."""
    if x.is_contiguous():
        return x
    if _fits_kernels(x) and channels_last(x):
        return _channels_first(x)
    return _Copy.apply(x, False) if wants_channels_last(x) and channels_last(x) else x.contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost, and with the strides of that."""
    memory_format = CHANNELS_LAST[x.ndim]
    if x.shape[1] == 1 and x.is_contiguous():  # in either format; but convolutions go by the strides
        return x.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    if x.is_contiguous(memory_format=memory_format):
        return x
    if x.is_contiguous():
        if _fits_kernels(x):
            return _channels_last(x)
        if wants_channels_last(x):
            return _Copy.apply(x, True)
    return x.contiguous(memory_format=memory_format)


class _Copy(Function):
    """`Tensor.contiguous` for the CPU, with a gradient in the layout of x: PyTorch's has that of the result."""

    @staticmethod
    def forward(ctx, x, channels_last):
        ctx.channels_last = channels_last
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim] if channels_last else torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return to_channels_first(grad) if ctx.channels_last else to_channels_last(grad), None


def _fits_kernels(x: Tensor) -> bool:
    return use_kernels(x) and 0 < x.numel() < 2**31 and x.dtype != torch.float64


@triton_op("nnunet_lgms::channels_first", mutates_args=())
def _channels_first(x: Tensor) -> Tensor:
    from nnunet_lgms.ops.triton import layout as layout_triton

    return layout_triton.channels_first(x)


@triton_op("nnunet_lgms::channels_last", mutates_args=())
def _channels_last(x: Tensor) -> Tensor:
    from nnunet_lgms.ops.triton import layout as layout_triton

    return layout_triton.channels_last(x)


# The gradient of a copy is a copy: into the layout that the input had.
_channels_first.register_autograd(lambda ctx, grad: to_channels_last(grad))
_channels_last.register_autograd(lambda ctx, grad: to_channels_first(grad))
