"""Triton kernels of linear upsampling: a gather in either direction, no atomics, so gradients repeat bit for bit.

A channels-last map is seen as (B, D, H, W, C). A thread has some channels of one place in a plane (H, W) of the result
and walks along D: what a coarse plane gives there, or gets, serves the fine planes on both of its sides. Sums are in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import triton_op, wrap_triton
from nnunet_lgms.ops.memory_format import HALF, channels_last, map_memory
from nnunet_lgms.ops.recompute import can_be_made_again
from nnunet_lgms.ops.triton.layout import to_channels_last

ROWS = 128  # threads of a program, each with
LANES = 8  # channels: 16 bytes of half precision
PLANES = 8  # coarse planes that a program walks through, or fewer, so that there are
PROGRAMS = 1024  # programs


def fits(x: Tensor, size: Sequence[int]) -> bool:
    """Whether the kernels serve x: channels-last float16, bfloat16 or float32, and offsets that fit 32 bits."""
    numbers = x.shape[0] * x.shape[1] * math.prod(size)
    return channels_last(x) and x.dtype in (*HALF, torch.float32) and numbers < 2**31


def linear_upsample(x: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """(B, C, *spatial) channels-last -> (B, C, *size) channels-last, where :func:`fits` says so."""
    return can_be_made_again(_upsample(x, scale, size), _upsample, x, scale, size)


@triton_op("nnunet_lgms::linear_upsample", mutates_args=())
def _upsample(x: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """(B, C, *spatial) channels-last -> (B, C, *size) channels-last."""
    return _launch(_upsample_forward_kernel, x, size, x.shape[2:], size, scale)


@triton_op("nnunet_lgms::linear_upsample_backward", mutates_args=())
def _upsample_backward(grad: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """Gradient of the output -> gradient of the input, (B, C, *size), both channels-last."""
    return _launch(_upsample_backward_kernel, grad, size, size, grad.shape[2:], scale)


def _setup(ctx, inputs, output):
    x, ctx.scale, _ = inputs
    ctx.size = list(x.shape[2:])


# Each operator is the other's transpose, so second derivatives work too.
_upsample.register_autograd(
    lambda ctx, grad: (_upsample_backward(to_channels_last(grad), ctx.scale, ctx.size), None, None),
    setup_context=_setup,
)
_upsample_backward.register_autograd(
    lambda ctx, grad: (_upsample(to_channels_last(grad), ctx.scale, ctx.size), None, None),
    setup_context=_setup,
)


def _launch(
    kernel, source: Tensor, size: Sequence[int], coarse: Sequence[int], fine: Sequence[int], scale: Sequence[int]
) -> Tensor:
    """The map of `size` that `kernel` makes of `source`; one is `coarse`, the other `fine`."""
    batch, channels = source.shape[:2]
    target = map_memory(source, channels, size)
    size, coarse, fine, scale = ([1] * (5 - source.ndim) + list(n) for n in (size, coarse, fine, scale))
    if scale[0] == 1 and coarse[0] == fine[0]:  # every plane is a sample, in which the walk is along H
        batch *= size[0]
        size, coarse, fine, scale = ([h, 1, w] for _, h, w in (size, coarse, fine, scale))
    lanes = math.gcd(channels, LANES)
    groups = channels // lanes
    programs = triton.cdiv(size[1] * size[2] * groups, ROWS)
    planes = max(1, min(PLANES, programs * batch * coarse[0] // PROGRAMS))
    grid = (programs, triton.cdiv(coarse[0], planes), batch)
    launch(wrap_triton(kernel))[grid](source, target, *coarse, *fine, groups, planes, *scale, ROWS, lanes)
    return target.movedim(-1, 1)


@triton.jit
def _places(H, W, groups, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Rows and columns (ROWS) of a plane, whether they lie in it (ROWS, 1), and channels (ROWS, LANES)."""
    thread = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = thread // groups
    channel = (thread % groups * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    row = place // W
    return row, place % W, (row < H)[:, None], channel


@triton.jit
def _source(target, scale: tl.constexpr, source_size):
    """PyTorch's align_corners=False: lower source index, upper source index and the upper one's weight."""
    position = tl.maximum((target.to(tl.float32) + 0.5) / scale - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), source_size - 1)
    upper = tl.minimum(lower + 1, source_size - 1)
    return lower, upper, position - lower.to(tl.float32)


@triton.jit
def _interpolate(plane, y, x, channel, H, W, inner, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr):
    """Values of a coarse plane (H, W, inner) at fine places, over 2 * SD."""
    y0, y1, fy = _source(y, SH, H)
    x0, x1, fx = _source(x, SW, W)
    total = tl.zeros(channel.shape, tl.float32)
    for j in tl.static_range(2 if SH > 1 else 1):
        for k in tl.static_range(2 if SW > 1 else 1):
            row, wy = (y1, fy) if j else (y0, 1.0 - fy)
            column, wx = (x1, fx) if k else (x0, 1.0 - fx)
            value = tl.load(plane + (row * W + column)[:, None] * inner + channel)
            total += value.to(tl.float32) * (wy * wx / (2 * SD))[:, None]
    return total


@triton.jit(do_not_specialize=["D", "H", "W", "OD", "OH", "OW", "groups", "planes"])
def _upsample_forward_kernel(
    x,  # (B, D, H, W, inner)
    out,  # (B, OD, OH, OW, inner)
    D, H, W, OD, OH, OW,
    groups,  # of LANES channels each: inner
    planes,  # coarse ones of a program
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    inner = groups * LANES
    oh, ow, inside, channel = _places(OH, OW, groups, ROWS, LANES)
    offset = (oh * OW + ow)[:, None] * inner + channel
    first, sample = tl.program_id(1) * planes, tl.program_id(2)
    x += sample * D * H * W * inner
    lower = _interpolate(x + first * H * W * inner, oh, ow, channel, H, W, inner, SD, SH, SW)
    for z in range(tl.where(first == 0, -1, first), tl.minimum(first + planes, D)):
        above = x + tl.minimum(z + 1, D - 1) * H * W * inner
        upper = _interpolate(above, oh, ow, channel, H, W, inner, SD, SH, SW)
        for step in tl.static_range(SD):  # fine planes from the middle of coarse plane z to that of the next one
            od, part = SD * z + SD // 2 + step, 2 * step + 1 - SD % 2
            value = lower * (2 * SD - part) + upper * part
            there = inside & (od >= 0) & (od < OD)
            plane = out + (sample * OD + od) * OH * OW * inner
            tl.store(plane + offset, value.to(out.dtype.element_ty), mask=there)
        lower = upper


@triton.jit
def _weight(target, source, scale: tl.constexpr, source_size, target_size):
    """How much of `source` went into `target`."""
    lower, upper, fraction = _source(target, scale, source_size)
    weight = tl.where(lower == source, 1.0 - fraction, 0.0) + tl.where(upper == source, fraction, 0.0)
    return tl.where((target >= 0) & (target < target_size), weight, 0.0)


@triton.jit
def _gather(plane, y, x, channel, H, W, OH, OW, inner, SH: tl.constexpr, SW: tl.constexpr):
    """What coarse places get of a fine plane (OH, OW, inner): the transpose of `_interpolate`."""
    total = tl.zeros(channel.shape, tl.float32)
    # Of an axis they reach 2 * scale places, or one less; the first is scale * (i - 1) + (scale + 1) // 2.
    for j in tl.static_range(2 * SH - SH % 2):
        row = SH * (y - 1) + (SH + 1) // 2 + j
        wy = _weight(row, y, SH, H, OH)
        for k in tl.static_range(2 * SW - SW % 2):
            column = SW * (x - 1) + (SW + 1) // 2 + k
            weight = wy * _weight(column, x, SW, W, OW)
            place = tl.minimum(tl.maximum(row, 0), OH - 1) * OW + tl.minimum(tl.maximum(column, 0), OW - 1)
            value = tl.load(plane + place[:, None] * inner + channel)
            total += value.to(tl.float32) * weight[:, None]
    return total


@triton.jit(do_not_specialize=["D", "H", "W", "OD", "OH", "OW", "groups", "planes"])
def _upsample_backward_kernel(
    grad,  # (B, OD, OH, OW, inner)
    out,  # (B, D, H, W, inner)
    D, H, W, OD, OH, OW,
    groups,  # of LANES channels each: inner
    planes,  # coarse ones of a program
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    inner = groups * LANES
    h, w, inside, channel = _places(H, W, groups, ROWS, LANES)
    first, sample = tl.program_id(1) * planes, tl.program_id(2)
    upper = tl.zeros(channel.shape, tl.float32)  # what plane z + 1 gets of those below
    for z in range(first - 1, tl.minimum(first + planes, D)):
        total, upper = upper, tl.zeros(channel.shape, tl.float32)
        start = SD * z + SD // 2  # the fine planes as in the forward pass
        for od in range(tl.maximum(start, 0), tl.minimum(start + SD, OD)):
            plane = grad + (sample * OD + od) * OH * OW * inner
            value = _gather(plane, h, w, channel, H, W, OH, OW, inner, SH, SW)
            fraction = (od + 0.5) / SD - 0.5 - z
            total += value * tl.where(z == D - 1, 1.0, 1.0 - fraction)
            upper += value * tl.where(z < 0, 1.0, fraction)
        offset = ((sample * D + z) * H * W + h * W + w)[:, None] * inner + channel
        tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside & (z >= first))
