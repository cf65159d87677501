"""Changes of the memory format on a CPU, whose gradients have the layout of their input: PyTorch's have that of the
result."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from nnunet_lgms.ops.memory_format import CHANNELS_LAST, as_channels_last, channels_last, wants_channels_last


def to_channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous."""
    is_copied = channels_last(x) and not x.is_contiguous()
    return _Copy.apply(x, False) if is_copied and wants_channels_last(x) else x.contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost, and with the strides of that."""
    is_copied = x.is_contiguous() and not x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
    return _Copy.apply(x, True) if is_copied and wants_channels_last(x) else as_channels_last(x)


class _Copy(Function):
    @staticmethod
    def forward(ctx, x: Tensor, to_last: bool) -> Tensor:
        ctx.to_last = to_last
        return x.contiguous(memory_format=CHANNELS_LAST[x.ndim] if to_last else torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return to_channels_first(grad) if ctx.to_last else to_channels_last(grad), None
