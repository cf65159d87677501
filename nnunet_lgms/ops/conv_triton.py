"""Triton kernels of the narrow dense convolution: an implicit matrix product over channels-last maps.

A map is (B, D, H, W, C) in memory; 2D has D = 1. The kx taps of a row times the channels of a voxel lie side by side in
memory, so one (kz, ky) asks for one contiguous window of kx * C_in numbers per voxel: a program multiplies windows of
BLOCK voxels, (BLOCK, kx * C_in), with weights, (kx * C_in, C_out), and sums over (kz, ky) in float32. The weight
gradient is the transposed product, windows^T x output gradient, of many blocks of voxels; its partial sums go to a
workspace and are added in a fixed order, so gradients repeat bit for bit. Groups of channels are an axis of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.backend import CHANNELS_LAST

MAX_PACKED = 128  # longest window that is multiplied at once
BLOCK = 128  # voxels of a program, or of one of its steps
WARPS = 4
STAGES = 3
CORRELATE_PROGRAMS = 8  # per multiprocessor


def _volume(size: Sequence[int]) -> tuple[int, int, int]:
    return (1,) * (3 - len(size)) + tuple(size)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, groups * C_in, *spatial) channels-last, weight (groups, *k, C_in, C_out) -> (B, groups * C_out, "
    "*spatial)."""
    groups, *kernel, c_in, c_out = weight.shape
    depth, height, width = _volume(x.shape[2:])
    kernel = _volume(kernel)
    packed = kernel[2] if kernel[2] * c_in <= MAX_PACKED else 1
    shape = (x.shape[0], groups * c_out, *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST[x.ndim])
    voxels = x.numel() // x.shape[1]
    block = BLOCK
    _convolve[(triton.cdiv(voxels, block), groups)](
        x, weight, out, voxels, depth, height, width, groups, c_in, c_out, *kernel, packed,
        max(16, triton.next_power_of_2(packed * c_in)), max(16, triton.next_power_of_2(c_out)), block, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def correlate(x: Tensor, grad: Tensor, kernel: Sequence[int], groups: int) -> Tensor:
    """x and grad (B, groups * C, *spatial), both channels-last -> (groups, *k, C_in, C_out) in float32."""
    c_in, c_out = x.shape[1] // groups, grad.shape[1] // groups
    depth, height, width = _volume(x.shape[2:])
    kz, ky, kx = _volume(kernel)
    packed = kx if kx * c_in <= MAX_PACKED else 1
    taps = kz * ky * (kx // packed)
    voxels = x.numel() // x.shape[1]
    block = BLOCK
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    splits = max(1, min(triton.cdiv(voxels, block), CORRELATE_PROGRAMS * processors // (groups * taps)))
    blocks = triton.cdiv(triton.cdiv(voxels, block), splits)
    partial = torch.empty((splits, groups, taps * packed * c_in, c_out), dtype=torch.float32, device=x.device)
    _correlate[(taps, groups, splits)](
        x, grad, partial, voxels, blocks, depth, height, width, groups, c_in, c_out, kz, ky, kx, packed,
        max(16, triton.next_power_of_2(packed * c_in)), max(16, triton.next_power_of_2(c_out)), block, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return partial.sum(0).view(groups, *kernel, c_in, c_out)


@triton.jit
def _window(x, voxel, voxels, tap, D, H, W, STRIDE: tl.constexpr, C_IN: tl.constexpr,
            KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PACKED: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """(BLOCK, K) inputs that `tap` multiplies: PACKED neighbours along x with their channels, zero outside the map."""
    k = tl.arange(0, K)
    steps: tl.constexpr = KX // PACKED
    dz = tap // (KY * steps) - KZ // 2
    dy = (tap // steps) % KY - KY // 2
    dx = tap % steps - KX // 2
    column, row, plane = voxel % W, (voxel // W) % H, (voxel // (W * H)) % D
    row_inside = (voxel < voxels) & (row + dy >= 0) & (row + dy < H) & (plane + dz >= 0) & (plane + dz < D)
    columns = column[:, None] + (k // C_IN)[None, :] + dx
    inside = row_inside[:, None] & (columns >= 0) & (columns < W) & (k < PACKED * C_IN)[None, :]
    first = voxel + (dz * H + dy) * W + dx
    return tl.load(x + first[:, None] * STRIDE + ((k // C_IN) * STRIDE + k % C_IN)[None, :], mask=inside, other=0.0)


@triton.jit
def _convolve(
    x, weight, out, voxels, D, H, W, GROUPS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PACKED: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    k, n = tl.arange(0, K), tl.arange(0, N)
    in_weight = (k < PACKED * C_IN)[:, None] & (n < C_OUT)[None, :]
    weight += group * KZ * KY * KX * C_IN * C_OUT
    total = tl.zeros((BLOCK, N), tl.float32)
    for tap in range(KZ * KY * (KX // PACKED)):
        window = _window(x + group * C_IN, voxel, voxels, tap, D, H, W, GROUPS * C_IN, C_IN, KZ, KY, KX, PACKED, K)
        w = tl.load(weight + (tap * PACKED * C_IN + k)[:, None] * C_OUT + n[None, :], mask=in_weight, other=0.0)
        total = tl.dot(window, w, total)
    inside = (voxel < voxels)[:, None] & (n < C_OUT)[None, :]
    tl.store(
        out + voxel[:, None] * (GROUPS * C_OUT) + (group * C_OUT + n)[None, :],
        total.to(out.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _correlate(
    x, grad, partial, voxels, blocks, D, H, W, GROUPS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PACKED: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tap, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k, n = tl.arange(0, K), tl.arange(0, N)
    total = tl.zeros((K, N), tl.float32)
    for i in range(blocks):
        voxel = (split * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        window = _window(x + group * C_IN, voxel, voxels, tap, D, H, W, GROUPS * C_IN, C_IN, KZ, KY, KX, PACKED, K)
        inside = (voxel < voxels)[:, None] & (n < C_OUT)[None, :]
        g = tl.load(grad + voxel[:, None] * (GROUPS * C_OUT) + (group * C_OUT + n)[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(window), g, total)
    taps = KZ * KY * (KX // PACKED)
    row = ((split * GROUPS + group) * taps + tap) * PACKED * C_IN + k
    in_weight = (k < PACKED * C_IN)[:, None] & (n < C_OUT)[None, :]
    tl.store(partial + row[:, None] * C_OUT + n[None, :], total, mask=in_weight)
