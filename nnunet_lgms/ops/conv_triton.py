"""Triton kernels of the narrow dense convolution: an implicit matrix product over channels-last maps.

A map is (B, D, H, W, C) in memory; 2D has D = 1. What bounds this product on narrow maps is not arithmetic but how
often a voxel is loaded, 27 times if every output asks for its own neighbours. So one row of the product makes a tile
of TY x TX neighbouring outputs: their inputs along x, TX + KX - 1 voxels with all channels, are one contiguous run of
memory (K numbers), their results N = TY * TX * LANES numbers (C_out and what fills a power of two), and the weights a
K x N band matrix for each of the KZ * (TY + KY - 1) input rows. With 2 x 2 tiles and a 3^3 kernel an output costs 3
loads of 4 voxels in place of 9 of 3, and K = 4 * C_in is a power of two. The input gradient is the same product with a
mirrored band. Sums are in float32.

A product may read some channels of a map and write some channels of another: groups are a launch each, and the two
halves of a Fusion block's input need not be joined. It may end with the norm and activation behind the convolution,
where the norm's statistics are known before (batch norm in prediction); where they are not, with the moments of what it
stores, so that the norm need not read the map for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.activation_triton import CODES, affine, after_norm, before_norm
from nnunet_lgms.ops.backend import map_memory
from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.norm_act_triton import Join, PartialMoments, first_row, store_moments

BLOCK = 64  # tiles of a program
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
    def lanes(self) -> int:
        """Numbers of a result in the product: its channels and what fills a power of two, 16 in the whole tile."""
        return max(triton.next_power_of_2(self.c_out), 16 // (self.ty * self.tx))

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
            "N": self.ty * self.tx * self.lanes,
            "LANES": self.lanes,
        }


def _volume(x: Tensor, t: _Tiling) -> tuple[int, int, int, int]:
    """Tiles of a sample, and the sizes D, H, W."""
    depth, height, width = (1,) * (5 - x.ndim) + tuple(x.shape[2:])
    return depth * triton.cdiv(height, t.ty) * triton.cdiv(width, t.tx), depth, height, width


class Finish(NamedTuple):
    """Norm with given statistics, activation and residual behind a convolution; tensors of (C_out,) or None."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str
    residual: Tensor | None


class _Moments(NamedTuple):
    """Of the result behind an activation: where they go, a program's blocks of tiles making a slice."""

    partial: PartialMoments
    steps: int
    activation: str


def convolve(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int, finish: Finish | None = None
) -> Tensor:
    """One map or one for each group, (B, C_in, *spatial) channels-last -> (B, C_out, *spatial) channels-last.

    weight is (C_out, C_in / groups, *k).
    """
    return _convolve(xs, weight, bias, groups, finish, None)


def convolve_moments(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    kind: str,
    norm_groups: int,
    activation: str,
) -> tuple[Tensor, PartialMoments]:
    """:func:`convolve`, and the moments of the result that a norm of this kind wants, as `norm_act_triton.moments`."""
    channels = weight.shape[0]
    tiles, *_ = _volume(xs[0], _Tiling.of(weight.shape[2:], weight.shape[1], channels // groups))
    blocks = triton.cdiv(tiles, BLOCK)
    steps = triton.cdiv(blocks, Join(xs[0].shape[0], channels, kind, norm_groups).most_slices)
    partial = PartialMoments.empty(xs[0], triton.cdiv(blocks, steps), channels)
    return _convolve(xs, weight, bias, groups, None, _Moments(partial, steps, activation)), partial


def _convolve(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int, finish: Finish | None,
    moments: _Moments | None,
) -> Tensor:  # fmt: skip
    c_out, c_in = weight.shape[0] // groups, weight.shape[1]
    out = map_memory(xs[0], weight.shape[0], xs[0].shape[2:])
    for group in range(groups):
        x, first = (xs[0], group * c_in) if len(xs) == 1 else (xs[group], 0)
        _launch(x, first, c_in, out, group * c_out, c_out, weight, group, bias, finish, moments, False)
    return out.movedim(-1, 1)


def convolve_transposed(grad: Tensor, weight: Tensor, groups: int, parts: int) -> list[Tensor]:
    """Gradient of the output -> that of the input, in one map or in one for each group."""
    c_out, c_in = weight.shape[0] // groups, weight.shape[1]
    outs = [map_memory(grad, c_in * groups // parts, grad.shape[2:]) for _ in range(parts)]
    for group in range(groups):
        out, first = (outs[0], group * c_in) if parts == 1 else (outs[group], 0)
        _launch(grad, group * c_out, c_out, out, first, c_in, weight, group, None, None, None, True)
    return [out.movedim(-1, 1) for out in outs]


def _launch(
    x: Tensor, x_first: int, c_in: int, out: Tensor, out_first: int, c_out: int, weight: Tensor, group: int,
    bias: Tensor | None, finish: Finish | None, moments: _Moments | None, mirrored: bool,
) -> None:  # fmt: skip
    """Convolves c_in channels of x with the weights of a group to c_out channels of the memory `out`."""
    kernel = weight.shape[2:]
    t = _Tiling.of(kernel, c_in, c_out)
    constants = t.constants()
    band = torch.empty((t.rows, t.run * c_in, constants["N"]), dtype=x.dtype, device=x.device)
    launch(wrap_triton(_band_kernel))[(t.rows, triton.cdiv(t.run * c_in, BAND_ROWS))](
        weight.contiguous(), band, group * c_in * c_out * math.prod(kernel), MIRRORED=mirrored, BAND_ROWS=BAND_ROWS,
        **constants,
    )  # fmt: skip
    mean = variance = scale = shift = residual = None
    eps, activation = 0.0, "none"
    partial, steps = (None,) * 3, 1
    if finish is not None:
        mean, variance, scale, shift, eps, activation, residual = finish
    if moments is not None:
        partial, steps, activation = moments
    tiles, depth, height, width = _volume(x, t)
    launch(wrap_triton(_convolve_kernel))[(triton.cdiv(tiles, BLOCK * steps), x.shape[0])](
        x, x_first, band, bias, mean, variance, scale, shift, residual, out, out_first, *partial, steps, tiles, depth,
        height, width, X_STRIDE=x.shape[1], OUT_STRIDE=out.shape[-1], BIAS=bias is not None, FINISH=finish is not None,
        EPS=eps, AFFINE=scale is not None, ACT=CODES[activation], RESIDUAL=residual is not None,
        MOMENTS=moments is not None, BLOCK=BLOCK, **constants, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@triton.jit
def _band_kernel(
    weight, band, weight_first, MIRRORED: tl.constexpr, BAND_ROWS: tl.constexpr, C_IN: tl.constexpr,
    C_OUT: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Output (oy, ox, o) of a tile meets input (r, column, i) of a row with tap (r - oy, column - ox), else zero."""
    row = tl.program_id(0)
    dz, r = row // (TY + KY - 1), row % (TY + KY - 1)
    k = tl.program_id(1) * BAND_ROWS + tl.arange(0, BAND_ROWS)
    n = tl.arange(0, N)
    height: tl.constexpr = (TX + KX - 1) * C_IN
    column, i = (k // C_IN)[:, None], (k % C_IN)[:, None]
    oy, ox, o = (n // (TX * LANES))[None, :], (n // LANES % TX)[None, :], (n % LANES)[None, :]
    dy, dx = r - oy, column - ox
    in_band = (k < height)[:, None]
    tap = (dz * KY + dy) * KX + dx
    taps: tl.constexpr = KZ * KY * KX
    if MIRRORED:
        source = (i * C_OUT + o) * taps + taps - 1 - tap
    else:
        source = (o * C_IN + i) * taps + tap
    meets = in_band & (o < C_OUT) & (dy >= 0) & (dy < KY) & (dx >= 0) & (dx < KX)
    w = tl.load(weight + weight_first + source, mask=meets, other=0.0).to(band.dtype.element_ty)
    tl.store(band + (row * height + k)[:, None] * N + n[None, :], w, mask=in_band)


@triton.jit
def _place(tile, H, W, TY: tl.constexpr, TX: tl.constexpr):
    """Plane, first row and first column of a tile."""
    columns, rows = (W + TX - 1) // TX, (H + TY - 1) // TY
    return tile // (columns * rows), (tile // columns) % rows * TY, tile % columns * TX


@triton.jit
def _runs(x, row_index, tile, tiles, D, H, W, X_STRIDE: tl.constexpr, C_IN: tl.constexpr, KZ: tl.constexpr,
          KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """(BLOCK, K) numbers of one input row of every tile, zero outside the map."""
    plane, row, column = _place(tile, H, W, TY, TX)
    dz = row_index // (TY + KY - 1) - KZ // 2
    dy = row_index % (TY + KY - 1) - KY // 2
    k = tl.arange(0, K)
    columns = column[:, None] + (k // C_IN)[None, :] - KX // 2
    row_inside = (tile < tiles) & (row + dy >= 0) & (row + dy < H) & (plane + dz >= 0) & (plane + dz < D)
    inside = row_inside[:, None] & (columns >= 0) & (columns < W) & (k < (TX + KX - 1) * C_IN)[None, :]
    first = ((plane + dz) * H + row + dy) * W + column - KX // 2
    within = k if X_STRIDE == C_IN else k // C_IN * X_STRIDE + k % C_IN
    return tl.load(x + first[:, None] * X_STRIDE + within[None, :], mask=inside, other=0.0)


@triton.jit
def _results(tile, tiles, H, W, OUT_STRIDE: tl.constexpr, C_OUT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
             N: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """(BLOCK, N) offsets of the results of every tile, and which of them lie inside the map."""
    plane, row, column = _place(tile, H, W, TY, TX)
    n = tl.arange(0, N)
    oy, ox = n // (TX * LANES), n // LANES % TX
    y, columns = row[:, None] + oy[None, :], column[:, None] + ox[None, :]
    inside = (tile < tiles)[:, None] & (y < H) & (columns < W) & (n % LANES < C_OUT)[None, :]
    first = (plane * H + row) * W + column
    return first[:, None] * OUT_STRIDE + (oy * W * OUT_STRIDE + ox * OUT_STRIDE + n % LANES)[None, :], inside


@triton.jit
def _convolve_kernel(
    x, x_first, band, bias, mean, variance, scale, shift, residual, out, out_first, partial_mean, partial_m2,
    partial_count, steps, tiles, D, H, W, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BIAS: tl.constexpr,
    FINISH: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    MOMENTS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr,
    KX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`steps` blocks of tiles of a sample, and the moments of all their results as they are stored."""
    sample = tl.program_id(1)
    x += sample * D * H * W * X_STRIDE + x_first
    k, n = tl.arange(0, K), tl.arange(0, N)
    channel = tl.minimum(n % LANES, C_OUT - 1)
    height: tl.constexpr = (TX + KX - 1) * C_IN
    in_band = (k < height)[:, None]
    origin = tl.zeros((LANES,), tl.float32)
    first, second = tl.zeros((BLOCK, LANES), tl.float32), tl.zeros((BLOCK, LANES), tl.float32)
    voxels = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        tile = (tl.program_id(0) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, N), tl.float32)
        for row in range(KZ * (TY + KY - 1)):
            runs = _runs(x, row, tile, tiles, D, H, W, X_STRIDE, C_IN, KZ, KY, KX, TY, TX, K)
            w = tl.load(band + (row * height + k)[:, None] * N + n[None, :], mask=in_band, other=0.0)
            total = tl.dot(runs, w, total)
        offset, inside = _results(tile, tiles, H, W, OUT_STRIDE, C_OUT, TY, TX, N, LANES)
        offset += sample * D * H * W * OUT_STRIDE + out_first
        if BIAS:
            total += tl.load(bias + out_first + channel).to(tl.float32)[None, :]
        if FINISH:
            _, _, a, b = affine(mean, variance, scale, shift, 0, out_first + channel, OUT_STRIDE, EPS, AFFINE)
            total = after_norm(before_norm(total, ACT) * a[None, :] + b[None, :], ACT)
        if RESIDUAL:
            total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        result = total.to(out.dtype.element_ty)
        tl.store(out + offset, result, mask=inside)
        if MOMENTS:
            value = before_norm(result.to(tl.float32), ACT)
            if step == 0:
                origin = first_row(tl.reshape(first_row(value), (TY * TX, LANES)))
            value = tl.reshape(value, (BLOCK, TY * TX, LANES))
            value = tl.where(tl.reshape(inside, (BLOCK, TY * TX, LANES)), value - origin[None, None, :], 0.0)
            first += tl.sum(value, 1)
            second += tl.sum(value * value, 1)
            _, row, column = _place(tile, H, W, TY, TX)
            voxels += tl.where(tile < tiles, tl.minimum(H - row, TY) * tl.minimum(W - column, TX), 0)
    if MOMENTS:
        out_channel = tl.arange(0, LANES)
        store_moments(
            partial_mean, partial_m2, partial_count, sample * tl.num_programs(0) + tl.program_id(0), OUT_STRIDE,
            out_first + out_channel, out_channel < C_OUT, origin, tl.sum(first, 0), tl.sum(second, 0),
            tl.sum(voxels, 0).to(tl.float32),
        )  # fmt: skip
