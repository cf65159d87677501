"""Triton kernels of the multi-kernel depthwise convolution, for CUDA tensors in half precision and float32.

A depthwise convolution has no sum over channels, so nothing that looks like a matrix product. It becomes one when
neighbouring outputs are taken together: a patch of 8 x 8 outputs in (y, x) of one plane reads, from each input plane, a
window of at most 16 x 16 inputs (kernels up to 9), and

    patch (64) = sum over dz of  window of plane z + dz (256)  x  band matrix of dz (256 x 64)

where the band matrix holds the taps of that dz, shifted by one from row to row. With the patches of all planes stacked,
that is an ordinary matrix product for the tensor cores: (patches, windows) x (windows, 64). 2D is the case of one
plane. The tensor cores multiply many zeros (256 * 9 products an output for k = 9 in place of 729), and are still far
faster than 729 multiplications one by one. What bounds the kernels is gathering the windows.

* forward: `_depthwise_band_kernel` writes the band matrices (288 KiB a channel for 9x9x9, read from L2 by everybody),
  and `_depthwise_forward_kernel` is a matrix product whose left side is gathered from x, for two output planes at a
  time, so that a window is gathered (kz + 1) / 2 times and not kz times. Kernel sizes are run-time values: they only
  say how many products to sum. One launch of one compiled kernel so serves all groups.
* input gradient: the same with mirrored taps.
* weight gradient: (64, patches) x (patches, windows), output gradient times input, for two dz at a time, by
  `_depthwise_weight_gradient_kernel`. The entries of one diagonal belong to one tap. Every program writes its part of
  those entries to a workspace, which `_depthwise_reduce_kernel` adds up in a fixed order: no atomics, so the result is
  the same in every run.

Sums are float32. float32 input goes through tf32 where PyTorch allows that for convolutions, else through three tf32
products that together keep float32's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.of_weights import of_weights
from nnunet_lgms.ops.triton import device

PATCH = tl.constexpr(8)  # outputs per axis of a patch
BN = tl.constexpr(64)  # outputs of a patch
WINDOW = tl.constexpr(256)  # window entries in one program of the weight gradient

GROUPS = 4  # that one launch can take
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(x: Tensor, channels: Sequence[int], kernels: Sequence[int]) -> bool:
    """Whether the kernels below can serve x, (B, C, [D,] H, W), these groups and these kernel sizes."""
    return (
        x.dtype in DTYPES
        and 0 < x.numel() < 2**31
        and len(channels) <= GROUPS
        and max(channels) < 1 << 14
        and max(kernels) < 64
        and max(kernels[x.dim() - 3 :: x.dim() - 2]) <= 25  # along x, where a window is 32 wide
    )


@triton.jit
def _look_up(index, group, found, PER_CHANNEL: tl.constexpr, DZ: tl.constexpr, ROWS: tl.constexpr):
    """One group's part in finding what number `index` of a list is: the list has one item for each channel, or
    (not PER_CHANNEL) one for each task of the weight gradient, DZ taps along z and ROWS window rows of a channel.

    found: kernel sizes, channel, start of its taps in the flat parameters, task within the channel.
    """
    kz, ky, kx, channel, taps, task = found
    gz, gy, gx, count = group & 63, (group >> 6) & 63, (group >> 12) & 31, group >> 17
    if PER_CHANNEL:
        items = 1
    else:
        items = tl.maximum(tl.cdiv(gz, DZ) * tl.cdiv(PATCH + gy - 1, ROWS), 1)
    here = (index >= 0) & (index < count * items)
    passed = tl.minimum(tl.maximum(index, 0), count * items) // items  # channels of this group before ours
    found = (
        tl.where(here, gz, kz),
        tl.where(here, gy, ky),
        tl.where(here, gx, kx),
        channel + passed,
        taps + passed * gz * gy * gx,
        tl.where(here, index - passed * items, task),
    )
    return index - count * items, found


@triton.jit
def _find(index, group0, group1, group2, group3, PER_CHANNEL: tl.constexpr, DZ: tl.constexpr, ROWS: tl.constexpr):
    found = (0, 0, 0, 0, 0, 0)
    index, found = _look_up(index, group0, found, PER_CHANNEL, DZ, ROWS)
    index, found = _look_up(index, group1, found, PER_CHANNEL, DZ, ROWS)
    index, found = _look_up(index, group2, found, PER_CHANNEL, DZ, ROWS)
    index, found = _look_up(index, group3, found, PER_CHANNEL, DZ, ROWS)
    return found


# Flags and sizes stay run-time values: UNIT, the largest power of two up to 8 that divides the width, says all that the
# compiler needs, and every version less is seconds less of compilation.
@triton.jit(do_not_specialize=["group0", "group1", "group2", "group3", "flip", "most_tiles"])
def _depthwise_band_kernel(
    parameters_ptr,  # weights of all groups, flat, one after the other, then one bias a channel if there are any
    band_ptr,  # (C, most_tiles, BN, BK)
    group0, group1, group2, group3,  # sizes of each group; see `_Groups`
    flip,  # whether kernels are mirrored
    most_tiles,  # of the channel with the largest kernel
    XW: tl.constexpr, XL: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One BK x BN tile of a band matrix: rows (r, w) of the window, columns (by, bx) of the patch, stored by column."""
    kz, ky, kx, channel, first_tap, _ = _find(tl.program_id(0), group0, group1, group2, group3, True, 1, 1)
    tiles_per_plane = tl.cdiv((PATCH + ky - 1) * XW, BK)
    tile = tl.program_id(1)
    if tile < kz * tiles_per_plane:
        dz = tile // tiles_per_plane
        n = tl.arange(0, BN)[:, None]
        k = tl.arange(0, BK)[None, :]
        dy = (tile % tiles_per_plane) * (BK // XW) + k // XW - n // PATCH
        dx = k % XW - n % PATCH - XL + kx // 2
        inside = (dy >= 0) & (dy < ky) & (dx >= 0) & (dx < kx)
        tap = (dz * ky + dy) * kx + dx
        tap = tl.where(flip != 0, kz * ky * kx - 1 - tap, tap)
        taps = tl.load(parameters_ptr + first_tap + tap, mask=inside, other=0.0)
        out = band_ptr + (channel * most_tiles + tile) * (BK * BN) + n * BK + k
        tl.store(out, taps.to(band_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "group0",
        "group1",
        "group2",
        "group3",
        "first_bias",
        "residual",
        "most_tiles",
        "channels",
        "depth",
        "height",
        "width_units",
        "patches",
    ]
)
def _depthwise_forward_kernel(
    x_ptr,  # (B, C, D, H, W)
    band_ptr,  # (C, most_tiles, BN, BK)
    parameters_ptr,  # for the biases
    out_ptr,  # (B, C, D, H, W)
    group0, group1, group2, group3, first_bias, residual, most_tiles, channels, depth, height, width_units,
    patches,  # of all samples, each in BZ planes
    XW: tl.constexpr, XL: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BZ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM patches of one channel, each in BZ neighbouring planes: a window is loaded once for all of those."""
    # The last group first: it tends to have the largest kernel, and a long program should not be the last to start.
    index = channels - 1 - tl.program_id(1)
    kz, ky, _, channel, _, _ = _find(index, group0, group1, group2, group3, True, 1, 1)
    width = width_units * UNIT  # tells the compiler which loads are aligned
    plane = height * width
    rows: tl.constexpr = BK // XW

    patch = tl.program_id(0) * BM + tl.arange(0, BM)
    tiles_x = tl.cdiv(width, PATCH)
    tiles_y = tl.cdiv(height, PATCH)
    tiles_z = tl.cdiv(depth, BZ)
    x0 = (patch % tiles_x) * PATCH
    y0 = (patch // tiles_x % tiles_y) * PATCH
    z = patch // (tiles_x * tiles_y)
    b = z // tiles_z
    z = tl.where(patch < patches, z % tiles_z * BZ, -(1 << 20))  # no plane is near that one
    start = (b * channels + channel) * (depth * plane) + z * plane + y0 * width + x0

    k = tl.arange(0, BK)
    r = k // XW
    w = k % XW - XL
    n = tl.arange(0, BZ * BN)
    bz = n // BN
    column = (start[:, None] - XL) + (r * width + k % XW)[None, :]
    in_row = (x0[:, None] + w[None, :] >= 0) & (x0[:, None] + w[None, :] < width)
    y = y0[:, None] + r[None, :]

    # The band matrix of an input plane holds, side by side, a tap plane for each of the BZ output planes.
    tiles_per_plane = tl.cdiv((PATCH + ky - 1) * XW, BK)
    first_tile = bz * tiles_per_plane
    last_tile = first_tile + kz * tiles_per_plane
    band = band_ptr + channel * most_tiles * (BK * BN) - first_tile * (BK * BN) + n % BN * BK
    acc = tl.zeros((BM, BZ * BN), dtype=tl.float32)
    for i in range((kz + BZ - 1) * tiles_per_plane):
        dz = i // tiles_per_plane - kz // 2
        dy = (i % tiles_per_plane) * rows - ky // 2
        in_plane = (z + dz >= 0) & (z + dz < depth)
        inside = in_row & in_plane[:, None] & (y + dy >= 0) & (y + dy < height)
        window = tl.load(x_ptr + column + (dz * plane + dy * width), mask=inside, other=0.0)
        taps = band[None, :] + k[:, None] + i * (BK * BN)
        if BZ == 1:
            matrix = tl.load(taps)
        else:
            matrix = tl.load(taps, mask=((i >= first_tile) & (i < last_tile))[None, :], other=0.0)
        acc = tl.dot(window, matrix, acc, input_precision=PRECISION)

    # first_bias is -1 where there are none
    acc += tl.load(parameters_ptr + first_bias + channel, mask=first_bias >= 0, other=0.0).to(tl.float32)
    by = n // PATCH % PATCH
    bx = n % PATCH
    inside = (y0[:, None] + by[None, :] < height) & (x0[:, None] + bx[None, :] < width)
    inside = inside & (z[:, None] >= 0) & (z[:, None] + bz[None, :] < depth)
    place = start[:, None] + (bz * plane + by * width + bx)[None, :]
    added = inside & (y0[:, None] + by[None, :] < residual * height)  # residual is 0 or 1
    acc += tl.load(x_ptr + place, mask=added, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "group0", "group1", "group2", "group3", "channels", "depth", "height", "width_units",
        "log_y", "log_x", "blocks_z", "blocks_y", "blocks_x", "blocks", "splits",
    ]
)  # fmt: skip
def _depthwise_weight_gradient_kernel(
    x_ptr,  # (B, C, D, H, W)
    grad_ptr,  # (B, C, D, H, W), of the result
    workspace_ptr,  # of each channel (splits, BN, taps)
    group0, group1, group2, group3, channels, depth, height, width_units,
    log_y, log_x, blocks_z, blocks_y, blocks_x, blocks, splits,
    XW: tl.constexpr, XL: tl.constexpr, UNIT: tl.constexpr, DZ: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DZ taps along z, and 256 / XW rows of the window, of one channel, over a part of the blocks of BP patches."""
    rows: tl.constexpr = WINDOW // XW
    kz, ky, kx, channel, first_tap, task = _find(tl.program_id(1), group0, group1, group2, group3, False, DZ, rows)
    window_parts = tl.cdiv(PATCH + ky - 1, rows)
    first_dz = task // window_parts * DZ
    first_row = task % window_parts * rows
    split = tl.program_id(0)
    width = width_units * UNIT
    plane = height * width

    # A block is BP >> (log_y + log_x) planes of 2^log_y by 2^log_x patches, all of one sample.
    p = tl.arange(0, BP)
    zp = p >> (log_y + log_x)
    yp = ((p >> log_x) & ((1 << log_y) - 1)) * PATCH
    xp = (p & ((1 << log_x) - 1)) * PATCH
    m = tl.arange(0, DZ * BN)
    by = m // PATCH % PATCH
    bx = m % PATCH
    shift = kz // 2 - first_dz - m // BN  # gradient plane minus input plane
    tap_in_range = first_dz + m // BN < kz
    n = tl.arange(0, WINDOW)
    wy = first_row + n // XW - ky // 2
    wx = n % XW - XL
    grad_column = shift * plane + by * width + bx
    window_column = wy * width + wx

    acc = tl.zeros((DZ * BN, WINDOW), dtype=tl.float32)
    per_split = tl.cdiv(blocks, splits)
    for i in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        x0 = ((i % blocks_x) << log_x) * PATCH + xp
        y0 = ((i // blocks_x % blocks_y) << log_y) * PATCH + yp
        i = i // (blocks_x * blocks_y)
        z = i % blocks_z * (BP >> (log_y + log_x)) + zp
        start = (i // blocks_z * channels + channel) * (depth * plane) + z * plane + y0 * width + x0
        x = x0[:, None] + wx[None, :]
        y = y0[:, None] + wy[None, :]
        inside = (z[:, None] < depth) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        window = tl.load(x_ptr + start[:, None] + window_column[None, :], mask=inside, other=0.0)
        x = x0[:, None] + bx[None, :]
        y = y0[:, None] + by[None, :]
        z = z[:, None] + shift[None, :]
        inside = tap_in_range[None, :] & (x < width) & (y < height) & (z >= 0) & (z < depth)
        grad = tl.load(grad_ptr + start[:, None] + grad_column[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(grad), window, acc, input_precision=PRECISION)

    # The workspace of a channel is (splits, 64, kz * ky * kx): one row for each place in the patch.
    taps = kz * ky * kx
    out = workspace_ptr + first_tap.to(tl.int64) * splits * BN + split * BN * taps
    dz = first_dz + m // BN
    dy = (first_row + n // XW)[None, :] - by[:, None]
    dx = (n % XW - XL + kx // 2)[None, :] - bx[:, None]
    inside = (dz[:, None] < kz) & (dy >= 0) & (dy < ky) & (dx >= 0) & (dx < kx)
    tl.store(out + (m % BN * taps)[:, None] + (dz[:, None] * ky + dy) * kx + dx, acc, mask=inside)


@triton.jit(do_not_specialize=["group0", "group1", "group2", "group3", "splits"])
def _depthwise_reduce_kernel(
    workspace_ptr,  # of each channel (splits, BN, taps)
    out_ptr,  # weights of all groups, flat
    group0, group1, group2, group3, splits, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sum of the rows that `_depthwise_weight_gradient_kernel` wrote, COLS taps of one channel."""
    kz, ky, kx, _, weight, _ = _find(tl.program_id(0), group0, group1, group2, group3, True, 1, 1)
    taps = kz * ky * kx
    first = tl.program_id(1) * COLS
    if first < taps:
        col = first + tl.arange(0, COLS)
        source = workspace_ptr + weight.to(tl.int64) * splits * BN
        acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for start in range(0, splits * BN, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row[:, None] < splits * BN) & (col[None, :] < taps)
            acc += tl.load(source + row[:, None] * taps + col[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + weight + col, tl.sum(acc, 0), mask=col < taps)


# --- the host's part -------------------------------------------------------------------------------------------------
# Block sizes were measured on an H100 (benchmarks/results/depthwise.md): no tuning at run time, nothing to wait for.

HOPPER = 227 << 10  # bytes of shared memory that a block has on an H100, H200 and B200; others have 99 or 163 KiB
START = 16  # what starting and ending a program of the weight gradient costs, in steps of its loop


class _Groups:
    """The groups as the kernels take them, and what follows from them."""

    def __init__(self, channels: Sequence[int], kernels: Sequence[int]):
        axes = len(kernels) // len(channels)
        self.kernels = [(1, 1, *kernels[i : i + axes])[-3:] for i in range(0, len(kernels), axes)]
        self.channels = channels
        self.packed = [kz | ky << 6 | kx << 12 | n << 17 for n, (kz, ky, kx) in zip(channels, self.kernels)]
        self.packed += [0] * (GROUPS - len(self.packed))
        self.sizes = [kz * ky * kx for kz, ky, kx in self.kernels]
        self.taps = sum(n * size for n, size in zip(channels, self.sizes))
        self.flat = all(kz == 1 for kz, _, _ in self.kernels)
        self.window_width = 16 if max(kx for _, _, kx in self.kernels) <= 9 else 32
        self.window_left = (self.window_width - 8) // 2

    def most_tiles(self, bk: int) -> int:
        """Band tiles of a channel with the largest kernel."""
        return max(kz * -(-(8 + ky - 1) * self.window_width // bk) for kz, ky, _ in self.kernels)

    def tasks(self, dz: int) -> int:
        """Programs that the weight gradient needs for one part of the patches."""
        rows = 256 // self.window_width
        return sum(n * -(-kz // dz) * -(-(8 + ky - 1) // rows) for n, (kz, ky, _) in zip(self.channels, self.kernels))


@lru_cache(maxsize=256)
def _groups(channels: tuple[int, ...], kernels: tuple[int, ...]) -> _Groups:
    return _Groups(channels, kernels)


def _precision(dtype: torch.dtype) -> str:
    """The precision of tl.dot, which matters for float32 only."""
    if dtype != torch.float32:
        return "tf32"
    cudnn = torch.backends.cudnn
    allowed = cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32  # before torch 2.9
    return "tf32" if allowed else "tf32x3"


def _volume(x: Tensor) -> tuple[int, int, int, int, int]:
    """B, C, D, H, W; a 2D map is one plane."""
    b, c, *spatial = x.shape
    return (b, c, *(1, 1, *spatial)[-3:])


def convolve(
    x: Tensor,
    parameters: Tensor,
    channels: Sequence[int],
    kernels: Sequence[int],
    has_bias: bool,
    flip: bool,
    residual: bool,
) -> Tensor:
    """The convolution, (B, C, [D,] H, W) -> the same; arguments as in `depthwise.py`, x contiguous."""
    b, c, d, h, w = _volume(x)
    groups = _groups(tuple(channels), tuple(kernels))
    precision = _precision(x.dtype)
    bm, bk, warps, stages = 64, 32, 4, 4 if x.dtype != torch.float32 else 2
    if precision == "tf32x3" and device.sizes(x.device).shared_memory < HOPPER:  # registers would spill in the loop
        bm = 32
    bz = 1 if groups.flat else 2
    patches = b * -(-d // bz) * -(-h // 8) * -(-w // 8)
    unit = math.gcd(w, 8)
    window = groups.window_width, groups.window_left
    tiles = groups.most_tiles(bk)
    out = torch.empty_like(x)
    band = of_weights(_band_matrices, parameters, groups, flip, bk, x.dtype)
    first_bias = parameters.numel() - c if has_bias else -1
    launch(_depthwise_forward_kernel)[(-(-patches // bm), c)](
        x, band, parameters, out, *groups.packed, first_bias, int(residual), tiles, c, d, h, w // unit, patches,
        *window, unit, bm, bz, bk, precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _band_matrices(parameters: Tensor, groups: _Groups, flip: bool, bk: int, dtype: torch.dtype) -> Tensor:
    """The band matrices of all channels, of flat parameters."""
    channels, tiles = sum(groups.channels), groups.most_tiles(bk)
    band = torch.empty(channels * tiles * bk * 64, dtype=dtype, device=parameters.device)
    launch(_depthwise_band_kernel)[(channels, tiles)](
        parameters, band, *groups.packed, int(flip), tiles, groups.window_width, groups.window_left, bk, num_warps=4
    )
    return band


def correlate(x: Tensor, grad: Tensor, channels: Sequence[int], kernels: Sequence[int]) -> Tensor:
    """Gradient of the flat weights in float32; x and the output gradient (B, C, [D,] H, W), contiguous, one dtype."""
    b, c, d, h, w = _volume(x)
    groups = _groups(tuple(channels), tuple(kernels))
    precision = _precision(x.dtype)
    gpu = device.sizes(x.device)
    warps, stages = 8, 3 if x.dtype != torch.float32 else 2
    dz, step = (1, 64) if groups.flat else (2, 32)
    if gpu.shared_memory < 1 << 17 or precision == "tf32x3":  # consumer cards have 99 KiB
        dz, step, stages = 1, 32, 2
    zb, yb, xb = _block(d, -(-h // 8), -(-w // 8), step)
    blocks_z, blocks_y, blocks_x = -(-d // zb), -(-h // (8 * yb)), -(-w // (8 * xb))
    blocks = b * blocks_z * blocks_y * blocks_x
    tasks = groups.tasks(dz)
    splits = _splits(tasks, blocks, gpu.processors)
    unit = math.gcd(w, 8)
    workspace = torch.empty(splits * 64 * groups.taps, dtype=torch.float32, device=x.device)
    out = torch.empty(groups.taps, dtype=torch.float32, device=x.device)
    launch(_depthwise_weight_gradient_kernel)[(splits, tasks)](
        x, grad, workspace, *groups.packed, c, d, h, w // unit,
        yb.bit_length() - 1, xb.bit_length() - 1, blocks_z, blocks_y, blocks_x, blocks, splits,
        groups.window_width, groups.window_left, unit, dz, step, precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    columns = 16
    launch(_depthwise_reduce_kernel)[(c, -(-max(groups.sizes) // columns))](
        workspace, out, *groups.packed, splits, 256, columns, num_warps=8
    )
    return out


@lru_cache(maxsize=256)
def _block(planes: int, tiles_y: int, tiles_x: int, size: int) -> tuple[int, int, int]:
    """The block of `size` patches, (planes, along y, along x), that wastes least at the borders, wide before high."""

    def waste(block: tuple[int, int, int]) -> tuple[int, int, int]:
        covered = math.prod(-(-n // s) * s for n, s in zip((planes, tiles_y, tiles_x), block))
        return covered, -block[2], -block[1]

    powers = [2**i for i in range(size.bit_length())]
    return min(((size // (y * x), y, x) for y in powers for x in powers if y * x <= size), key=waste)


@lru_cache(maxsize=256)
def _splits(tasks: int, blocks: int, processors: int) -> int:
    """Over how many programs to spread a task's blocks, so that the waves of programs are full, and few."""

    def time(splits: int) -> int:
        return -(-tasks * splits // processors) * (-(-blocks // splits) + START)

    return min(range(1, max(1, min(blocks // 4, 8 * processors // tasks)) + 1), key=time)
