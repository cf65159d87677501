"""Triton kernels of the narrow dense convolution: an implicit matrix product over channels-last maps.

A map is (B, D, H, W, C) in memory; 2D has D = 1. What bounds this product on narrow maps is not arithmetic but how
often a voxel is loaded, 27 times if every output asks for its own neighbours. So one row of the product makes a tile
of TY x TX neighbouring outputs: their inputs along x, TX + KX - 1 voxels with all channels, are one contiguous run of
memory (K numbers), their results N = TY * TX * C_out numbers, and the weights a K x N band matrix for each of the KZ *
(TY + KY - 1) input rows. With 2 x 2 tiles and a 3^3 kernel an output costs 3 loads of 4 voxels in place of 9 of 3, and
K = 4 * C_in is a power of two. The input gradient is the same product with mirrored weights. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.backend import CHANNELS_LAST

BLOCK = 128  # tiles of a program
MAX_N = 64  # results of a tile, beyond that it shrinks
STAGES = 3
WARPS = 4


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
            "BLOCK": BLOCK,
        }


def _band(weight: Tensor, t: _Tiling) -> Tensor:
    """(C_out, C_in, *k) -> (rows, run * C_in, TY * TX * C_out): output (oy, ox) of a tile meets input (r, i) with tap
    (r - oy, i - ox), and zero where there is no such tap."""
    weight = weight.reshape(t.c_out, t.c_in, t.kz, t.ky, t.kx)
    shifted = [
        F.pad(weight, (ox, t.tx - 1 - ox, oy, t.ty - 1 - oy)) for oy in range(t.ty) for ox in range(t.tx)
    ]  # each (C_out, C_in, KZ, TY + KY - 1, run)
    band = torch.stack(shifted).permute(3, 4, 5, 2, 0, 1)
    return band.reshape(t.rows, t.run * t.c_in, t.ty * t.tx * t.c_out).contiguous()


def _volume(x: Tensor, t: _Tiling) -> tuple[int, int, int, int]:
    """Tiles in all, and the sizes D, H, W."""
    depth, height, width = (1,) * (5 - x.ndim) + tuple(x.shape[2:])
    return x.shape[0] * depth * -(-height // t.ty) * -(-width // t.tx), depth, height, width


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C_in, *spatial) channels-last, weight (C_out, C_in, *k) -> (B, C_out, *spatial) channels-last."""
    t = _Tiling.of(weight.shape[2:], weight.shape[1], weight.shape[0])
    tiles, depth, height, width = _volume(x, t)
    shape = (x.shape[0], t.c_out, *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST[x.ndim])
    wrap_triton(_convolve_kernel)[(triton.cdiv(tiles, BLOCK),)](
        x, _band(weight, t), bias, out, tiles, depth, height, width, BIAS=bias is not None, **t.constants(),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


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
