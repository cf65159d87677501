"""Triton kernel of the transposed copy between (B, V, C) and (B, C, V): V voxels, C channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import triton_op, wrap_triton
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, as_channels_last, channels_last, map_memory
from nnunet_lgms.ops.recompute import can_be_made_again

TILE = 4096  # elements that a program copies


def to_channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous."""
    if not x.is_contiguous() and channels_last(x) and _fits(x):
        return can_be_made_again(_channels_first(x), _channels_first, x)
    return x.contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]) and _fits(x):
        return can_be_made_again(_channels_last(x), _channels_last, x)
    return as_channels_last(x)


def _fits(x: Tensor) -> bool:
    return 0 < x.numel() < 2**31 and x.dtype != torch.float64


@triton_op("nnunet_lgms::channels_first", mutates_args=())
def _channels_first(x: Tensor) -> Tensor:
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    _launch(x, out, x.shape[1], False)
    return out


@triton_op("nnunet_lgms::channels_last", mutates_args=())
def _channels_last(x: Tensor) -> Tensor:
    out = map_memory(x, x.shape[1], x.shape[2:])
    _launch(x, out, x.shape[1], True)
    return out.movedim(-1, 1)


# The gradient of a copy is a copy: into the layout that the input had.
_channels_first.register_autograd(lambda ctx, grad: to_channels_last(grad))
_channels_last.register_autograd(lambda ctx, grad: to_channels_first(grad))


def _launch(x: Tensor, out: Tensor, channels: int, to_last: bool) -> None:
    voxels = x.numel() // (x.shape[0] * channels)
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_transpose_kernel))[(triton.cdiv(voxels, rows), x.shape[0])](
        x, out, voxels, TO_LAST=to_last, C=channels, LANES=lanes, ROWS=rows
    )


@triton.jit
def _transpose_kernel(
    x,  # (B, C, V) if TO_LAST, else (B, V, C)
    out,  # the other
    voxels,
    TO_LAST: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,  # C, rounded up to a power of two
    ROWS: tl.constexpr,  # voxels of a program
):
    channel = tl.arange(0, LANES)[None, :]
    voxel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    sample = tl.program_id(1)
    inside = (voxel < voxels) & (channel < C)
    last = (sample * voxels + voxel) * C + channel
    first = (sample * C + channel) * voxels + voxel
    if TO_LAST:
        tl.store(out + last, tl.load(x + first, mask=inside), mask=inside)
    else:
        tl.store(out + first, tl.load(x + last, mask=inside), mask=inside)
