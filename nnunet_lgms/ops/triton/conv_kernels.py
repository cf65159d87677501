"""Triton kernels of the narrow dense convolution: an implicit matrix product over channels-last maps.

A map is (B, D, H, W, C) in memory. What bounds this product on narrow maps is not arithmetic but how often a voxel is
loaded, 27 times if every output asks for its own neighbours. So one row of the product makes a tile of TY x TX
neighbouring outputs: their inputs along x, TX + KX - 1 voxels with all channels, are one contiguous run of memory (K
numbers), their results N = TY * TX * LANES numbers (C_out and what fills a power of two), and the weights a K x N band
matrix for each of the KZ * (TY + KY - 1) input rows, which `_conv_band_kernel` writes. The input gradient is the same
product with a mirrored band. Sums are in float32. There are two ways to go through a map:

* `_conv_sweep_kernel`, for kernels of 3 along the outermost axis: a program keeps its block of tiles of a plane and
  walks through the planes. An input plane is loaded once for the three planes of outputs that it belongs to, whose sums
  wait side by side in registers, and one product serves all three. Band matrices stay in shared memory for the whole
  walk; where shared memory has room for them, the inputs of the next planes arrive meanwhile. With more than 8 channels
  to read, or 16 to write, a tile is one output and a product takes one tap along x, so that a band has no zeros; with
  fewer, it takes two outputs and their run, because a product wants 16 numbers. A 2D map counts as planes of one row,
  (H, 1, W), so that its rows are walked.
* `_conv_flat_kernel`, for all else: the tiles of all planes one after the other, each by itself. With tiles of 2 x 2,
  an output of a 3^3 kernel costs 3 loads of 4 voxels. A 2D map is one plane, (1, H, W), and to a kernel of 1 any map
  is one row.

A product may read some channels of a map and write some channels of another: groups are a launch each, and the two
halves of a Fusion block's input need not be concatenated. It may have an epilogue: the norm and activation behind the
convolution, where the norm's statistics are known before (batch norm in prediction).

Every version of a kernel costs a first step seconds of compilation. So what differs from map to map is a run-time value
without a version for multiples of 16: the channels of a map, which are constants, say how its loads are aligned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.memory_format import map_memory
from nnunet_lgms.ops.of_weights import of_weights
from nnunet_lgms.ops.triton import device
from nnunet_lgms.ops.triton.activation import CODES, affine, after_norm, before_norm

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

MAX_N = 64  # results of a tile that does not sweep, beyond that it shrinks
MAX_SWEEP_N = 32  # results of a tile that sweeps, which has four times as many sums in registers
SWEEP_BLOCK = 64  # tiles of a program that sweeps
PLANES = 16, 64  # of outputs that a program sweeps, at least and at most; it loads two more
PROGRAMS = 512  # are enough for a sweep, which walks further rather than have more
STAGING = 4096  # bytes of shared memory, through which a sweep writes its results
LEAST_FULL = 0.75  # of the blocks of a plane: a sweep does not fill them with tiles of the next
BAND_NUMBERS = 1024  # of the band matrices, that one program writes
SUMS_STAY = hasattr(triton, "knobs")  # in registers: Triton 3.3 moves them from plane to plane through shared memory


class Tiling(NamedTuple):
    """Sizes of the product for one convolution."""

    kz: int
    ky: int
    kx: int
    ty: int
    tx: int
    c_in: int
    c_out: int

    @classmethod
    def of(cls, kernel: Sequence[int], c_in: int, c_out: int, sweeps: bool) -> Tiling:
        kz, ky, kx = as_3d(kernel, sweeps)
        tx = 2 if kx == 3 and not (sweeps and (c_in > 8 or c_out > 16)) else 1
        ty = 2 if ky == 3 and not sweeps and 2 * tx * c_out <= MAX_N else 1
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
        """Numbers of an input row that a tile reads."""
        return (self.tx + self.kx - 1) * self.c_in

    @property
    def k(self) -> int:
        """Numbers of an input row that one product takes: those of a tap if the tile is one output, else the run."""
        return max(16, triton.next_power_of_2(self.c_in if self.tx == 1 else self.run))

    @property
    def products(self) -> int:
        """Products that an input row goes into, for the planes of outputs together."""
        return self.kx if self.tx == 1 else 1

    @property
    def n(self) -> int:
        return self.ty * self.tx * self.lanes

    def constants(self) -> dict[str, int]:
        return {
            "C_IN": self.c_in,
            "C_OUT": self.c_out,
            "KZ": self.kz,
            "KY": self.ky,
            "KX": self.kx,
            "TY": self.ty,
            "TX": self.tx,
            "K": self.k,
            "N": self.n,
            "LANES": self.lanes,
        }


def as_3d(sizes: Sequence[int], sweeps: bool) -> tuple[int, ...]:
    """Sizes of a map or of a kernel, those of 2D as of one plane, or of planes of one row where these are walked."""
    if len(sizes) == 3:
        return tuple(sizes)
    return (sizes[0], 1, sizes[1]) if sweeps else (1, *sizes)


class _LaunchGrid(NamedTuple):
    """How one convolution is launched: by which kernel, with which tiles and programs."""

    function: JITFunction
    tiling: Tiling
    size: tuple[int, ...]  # of the map, as the kernel sees it
    tiles: int  # of a plane that is swept, else of a sample
    block: int  # tiles that a program holds at once
    steps: int  # planes that a program sweeps, else 1
    programs: int  # of a sample
    options: dict[str, int]  # of the compiler

    @classmethod
    def of(cls, x: Tensor, kernel: Sequence[int], c_in: int, c_out: int) -> _LaunchGrid:
        """The better grid for c_in channels of a map like x to c_out."""
        return cls._sweep(x, kernel, c_in, c_out) or cls._flat(x, kernel, c_in, c_out)

    @classmethod
    def _sweep(cls, x: Tensor, kernel: Sequence[int], c_in: int, c_out: int) -> _LaunchGrid | None:
        """The grid that sweeps through the map, or None where the other way is better."""
        t, size = Tiling.of(kernel, c_in, c_out, True), as_3d(x.shape[2:], True)
        depth, height, width = size
        tiles = height * triton.cdiv(width, t.tx)
        blocks = triton.cdiv(tiles, SWEEP_BLOCK)
        stages = _sweep_stages(t, x)
        if t.kz != 3 or t.n > MAX_SWEEP_N or tiles < LEAST_FULL * blocks * SWEEP_BLOCK or stages == 0:
            return None
        least, most = PLANES
        if c_in == 1:  # loads of 2 bytes are not copied asynchronously, so more programs hide them
            most //= 2
        steps = min(max(blocks * x.shape[0] * depth // PROGRAMS, least), most)
        steps = triton.cdiv(depth, triton.cdiv(depth, steps))
        programs = blocks * triton.cdiv(depth, steps)
        options = {"num_warps": 4, "num_stages": stages}
        return cls(_conv_sweep_kernel, t, size, tiles, SWEEP_BLOCK, steps, programs, options)

    @classmethod
    def _flat(cls, x: Tensor, kernel: Sequence[int], c_in: int, c_out: int) -> _LaunchGrid:
        t, size = Tiling.of(kernel, c_in, c_out, False), as_3d(x.shape[2:], False)
        block, options = _flat_options(t)
        if t.kz * t.ky * t.kx == 1:  # voxels without neighbours: the kernel knows their places without a division
            size = (1, 1, math.prod(size))
        depth, height, width = size
        tiles = depth * triton.cdiv(height, t.ty) * triton.cdiv(width, t.tx)
        return cls(_conv_flat_kernel, t, size, tiles, block, 1, triton.cdiv(tiles, block), options)


def _sweep_stages(t: Tiling, x: Tensor) -> int:
    """Planes of inputs that are on their way or at hand: as many as leave room for a second program; 0: none fits."""
    inputs = t.ky * t.products * SWEEP_BLOCK * t.k * x.element_size()
    others = t.ky * t.products * t.k * 4 * t.n * x.element_size()  # the bands
    others += STAGING if SUMS_STAY else SWEEP_BLOCK * 4 * t.n * 4
    room = device.sizes(x.device).shared_memory
    return next((n for n in (3, 2) if others + n * inputs <= room // 2), int(others <= room))


def _flat_options(t: Tiling) -> tuple[int, dict[str, int]]:
    if t.rows == 1 and t.n <= 32:
        return 128, {"num_warps": t.n // 8, "num_stages": 2}  # more warps would find the same places once more
    return 64, {"num_warps": 4, "num_stages": 3}


class Epilogue(NamedTuple):
    """Norm with given statistics, activation and residual behind a convolution; tensors of (C_out,) or None."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str
    residual: Tensor | None


def convolve(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int, epilogue: Epilogue | None = None
) -> Tensor:
    """One map or one for each group, (B, C_in, *spatial) channels-last -> (B, C_out, *spatial) channels-last.

    weight is (C_out, C_in / groups, *k).
    """
    grid = _LaunchGrid.of(xs[0], weight.shape[2:], weight.shape[1], weight.shape[0] // groups)
    out = map_memory(xs[0], weight.shape[0], xs[0].shape[2:])
    for group in range(groups):
        x, part = (xs[0], group) if len(xs) == 1 else (xs[group], 0)
        _launch(grid, x, part, out, group, weight, group, bias, epilogue, False)
    return out.movedim(-1, 1)


def convolve_transposed(grad: Tensor, weight: Tensor, groups: int, parts: int) -> list[Tensor]:
    """Gradient of the output -> that of the input, in one map or in one for each group."""
    c_out, c_in = weight.shape[0] // groups, weight.shape[1]
    outs = [map_memory(grad, c_in * groups // parts, grad.shape[2:]) for _ in range(parts)]
    grid = _LaunchGrid.of(grad, weight.shape[2:], c_out, c_in)
    for group in range(groups):
        out, part = (outs[0], group) if parts == 1 else (outs[group], 0)
        _launch(grid, grad, group, out, part, weight, group, None, None, True)
    return [out.movedim(-1, 1) for out in outs]


def _launch(
    grid: _LaunchGrid, x: Tensor, x_part: int, out: Tensor, out_part: int, weight: Tensor, group: int,
    bias: Tensor | None, epilogue: Epilogue | None, mirrored: bool,
) -> None:  # fmt: skip
    """Convolves a part of the channels of x with the weights of a group to a part of those of the memory `out`."""
    t = grid.tiling
    band = of_weights(_band_matrices, weight, group, mirrored, t, x.dtype)
    norm, eps, activation, residual = (None,) * 4, 0.0, "none", None
    if epilogue is not None:
        *norm, eps, activation, residual = epilogue
    launch(wrap_triton(grid.function))[(grid.programs, x.shape[0])](
        x, x_part, band, bias, *norm, residual, out, out_part, grid.steps, grid.tiles, *grid.size,
        X_STRIDE=x.shape[1], OUT_STRIDE=out.shape[-1], BIAS=bias is not None, EPILOGUE=epilogue is not None, EPS=eps,
        AFFINE=norm[2] is not None, ACT=CODES[activation], RESIDUAL=residual is not None, BLOCK=grid.block,
        **t.constants(), **grid.options,
    )  # fmt: skip


def _band_matrices(weight: Tensor, group: int, mirrored: bool, t: Tiling, dtype: torch.dtype) -> Tensor:
    """The band matrices of a group, (rows, run, N)."""
    band = torch.empty((t.rows, t.run, t.n), dtype=dtype, device=weight.device)
    launch(wrap_triton(_conv_band_kernel))[(triton.cdiv(band.numel(), BAND_NUMBERS),)](
        weight.contiguous(), band, group * t.c_in * t.c_out * math.prod(weight.shape[2:]), int(mirrored), band.numel(),
        t.run, t.n, t.lanes, t.c_in, t.c_out, t.kz, t.ky, t.kx, t.ty, t.tx, NUMBERS=BAND_NUMBERS,
    )  # fmt: skip
    return band


@triton.jit(
    do_not_specialize=[
        "weight_first", "mirrored", "numbers", "run", "n_results", "lanes", "c_in", "c_out", "kz", "ky", "kx", "ty",
        "tx",
    ]
)  # fmt: skip
def _conv_band_kernel(
    weight,  # (groups * c_out, c_in, kz, ky, kx)
    band,  # (rows, run, n_results)
    weight_first, mirrored, numbers, run, n_results, lanes, c_in, c_out, kz, ky, kx, ty, tx,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Output (oy, ox, o) of a tile meets input (r, column, i) of a row with tap (r - oy, column - ox), else zero."""
    place = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    n, k, row = place % n_results, place // n_results % run, place // (n_results * run)
    dz, r = row // (ty + ky - 1), row % (ty + ky - 1)
    column, i = k // c_in, k % c_in
    oy, ox, o = n // (tx * lanes), n // lanes % tx, n % lanes
    dy, dx = r - oy, column - ox
    taps = kz * ky * kx
    tap = (dz * ky + dy) * kx + dx
    source = tl.where(mirrored != 0, (i * c_out + o) * taps + taps - 1 - tap, (o * c_in + i) * taps + tap)
    meets = (place < numbers) & (o < c_out) & (dy >= 0) & (dy < ky) & (dx >= 0) & (dx < kx)
    w = tl.load(weight + weight_first + source, mask=meets, other=0.0)
    tl.store(band + place, w.to(band.dtype.element_ty), mask=place < numbers)


@triton.jit
def _place(tile, H, W, TY: tl.constexpr, TX: tl.constexpr, ONE_ROW: tl.constexpr):
    """Plane, first row and first column of a tile; a map of one row, of kernels of 1, costs no divisions."""
    plane, row, column = tl.zeros_like(tile), tl.zeros_like(tile), tile
    if not ONE_ROW:
        columns, rows = (W + TX - 1) // TX, (H + TY - 1) // TY
        plane, row, column = tile // (columns * rows), (tile // columns) % rows * TY, tile % columns * TX
    return plane, row, column


@triton.jit
def _runs(tile, tiles, H, W, X_STRIDE: tl.constexpr, C_IN: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr,
          TX: tl.constexpr, K: tl.constexpr, ONE_ROW: tl.constexpr):  # fmt: skip
    """(BLOCK, K) offsets of the inputs in the first row of every tile, and which of them lie inside that row."""
    plane, row, column = _place(tile, H, W, TY, TX, ONE_ROW)
    k = tl.arange(0, K)
    columns = column[:, None] + (k // C_IN)[None, :] - KX // 2
    inside = (tile < tiles)[:, None] & (columns >= 0) & (columns < W) & (k < (TX + KX - 1) * C_IN)[None, :]
    first = (plane * H + row) * W + column - KX // 2
    within = k if X_STRIDE == C_IN else k // C_IN * X_STRIDE + k % C_IN
    return first[:, None] * X_STRIDE + within[None, :], inside


@triton.jit
def _band(band, row, C_IN: tl.constexpr, KX: tl.constexpr, TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """(K, N) band matrix of an input row."""
    k, n = tl.arange(0, K)[:, None], tl.arange(0, N)[None, :]
    run: tl.constexpr = (TX + KX - 1) * C_IN
    return tl.load(band + (row * run + k) * N + n, mask=k < run, other=0.0)


@triton.jit
def _results(tile, tiles, H, W, OUT_STRIDE: tl.constexpr, C_OUT: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
             N: tl.constexpr, LANES: tl.constexpr, ONE_ROW: tl.constexpr):  # fmt: skip
    """(BLOCK, N) offsets of the results of every tile, and which of them lie inside the map."""
    plane, row, column = _place(tile, H, W, TY, TX, ONE_ROW)
    n = tl.arange(0, N)
    oy, ox = n // (TX * LANES), n // LANES % TX
    y, columns = row[:, None] + oy[None, :], column[:, None] + ox[None, :]
    inside = (tile < tiles)[:, None] & (y < H) & (columns < W) & (n % LANES < C_OUT)[None, :]
    first = (plane * H + row) * W + column
    return first[:, None] * OUT_STRIDE + (oy * W * OUT_STRIDE + ox * OUT_STRIDE + n % LANES)[None, :], inside


@triton.jit
def _epilogue(
    total, offset, inside, bias, mean, variance, norm_weight, norm_bias, residual, out_first, OUT_STRIDE: tl.constexpr,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, C_OUT: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds the bias, then norm with known statistics, activation and residual."""
    channel = out_first + tl.minimum(tl.arange(0, N) % LANES, C_OUT - 1)
    if BIAS:
        total += tl.load(bias + channel).to(tl.float32)[None, :]
    if EPILOGUE:
        _, _, a, b = affine(mean, variance, norm_weight, norm_bias, 0, channel, OUT_STRIDE, EPS, AFFINE)
        total = after_norm(before_norm(total, ACT, DTYPE) * a[None, :] + b[None, :], ACT, DTYPE)
    if RESIDUAL:
        total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["x_part", "out_part", "steps", "tiles", "D", "H", "W"])
def _conv_flat_kernel(
    x,  # (B, D, H, W, X_STRIDE), of which C_IN channels are read, those of part x_part
    x_part,
    band,  # (rows, run, N), as `_conv_band_kernel` writes it
    bias,  # (OUT_STRIDE,), if BIAS
    mean, variance, norm_weight, norm_bias,  # (OUT_STRIDE,) each, if EPILOGUE
    residual,  # like out, if RESIDUAL
    out,  # (B, D, H, W, OUT_STRIDE), of which C_OUT channels are written, those of part out_part
    out_part, steps, tiles, D, H, W, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr,
    TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tiles of a sample."""
    ONE_ROW: tl.constexpr = KZ * KY * KX == 1
    sample, out_first = tl.program_id(1), out_part * C_OUT
    x += sample * D * H * W * X_STRIDE + x_part * C_IN
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane, row, _ = _place(tile, H, W, TY, TX, ONE_ROW)
    runs, in_row = _runs(tile, tiles, H, W, X_STRIDE, C_IN, KX, TY, TX, K, ONE_ROW)
    total = tl.zeros((BLOCK, N), tl.float32)
    for i in range(KZ * (TY + KY - 1)):
        dz, dy = i // (TY + KY - 1) - KZ // 2, i % (TY + KY - 1) - KY // 2
        exists = (row + dy >= 0) & (row + dy < H) & (plane + dz >= 0) & (plane + dz < D)
        run = tl.load(x + (dz * H + dy) * W * X_STRIDE + runs, mask=in_row & exists[:, None], other=0.0)
        total = tl.dot(run, _band(band, i, C_IN, KX, TX, K, N), total)
    offset, inside = _results(tile, tiles, H, W, OUT_STRIDE, C_OUT, TY, TX, N, LANES, ONE_ROW)
    offset += sample * D * H * W * OUT_STRIDE + out_first
    total = _epilogue(
        total, offset, inside, bias, mean, variance, norm_weight, norm_bias, residual, out_first, OUT_STRIDE, BIAS,
        EPILOGUE, EPS, AFFINE, ACT, RESIDUAL, C_OUT, N, LANES, out.dtype.element_ty,
    )  # fmt: skip
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _input(
    x, tile, tiles, plane, dy, dx, D, H, W, X_STRIDE: tl.constexpr, C_IN: tl.constexpr, TX: tl.constexpr,
    COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(BLOCK, K) inputs of every tile: COLUMNS voxels of a plane from (dy, dx) off the tile's first output."""
    _, row, column = _place(tile, H, W, 1, TX, False)
    k = tl.arange(0, K)
    planes = tl.zeros_like(tile) + plane  # the interpreter has no masks of single numbers
    exists = (tile < tiles) & (row + dy >= 0) & (row + dy < H) & (planes >= 0) & (planes < D)
    columns = (column + dx)[:, None] + (k // C_IN)[None, :]
    inside = exists[:, None] & (columns >= 0) & (columns < W) & (k < COLUMNS * C_IN)[None, :]
    within = k if X_STRIDE == C_IN else k // C_IN * X_STRIDE + k % C_IN
    first = (row * W + column) * X_STRIDE
    x += ((plane * H + dy) * W + dx) * X_STRIDE
    return tl.load(x + first[:, None] + within[None, :], mask=inside, other=0.0)


@triton.jit
def _bands(band, dy, dx, C_IN: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TX: tl.constexpr,
           COLUMNS: tl.constexpr, K: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """(K, 4 N) band matrices of an input for the planes of outputs before it, here, behind it, and nothing."""
    k, n = tl.arange(0, K)[:, None], tl.arange(0, 4 * N)[None, :]
    run: tl.constexpr = (TX + KX - 1) * C_IN
    dz = 2 - n // N
    place = ((dz * KY + dy) * run + dx * C_IN + k) * N + n % N
    return tl.load(band + place, mask=(k < COLUMNS * C_IN) & (dz >= 0), other=0.0)


@triton.jit
def _next_plane(sums, BLOCK: tl.constexpr, N: tl.constexpr):
    """(BLOCK, 4 N) sums of three planes -> those of the first, (BLOCK, N), and all moved on by a plane.

    What moves are the names of registers.
    """
    halves = tl.permute(tl.reshape(sums, (BLOCK, 2, 2, N)), (0, 3, 2, 1))
    even, odd = tl.split(halves)  # (BLOCK, N, 2) each
    before, here = tl.split(even)
    behind, _ = tl.split(odd)  # which is not zero but NaN, where an input is infinite
    nothing = tl.zeros((BLOCK, N), tl.float32)
    moved = tl.join(tl.join(here, behind), tl.join(nothing, nothing))
    return before, tl.reshape(tl.permute(moved, (0, 3, 2, 1)), (BLOCK, 4 * N))


@triton.jit(do_not_specialize=["x_part", "out_part", "steps", "tiles", "D", "H", "W"])
def _conv_sweep_kernel(
    x,  # (B, D, H, W, X_STRIDE), of which C_IN channels are read, those of part x_part
    x_part,
    band,  # (rows, run, N), as `_conv_band_kernel` writes it
    bias,  # (OUT_STRIDE,), if BIAS
    mean, variance, norm_weight, norm_bias,  # (OUT_STRIDE,) each, if EPILOGUE
    residual,  # like out, if RESIDUAL
    out,  # (B, D, H, W, OUT_STRIDE), of which C_OUT channels are written, those of part out_part
    out_part, steps, tiles, D, H, W, X_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, TY: tl.constexpr,
    TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tiles in `steps` planes of a sample."""
    COLUMNS: tl.constexpr = 1 if TX == 1 else TX + KX - 1  # of an input row, that one product takes
    LOADS: tl.constexpr = TX + KX - COLUMNS  # of an input row
    sample, out_first = tl.program_id(1), out_part * C_OUT
    places = (tiles + BLOCK - 1) // BLOCK
    begin = tl.program_id(0) // places * steps
    end = tl.minimum(begin + steps, D)
    x += sample * D * H * W * X_STRIDE + x_part * C_IN
    tile = tl.program_id(0) % places * BLOCK + tl.arange(0, BLOCK)
    offset, in_plane = _results(tile, tiles, H, W, OUT_STRIDE, C_OUT, TY, TX, N, LANES, False)
    offset += sample * D * H * W * OUT_STRIDE + out_first
    bands = ()
    for i in tl.static_range(KY * LOADS):
        bands = bands + (_bands(band, i // LOADS, i % LOADS, C_IN, KY, KX, TX, COLUMNS, K, N),)
    # Sums of the outputs in the plane before the one that is read, in this one and in the next.
    sums = tl.zeros((BLOCK, 4 * N), tl.float32)
    for plane in range(begin - 1, end + 1):
        for i in tl.static_range(KY * LOADS):
            dy, dx = i // LOADS - KY // 2, i % LOADS - KX // 2
            values = _input(x, tile, tiles, plane, dy, dx, D, H, W, X_STRIDE, C_IN, TX, COLUMNS, K)
            sums = tl.dot(values, bands[i], sums)
        total, sums = _next_plane(sums, BLOCK, N)
        # The first two planes complete no output of this walk.
        planes = tl.zeros((BLOCK,), tl.int32) + plane
        place, inside = offset + (plane - 1) * H * W * OUT_STRIDE, in_plane & (planes > begin)[:, None]
        total = _epilogue(
            total, place, inside, bias, mean, variance, norm_weight, norm_bias, residual, out_first, OUT_STRIDE, BIAS,
            EPILOGUE, EPS, AFFINE, ACT, RESIDUAL, C_OUT, N, LANES, out.dtype.element_ty,
        )  # fmt: skip
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
