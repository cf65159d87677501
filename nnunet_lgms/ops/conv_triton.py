"""Triton kernels of the narrow dense convolution: an implicit matrix product over channels-last maps.

A map is (B, D, H, W, C) in memory; 2D has D = 1. What bounds this product on narrow maps is not arithmetic but how
often a voxel is loaded, 27 times if every output asks for its own neighbours. So one row of the product makes a tile
of TY x TX neighbouring outputs: their inputs along x, TX + KX - 1 voxels with all channels, are one contiguous run of
memory (K numbers), their results N = TY * TX * C_out numbers, and the weights a K x N band matrix for each of the KZ *
(TY + KY - 1) input rows. With 2 x 2 tiles and a 3^3 kernel an output costs 3 loads of 4 voxels in place of 9 of 3, and
K = 4 * C_in is a power of two. Groups are blocks of zeros in the band: a product with zeros costs less than half a
cache line. The input gradient is the same product with a mirrored band. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.backend import map_memory

BLOCK = 128  # tiles of a program
MAX_N = 64  # results of a tile, beyond that it shrinks
STAGES = 3
WARPS = 4
BAND_ROWS = 16  # rows of a band matrix that one program writes


class _Tiling(NamedTuple):
    """Sizes of the product for one convolution."""

    kz: int
    ky: int
    kx: int
    ty: int
    tx: int
    c_in: int
    c_out: int

    @classmethod
    def of(cls, kernel: Sequence[int], c_in: int, c_out: int) -> _Tiling:
        kz, ky, kx = (1,) * (3 - len(kernel)) + tuple(kernel)
        tx = 2 if kx == 3 else 1
        ty = 2 if ky == 3 and 2 * tx * c_out <= MAX_N else 1
        return cls(kz, ky, kx, ty, tx, c_in, c_out)

    @property
    def rows(self) -> int:
        """Input rows that a tile reads, over all planes."""
        return self.kz * (self.ty + self.ky - 1)

    @property
    def run(self) -> int:
        """Voxels of an input row that a tile reads."""
        return self.tx + self.kx - 1

    def constants(self) -> dict[str, int]:
        return {
            "C_IN": self.c_in,
            "C_OUT": self.c_out,
            "KZ": self.kz,
            "KY": self.ky,
            "KX": self.kx,
            "TY": self.ty,
            "TX": self.tx,
            "K": max(16, triton.next_power_of_2(self.run * self.c_in)),
            "N": max(16, triton.next_power_of_2(self.ty * self.tx * self.c_out)),
        }


def _volume(x: Tensor, t: _Tiling) -> tuple[int, int, int, int]:
    """Tiles in all, and the sizes D, H, W."""
    depth, height, width = (1,) * (5 - x.ndim) + tuple(x.shape[2:])
    return x.shape[0] * depth * -(-height // t.ty) * -(-width // t.tx), depth, height, width


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, mirrored: bool) -> Tensor:
    """x (B, C_in, *spatial) channels-last -> (B, C_out, *spatial) channels-last.

    weight is (C_out, C_in / groups, *k); mirrored, with input and output swapped, (C_in, C_out / groups, *k).
    """
    channels = weight.shape[0], weight.shape[1] * groups
    c_out, c_in = channels[::-1] if mirrored else channels
    t = _Tiling.of(weight.shape[2:], c_in, c_out)
    constants = t.constants()
    band = torch.empty((t.rows, t.run * c_in, t.ty * t.tx * c_out), dtype=x.dtype, device=x.device)
    wrap_triton(_band_kernel)[(t.rows, triton.cdiv(t.run * c_in, BAND_ROWS))](
        weight.contiguous(), band, GROUPS=groups, MIRRORED=mirrored, BAND_ROWS=BAND_ROWS, **constants
    )
    tiles, depth, height, width = _volume(x, t)
    out = map_memory(x, c_out, x.shape[2:])
    wrap_triton(_convolve_kernel)[(triton.cdiv(tiles, BLOCK),)](
        x, band, bias, out, tiles, depth, height, width, BIAS=bias is not None, BLOCK=BLOCK, **constants,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out.movedim(-1, 1)


@triton.jit
def _band_kernel(
    weight, band, GROUPS: tl.constexpr, MIRRORED: tl.constexpr, BAND_ROWS: tl.constexpr, C_IN: tl.constexpr,
    C_OUT: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Output (oy, ox, o) of a tile meets input (r, column, i) of a row with tap (r - oy, column - ox), else zero."""
    row = tl.program_id(0)
    dz, r = row // (TY + KY - 1), row % (TY + KY - 1)
    k = tl.program_id(1) * BAND_ROWS + tl.arange(0, BAND_ROWS)
    n = tl.arange(0, N)
    width: tl.constexpr = TY * TX * C_OUT
    height: tl.constexpr = (TX + KX - 1) * C_IN
    column, i = (k // C_IN)[:, None], (k % C_IN)[:, None]
    oy, ox, o = (n // (TX * C_OUT))[None, :], (n // C_OUT % TX)[None, :], (n % C_OUT)[None, :]
    dy, dx = r - oy, column - ox
    in_band = (k < height)[:, None] & (n < width)[None, :]
    meets = in_band & (dy >= 0) & (dy < KY) & (dx >= 0) & (dx < KX)
    meets &= i // (C_IN // GROUPS) == o // (C_OUT // GROUPS)
    tap = (dz * KY + dy) * KX + dx
    taps: tl.constexpr = KZ * KY * KX
    if MIRRORED:
        source = (i * (C_OUT // GROUPS) + o % (C_OUT // GROUPS)) * taps + taps - 1 - tap
    else:
        source = (o * (C_IN // GROUPS) + i % (C_IN // GROUPS)) * taps + tap
    w = tl.load(weight + source, mask=meets, other=0.0).to(band.dtype.element_ty)
    tl.store(band + (row * height + k)[:, None] * width + n[None, :], w, mask=in_band)


@triton.jit
def _place(tile, D, H, W, TY: tl.constexpr, TX: tl.constexpr):
    """Plane over all samples, plane inside its sample, first row and first column of a tile."""
    columns, rows = (W + TX - 1) // TX, (H + TY - 1) // TY
    plane = tile // (columns * rows)
    return plane, plane % D, (tile // columns) % rows * TY, tile % columns * TX


@triton.jit
def _runs(x, row_index, tile, tiles, D, H, W, C_IN: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
          TY: tl.constexpr, TX: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """(BLOCK, K) numbers of one input row of every tile, zero outside the map."""
    plane, depth, row, column = _place(tile, D, H, W, TY, TX)
    dz = row_index // (TY + KY - 1) - KZ // 2
    dy = row_index % (TY + KY - 1) - KY // 2
    k = tl.arange(0, K)
    columns = column[:, None] + (k // C_IN)[None, :] - KX // 2
    row_inside = (tile < tiles) & (row + dy >= 0) & (row + dy < H) & (depth + dz >= 0) & (depth + dz < D)
    inside = row_inside[:, None] & (columns >= 0) & (columns < W) & (k < (TX + KX - 1) * C_IN)[None, :]
    first = ((plane + dz) * H + row + dy) * W + column - KX // 2
    return tl.load(x + first[:, None] * C_IN + k[None, :], mask=inside, other=0.0)


@triton.jit
def _results(tile, tiles, D, H, W, C_OUT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, N: tl.constexpr):
    """(BLOCK, N) offsets of the results of every tile, and which of them lie inside the map."""
    plane, depth, row, column = _place(tile, D, H, W, TY, TX)
    n = tl.arange(0, N)
    oy, along = n // (TX * C_OUT), n % (TX * C_OUT)
    y = row[:, None] + oy[None, :]
    columns = column[:, None] + (along // C_OUT)[None, :]
    inside = (tile < tiles)[:, None] & (y < H) & (columns < W) & (n < TY * TX * C_OUT)[None, :]
    first = (plane * H + row) * W + column
    return first[:, None] * C_OUT + (oy * (W * C_OUT) + along)[None, :], inside


@triton.jit
def _convolve_kernel(
    x, band, bias, out, tiles, D, H, W, BIAS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, n = tl.arange(0, K), tl.arange(0, N)
    width: tl.constexpr = TY * TX * C_OUT
    height: tl.constexpr = (TX + KX - 1) * C_IN
    in_band = (k < height)[:, None] & (n < width)[None, :]
    total = tl.zeros((BLOCK, N), tl.float32)
    for row in range(KZ * (TY + KY - 1)):
        runs = _runs(x, row, tile, tiles, D, H, W, C_IN, KZ, KY, KX, TY, TX, K)
        w = tl.load(band + (row * height + k)[:, None] * width + n[None, :], mask=in_band, other=0.0)
        total = tl.dot(runs, w, total)
    if BIAS:
        total += tl.load(bias + n % C_OUT).to(tl.float32)[None, :]
    offset, inside = _results(tile, tiles, D, H, W, C_OUT, TY, TX, N)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)
