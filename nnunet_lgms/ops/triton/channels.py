"""Triton kernels that copy some channels of a channels-last map into some channels of another."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.memory_format import map_memory

TILE = 4096  # elements that a program copies


def join(xs: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, *spatial) -> (B, sum of C_i, *spatial)."""
    sizes = [x.shape[1] for x in xs]
    out = map_memory(xs[0], sum(sizes), xs[0].shape[2:])
    first = 0
    for x, channels in zip(xs, sizes):
        _launch(x, channels, 0, out, sum(sizes), first, channels)
        first += channels
    return out.movedim(-1, 1)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(B, C, *spatial) -> maps of ``sizes`` channels."""
    outs = [map_memory(x, channels, x.shape[2:]) for channels in sizes]
    first = 0
    for out, channels in zip(outs, sizes):
        _launch(x, x.shape[1], first, out, channels, 0, channels)
        first += channels
    return [out.movedim(-1, 1) for out in outs]


def _launch(x: Tensor, x_stride: int, x_first: int, out: Tensor, out_stride: int, out_first: int, channels: int):
    voxels = x.numel() // x.shape[1]
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_copy_channels))[(triton.cdiv(voxels, rows),)](
        x, x_stride, x_first, out, out_stride, out_first, channels, voxels, LANES=lanes, ROWS=rows
    )


# Numbers of channels are arguments, of which the compiler only knows whether they divide by 16: few versions serve all.
@triton.jit(do_not_specialize=["voxels"])
def _copy_channels(
    x, x_stride, x_first, out, out_stride, out_first, channels, voxels, LANES: tl.constexpr, ROWS: tl.constexpr
):
    channel = tl.arange(0, LANES)[None, :]
    voxel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (voxel < voxels) & (channel < channels)
    value = tl.load(x + voxel * x_stride + x_first + channel, mask=inside)
    tl.store(out + voxel * out_stride + out_first + channel, value, mask=inside)


@triton.jit
def copy_beside(
    source, out, voxel, exists, SOURCE_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, R: tl.constexpr,
    R_LANES: tl.constexpr,
):  # fmt: skip
    """R channels of some voxels, for kernels that write the others of the same map."""
    channel = tl.arange(0, R_LANES)[None, :]
    inside = exists[:, None] & (channel < R)
    value = tl.load(source + voxel[:, None] * SOURCE_STRIDE + channel, mask=inside)
    tl.store(out + voxel[:, None] * OUT_STRIDE + channel, value, mask=inside)
