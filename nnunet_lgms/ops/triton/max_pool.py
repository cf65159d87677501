"""Triton kernels of max pooling over channels-last maps, seen as (B, D, H, W, C); 2D has D = 1.

A program computes some windows with all their channels. Windows do not overlap, so the gradient needs no stored
indices: it finds the maximum again. As in PyTorch, NaN is the largest value and of equal values
the first one, in row-major order, takes the gradient.
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
from nnunet_lgms.ops.triton.layout import to_channels_last

TILE = 1024  # elements of the result that a program holds


def fits(x: Tensor) -> bool:
    """Whether the kernels serve x: channels-last, half precision or float32, offsets of 32 bits."""
    return channels_last(x) and x.dtype in (*HALF, torch.float32) and x.numel() < 2**31


@triton_op("nnunet_lgms::max_pool", mutates_args=())
def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, C, *spatial) channels-last -> (B, C, *ceil(spatial / stride)) channels-last."""
    size = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
    out = map_memory(x, x.shape[1], size)
    grid, arguments = _launch(x, size, stride)
    launch(wrap_triton(_max_pool_forward_kernel))[grid](x, out, **arguments)
    return out.movedim(-1, 1)


@triton_op("nnunet_lgms::max_pool_backward", mutates_args=())
def _max_pool_backward(grad: Tensor, x: Tensor, stride: Sequence[int]) -> Tensor:
    """Gradient of the result -> gradient of x, all channels-last."""
    out = map_memory(x, x.shape[1], x.shape[2:])
    grid, arguments = _launch(x, grad.shape[2:], stride)
    launch(wrap_triton(_max_pool_backward_kernel))[grid](x, grad, out, **arguments)
    return out.movedim(-1, 1)


def _setup(ctx, inputs, output):
    x, ctx.stride = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return _max_pool_backward(to_channels_last(grad), x, ctx.stride), None


max_pool.register_autograd(_backward, setup_context=_setup)


def _launch(x: Tensor, pooled_size: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int], dict[str, int]]:
    planar = x.ndim == 4
    depth, height, width = ((1,) if planar else ()) + tuple(x.shape[2:])
    _, pooled_height, pooled_width = ((1,) if planar else ()) + tuple(pooled_size)
    sz, sy, sx = ((1,) if planar else ()) + tuple(stride)
    channels = x.shape[1]
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    windows = x.shape[0] * math.prod(pooled_size)
    arguments = {
        "windows": windows,
        "D": depth,
        "H": height,
        "W": width,
        "PH": pooled_height,
        "PW": pooled_width,
        "C": channels,
        "SZ": sz,
        "SY": sy,
        "SX": sx,
        "LANES": lanes,
        "ROWS": rows,
    }
    return (triton.cdiv(windows, rows),), arguments


@triton.jit
def _window(x, window, windows, tap, D, H, W, PH, PW, C: tl.constexpr,
            SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Values of one tap of every window, their offsets, and which of them lie inside the map."""
    PD = (D + SZ - 1) // SZ
    channel = tl.arange(0, LANES)
    plane = window // (PH * PW)
    z = plane % PD * SZ + tap // (SY * SX)
    y = (window // PW) % PH * SY + (tap // SX) % SY
    column = window % PW * SX + tap % SX
    inside = ((window < windows) & (z < D) & (y < H) & (column < W))[:, None] & (channel < C)[None, :]
    voxel = ((plane // PD * D + z) * H + y) * W + column
    offset = voxel[:, None] * C + channel[None, :]
    return tl.load(x + offset, mask=inside, other=float("-inf")).to(tl.float32), offset, inside


@triton.jit
def _max_pool_forward_kernel(
    x,  # (B, D, H, W, C)
    out,  # (B, PD, PH, PW, C)
    windows,  # B * PD * PH * PW
    D, H, W, PH, PW, C: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best, _, _ = _window(x, window, windows, 0, D, H, W, PH, PW, C, SZ, SY, SX, LANES)
    for tap in tl.static_range(1, SZ * SY * SX):
        value, _, _ = _window(x, window, windows, tap, D, H, W, PH, PW, C, SZ, SY, SX, LANES)
        best = tl.where((value > best) | (value != value), value, best)
    channel = tl.arange(0, LANES)
    inside = (window < windows)[:, None] & (channel < C)[None, :]
    tl.store(out + window[:, None] * C + channel[None, :], best.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _max_pool_backward_kernel(
    x,  # (B, D, H, W, C)
    grad,  # (B, PD, PH, PW, C), of the result
    out,  # (B, D, H, W, C), gradient of x
    windows,  # B * PD * PH * PW
    D, H, W, PH, PW, C: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best, _, _ = _window(x, window, windows, 0, D, H, W, PH, PW, C, SZ, SY, SX, LANES)
    winner = tl.zeros((ROWS, LANES), tl.int32)
    for tap in tl.static_range(1, SZ * SY * SX):
        value, _, _ = _window(x, window, windows, tap, D, H, W, PH, PW, C, SZ, SY, SX, LANES)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        winner = tl.where(better, tap, winner)
    channel = tl.arange(0, LANES)
    inside = (window < windows)[:, None] & (channel < C)[None, :]
    g = tl.load(grad + window[:, None] * C + channel[None, :], mask=inside, other=0.0)
    for tap in tl.static_range(SZ * SY * SX):
        _, offset, in_map = _window(x, window, windows, tap, D, H, W, PH, PW, C, SZ, SY, SX, LANES)
        tl.store(out + offset, tl.where(winner == tap, g, 0.0).to(out.dtype.element_ty), mask=in_map)
