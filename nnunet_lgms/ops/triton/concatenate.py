"""Triton kernels that copy some channels of a channels-last map into some channels of another."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import triton_op, wrap_triton
from nnunet_lgms.ops.memory_format import channels_last, map_memory
from nnunet_lgms.ops.recompute import can_be_made_again
from nnunet_lgms.ops.triton.layout import to_channels_last

TILE = 4096  # elements that a program copies


def concatenate(xs: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, *spatial) -> (B, sum of C_i, *spatial)."""
    if len(xs) == 1:
        return xs[0]
    if not fits(xs):
        return torch.cat(list(xs), dim=1)
    return can_be_made_again(_concatenate(list(xs)), lambda *xs: _concatenate(xs), *xs)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(B, C, *spatial) -> maps of ``sizes`` channels, where :func:`fits` says so."""
    return _split(x, list(sizes))


def fits(xs: Sequence[Tensor]) -> bool:
    """Whether the kernel can copy these maps: channels-last, of one dtype, with offsets of 32 bits."""
    dtype = xs[0].dtype
    return dtype != torch.float64 and all(x.dtype == dtype and channels_last(x) and x.numel() < 2**30 for x in xs)


@triton_op("nnunet_lgms::concatenate", mutates_args=())
def _concatenate(xs: Sequence[Tensor]) -> Tensor:
    sizes = [x.shape[1] for x in xs]
    out = map_memory(xs[0], sum(sizes), xs[0].shape[2:])
    first = 0
    for x, channels in zip(xs, sizes):
        _launch(x, channels, 0, out, sum(sizes), first, channels)
        first += channels
    return out.movedim(-1, 1)


@triton_op("nnunet_lgms::split", mutates_args=())
def _split(x: Tensor, sizes: Sequence[int]) -> typing.List[Tensor]:  # noqa: UP006  torch 2.6 knows this one only
    outs = [map_memory(x, channels, x.shape[2:]) for channels in sizes]
    first = 0
    for out, channels in zip(outs, sizes):
        _launch(x, x.shape[1], first, out, channels, 0, channels)
        first += channels
    return [out.movedim(-1, 1) for out in outs]


def _setup_concatenate(ctx, inputs, output):
    ctx.sizes = [x.shape[1] for x in inputs[0]]


def _setup_split(ctx, inputs, output):
    pass


# Each is the gradient of the other.
_concatenate.register_autograd(
    lambda ctx, grad: _split(to_channels_last(grad), ctx.sizes), setup_context=_setup_concatenate
)
_split.register_autograd(
    lambda ctx, grads: (_concatenate([to_channels_last(grad) for grad in grads]), None), setup_context=_setup_split
)


def _launch(x: Tensor, x_stride: int, x_first: int, out: Tensor, out_stride: int, out_first: int, channels: int):
    voxels = x.numel() // x.shape[1]
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_copy_channels_kernel))[(triton.cdiv(voxels, rows),)](
        x, x_stride, x_first, out, out_stride, out_first, channels, voxels, LANES=lanes, ROWS=rows
    )


# Numbers of channels are arguments, of which the compiler only knows whether they divide by 16: few versions serve all.
@triton.jit(do_not_specialize=["voxels"])
def _copy_channels_kernel(
    x,  # (V, x_stride)
    x_stride,
    x_first,  # channel that is read first
    out,  # (V, out_stride)
    out_stride,
    out_first,  # channel that is written first
    channels,  # that are copied
    voxels,  # of the whole batch, V
    LANES: tl.constexpr,  # channels, rounded up to a power of two
    ROWS: tl.constexpr,  # voxels of a program
):
    channel = tl.arange(0, LANES)[None, :]
    voxel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (voxel < voxels) & (channel < channels)
    value = tl.load(x + voxel * x_stride + x_first + channel, mask=inside)
    tl.store(out + voxel * out_stride + out_first + channel, value, mask=inside)


@triton.jit
def copy_rest(
    source, out, voxel, exists, SOURCE_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, R: tl.constexpr,
    R_LANES: tl.constexpr,
):  # fmt: skip
    """R channels of some voxels, for kernels that write the others of the same map."""
    channel = tl.arange(0, R_LANES)[None, :]
    inside = exists[:, None] & (channel < R)
    value = tl.load(source + voxel[:, None] * SOURCE_STRIDE + channel, mask=inside)
    tl.store(out + voxel[:, None] * OUT_STRIDE + channel, value, mask=inside)
