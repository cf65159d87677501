"""Joining and splitting maps by their channels.

A copy of runs of channels, at the speed of memory. The loops that Inductor writes for it in channels-last maps take
four times as long on an H100, and a slice that is not copied is copied by cuDNN. On CUDA these are two operators
registered with `torch.library`, each the gradient of the other; everything else, and everything when the environment
variable NNUNET_LGMS_KERNELS is `off`, is `torch.cat` and `Tensor.split`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last


def join_channels(xs: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, *spatial) -> (B, sum of C_i, *spatial)."""
    if len(xs) == 1:
        return xs[0]
    if all(map(_fits_kernels, xs)) and len({x.dtype for x in xs}) == 1:
        return _join(list(xs))
    return torch.cat(list(xs), dim=1)


def split_channels(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(B, C, *spatial) -> maps of ``sizes`` channels, contiguous in the memory format of x."""
    if _fits_kernels(x) and min(sizes) > 0:
        return _split(x, list(sizes))
    memory_format = CHANNELS_LAST[x.ndim] if channels_last(x) else torch.contiguous_format
    return [part.contiguous(memory_format=memory_format) for part in x.split(list(sizes), dim=1)]


def _fits_kernels(x: Tensor) -> bool:
    return use_kernels(x) and channels_last(x) and x.numel() < 2**30 and x.dtype != torch.float64


@triton_op("nnunet_lgms::join_channels", mutates_args=())
def _join(xs: list[Tensor]) -> Tensor:
    from nnunet_lgms.ops.triton import channels as channels_triton

    return channels_triton.join(xs)


@triton_op("nnunet_lgms::split_channels", mutates_args=())
def _split(x: Tensor, sizes: list[int]) -> list[Tensor]:
    from nnunet_lgms.ops.triton import channels as channels_triton

    return channels_triton.split(x, sizes)


def _setup_join(ctx, inputs, output):
    ctx.sizes = [x.shape[1] for x in inputs[0]]


def _setup_split(ctx, inputs, output):
    pass


_join.register_autograd(lambda ctx, grad: _split(to_channels_last(grad), ctx.sizes), setup_context=_setup_join)
_split.register_autograd(
    lambda ctx, grads: (_join([to_channels_last(grad) for grad in grads]), None), setup_context=_setup_split
)
