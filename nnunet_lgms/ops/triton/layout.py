"""Triton kernel of the transposed copy between (B, V, C) and (B, C, V): V voxels, C channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.memory_format import map_memory

TILE = 4096  # elements that a program copies


def channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial) channels-last -> contiguous."""
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    _launch(x, out, x.shape[1], False)
    return out


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial) contiguous -> channels-last."""
    out = map_memory(x, x.shape[1], x.shape[2:])
    _launch(x, out, x.shape[1], True)
    return out.movedim(-1, 1)


def _launch(x: Tensor, out: Tensor, channels: int, to_last: bool) -> None:
    voxels = x.numel() // (x.shape[0] * channels)
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_transpose))[(triton.cdiv(voxels, rows), x.shape[0])](
        x, out, voxels, TO_LAST=to_last, C=channels, LANES=lanes, ROWS=rows
    )


@triton.jit
def _transpose(x, out, voxels, TO_LAST: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
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
