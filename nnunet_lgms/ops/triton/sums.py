"""Triton kernels of plain sums: of each channel of a map, and of what the programs of a kernel summed each for itself.

PyTorch gives a matrix of some hundred rows to a few programs that go through it one row after the other, which takes
as long as the kernel that wrote it. Sums are in float32 and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.triton.norm_act_kernels import LaunchGrid, channels_first, known_divisor, places

COLUMNS = 16  # of a program: two sectors of memory
ROWS = 256  # that a program adds at once


def sum_of_voxels(x: Tensor) -> Tensor:
    """(B, C, *spatial), contiguous or channels-last -> (C,)."""
    grid = LaunchGrid(x, "batch", 1)
    (partial,) = grid.empty(x, 1, grid.batch * grid.slices)
    launch(wrap_triton(_sum_of_voxels_kernel))[grid.slices_grid](
        x, partial, grid.voxels, grid.steps, FIRST=channels_first(x), **grid.sum_tile
    )
    return sum_of_rows(partial)


def sum_of_rows(x: Tensor) -> Tensor:
    """(rows, *shape) in float32, contiguous -> (*shape)."""
    rows, columns = x.shape[0], x[0].numel()
    out = torch.empty(tuple(x.shape[1:]), dtype=torch.float32, device=x.device)
    launch(wrap_triton(_sum_of_rows_kernel))[(triton.cdiv(columns, COLUMNS),)](
        x, out, rows, columns, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return out


@triton.jit(do_not_specialize=["voxels", "steps"])
def _sum_of_voxels_kernel(
    x,  # (B, C, V) if FIRST, else (B, V, C)
    partial,  # (B, slices, C)
    voxels, steps,  # V, and blocks of ROWS voxels of a program
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of a contiguous x
    C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of a slice of voxels, per channel."""
    voxels = known_divisor(voxels, FIRST)
    channel = tl.arange(0, LANES)
    begin = tl.program_id(0) * steps * ROWS
    x += tl.program_id(1) * voxels * C
    total = tl.zeros((ROWS, LANES), tl.float32)
    for step in tl.range(steps, num_stages=3):
        voxel = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
        total += tl.load(x + places(0, voxel, channel, voxels, C, FIRST), mask=inside, other=0.0).to(tl.float32)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + program * C + channel, tl.sum(total, 0), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "columns"])
def _sum_of_rows_kernel(
    x,  # (rows, columns)
    out,  # (columns,)
    rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of COLUMNS columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, 0), mask=column < columns)
