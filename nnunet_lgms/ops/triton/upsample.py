"""Triton kernels of linear upsampling: a gather in either direction, no atomics, so gradients repeat bit for bit.

A channels-last map is seen as (B, D, H, W, C); 2D has D = 1. A program computes some voxels with all their channels;
sums are in float32.
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

BLOCK = 1024  # elements of a program


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
    return _launch(_upsample_forward_kernel, x, size, scale)


@triton_op("nnunet_lgms::linear_upsample_backward", mutates_args=())
def _upsample_backward(grad: Tensor, scale: Sequence[int], size: Sequence[int]) -> Tensor:
    """Gradient of the output -> gradient of the input, (B, C, *size), both channels-last."""
    return _launch(_upsample_backward_kernel, grad, size, scale)


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


def _launch(kernel, source: Tensor, size: Sequence[int], scale: Sequence[int]) -> Tensor:
    channels = source.shape[1]
    target = map_memory(source, channels, size)
    planar = (1,) * (5 - source.ndim)
    lanes = triton.next_power_of_2(channels)
    voxels = max(1, BLOCK // lanes)
    grid = (triton.cdiv(math.prod(size), voxels), source.shape[0])
    launch(wrap_triton(kernel))[grid](
        source, target, *planar, *source.shape[2:], *planar, *size, channels, *planar, *scale, voxels, lanes
    )
    return target.movedim(-1, 1)


@triton.jit
def _source(target, scale: tl.constexpr, source_size):
    """PyTorch's align_corners=False: lower source index, upper source index and the upper one's weight."""
    position = tl.maximum((target.to(tl.float32) + 0.5) / scale - 0.5, 0.0)
    lower = tl.minimum(position.to(tl.int32), source_size - 1)
    upper = tl.minimum(lower + 1, source_size - 1)
    return lower, upper, position - lower.to(tl.float32)


@triton.jit
def _upsample_forward_kernel(
    x,  # (B, D, H, W, inner)
    out,  # (B, OD, OH, OW, inner)
    D, H, W, OD, OH, OW,
    inner,  # channels
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, VOXELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    channel = tl.arange(0, INNER)[None, :]
    outer = tl.program_id(1)
    ow, oh, od = voxel % OW, (voxel // OW) % OH, voxel // (OW * OH)
    z0, z1, fz = _source(od, SD, D)
    y0, y1, fy = _source(oh, SH, H)
    x0, x1, fx = _source(ow, SW, W)
    inside = (od < OD)[:, None] & (channel < inner)

    total = tl.zeros((VOXELS, INNER), tl.float32)
    for i in tl.static_range(2 if SD > 1 else 1):
        for j in tl.static_range(2 if SH > 1 else 1):
            for k in tl.static_range(2 if SW > 1 else 1):
                z, wz = (z1, fz) if i else (z0, 1.0 - fz)
                y, wy = (y1, fy) if j else (y0, 1.0 - fy)
                w, ww = (x1, fx) if k else (x0, 1.0 - fx)
                offset = ((outer * D + z) * H + y) * W + w
                value = tl.load(x + offset[:, None] * inner + channel, mask=inside, other=0.0)
                total += value.to(tl.float32) * (wz * wy * ww)[:, None]
    offset = outer * OD * OH * OW + voxel
    tl.store(out + offset[:, None] * inner + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight(target, source, scale: tl.constexpr, source_size, target_size):
    """How much of `source` went into `target`."""
    lower, upper, fraction = _source(target, scale, source_size)
    weight = tl.where(lower == source, 1.0 - fraction, 0.0) + tl.where(upper == source, fraction, 0.0)
    return tl.where((target >= 0) & (target < target_size), weight, 0.0)


@triton.jit
def _upsample_backward_kernel(
    grad,  # (B, OD, OH, OW, inner)
    out,  # (B, D, H, W, inner)
    OD, OH, OW, D, H, W,
    inner,  # channels
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, VOXELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    channel = tl.arange(0, INNER)[None, :]
    outer = tl.program_id(1)
    w, h, d = voxel % W, (voxel // W) % H, voxel // (W * H)
    inside = (d < D)[:, None] & (channel < inner)

    # Outputs that an input reaches along an axis: 2 * scale of them, the first at scale * (i - 1) + (scale + 1) // 2.
    total = tl.zeros((VOXELS, INNER), tl.float32)
    for i in tl.static_range(2 * SD if SD > 1 else 1):
        z = SD * d + i - (SD - (SD + 1) // 2 if SD > 1 else 0)
        wz = _weight(z, d, SD, D, OD)
        for j in tl.static_range(2 * SH if SH > 1 else 1):
            y = SH * h + j - (SH - (SH + 1) // 2 if SH > 1 else 0)
            wzy = wz * _weight(y, h, SH, H, OH)
            for k in tl.static_range(2 * SW if SW > 1 else 1):
                x = SW * w + k - (SW - (SW + 1) // 2 if SW > 1 else 0)
                weight = wzy * _weight(x, w, SW, W, OW)
                offset = ((outer * OD + z) * OH + y) * OW + x
                value = tl.load(
                    grad + offset[:, None] * inner + channel, mask=inside & (weight > 0)[:, None], other=0.0
                )
                total += value.to(tl.float32) * weight[:, None]
    offset = outer * D * H * W + voxel
    tl.store(out + offset[:, None] * inner + channel, total.to(out.dtype.element_ty), mask=inside)
