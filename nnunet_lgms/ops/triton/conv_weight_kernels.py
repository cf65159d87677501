"""Triton kernels of the weight gradient of the narrow dense convolution, over channels-last maps.

It is the product of `conv_kernels.py` turned round: there, a tile of TX neighbouring results is the product of its run
of inputs and a band matrix of the weights; here, the tiles' gradients times their runs, summed over all tiles, are the
gradient of that band matrix, in which a weight stands TX times, along a diagonal. cuDNN takes two to five times as long
(4 to 32 channels, 128^3 on an H100), computes groups as if all were connected, and wants the maps of the groups copied
into one.

`_conv_weight_gradient_kernel` walks through the planes of a map, for one of the KY rows that a tile reads: a run is
loaded once for the three planes of results that it belongs to, whose gradients wait in registers. Every program writes
its sums, in float32, and `_conv_weight_reduce_kernel` adds them and the diagonals up in a fixed order, so gradients
repeat bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.triton.conv_kernels import Tiling, as_3d, place_of, results_of, runs_of

BLOCK = 64  # tiles that a program multiplies at once
PROGRAMS = 512  # that a map is spread over, at most twice as many: each writes its sums
REDUCED = {"ROWS": 32, "COLUMNS": 64}  # programs and weights that are added up at once


def weight_gradient(grad: Tensor, xs: Sequence[Tensor], weight: Tensor, groups: int) -> Tensor:
    """Gradient of ``weight``, (C_out, C_in / groups, *k), in float32.

    Args:
        grad: of the result, (B, C_out, *spatial) channels-last.
        xs: one map or one for each group, channels-last, of the dtype of ``grad``.
        weight: with kernels of 1 and 3; only its shape is read.
        groups: groups of the convolution.
    """
    out = torch.empty(tuple(weight.shape), dtype=torch.float32, device=grad.device)
    for group in range(groups):
        x, part = (xs[0], group) if len(xs) == 1 else (xs[group], 0)
        _launch(grad, group, x, part, out, weight.shape[0] // groups)
    return out


def _launch(grad: Tensor, group: int, x: Tensor, x_part: int, out: Tensor, c_out: int) -> None:
    kernel, c_in = out.shape[2:], out.shape[1]
    sweeps = kernel[0] == 3  # a 2D map counts as planes of one row, so that its rows are walked
    t = Tiling.of(kernel, c_in, c_out, sweeps)._replace(ty=1)
    depth, height, width = as_3d(x.shape[2:], sweeps)
    tiles = height * triton.cdiv(width, t.tx)
    blocks, rows = triton.cdiv(tiles, BLOCK), t.ky * x.shape[0]
    steps = triton.cdiv(depth, min(depth, max(1, PROGRAMS // (blocks * rows))))
    walks = blocks * triton.cdiv(depth, steps)  # of a row and sample
    grid = triton.cdiv(walks, triton.cdiv(walks * rows, 2 * PROGRAMS)) * t.ky, x.shape[0]
    partial = torch.empty((math.prod(grid), t.kz, t.n, t.k), dtype=torch.float32, device=x.device)
    launch(wrap_triton(_conv_weight_gradient_kernel))[grid](
        grad, group, x, x_part, partial, walks, steps, tiles, depth, height, width, GRAD_STRIDE=grad.shape[1],
        X_STRIDE=x.shape[1], BLOCK=BLOCK, **_of_gradient(t), num_warps=8 if t.n * t.k >= 4096 else 4, num_stages=2,
    )  # fmt: skip
    weights = c_out * c_in * math.prod(kernel)
    launch(wrap_triton(_conv_weight_reduce_kernel))[(triton.cdiv(weights, REDUCED["COLUMNS"]),)](
        partial, out, group * weights, weights, math.prod(grid) // t.ky, t.c_in, t.c_out, t.kz, t.ky, t.kx, t.k, t.n,
        t.lanes, TX=t.tx, **REDUCED,
    )  # fmt: skip


def _of_gradient(t: Tiling) -> dict[str, int]:
    constants = t.constants()
    del constants["TY"]
    return constants


@triton.jit
def _gradients(grad, offset, in_plane, plane, D, plane_size):
    """(BLOCK, N) gradients of the tiles in a plane, zero outside of the map."""
    planes = tl.zeros((offset.shape[0],), tl.int32) + plane  # the interpreter has no masks of single numbers
    exists = (planes >= 0) & (planes < D)
    return tl.load(grad + plane * plane_size + offset, mask=in_plane & exists[:, None], other=0.0)


@triton.jit(do_not_specialize=["grad_part", "x_part", "walks", "steps", "tiles", "D", "H", "W"])
def _conv_weight_gradient_kernel(
    grad,  # (B, D, H, W, GRAD_STRIDE), of which C_OUT channels are read, those of part grad_part
    grad_part,
    x,  # (B, D, H, W, X_STRIDE), of which C_IN channels are read, those of part x_part
    x_part,
    partial,  # (B, programs / KY, KY, KZ, N, K)
    walks, steps, tiles, D, H, W,  # walks of a sample, planes of each, and tiles of a plane
    GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, KZ: tl.constexpr,
    KY: tl.constexpr, KX: tl.constexpr, TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some walks of a sample, each with a block of tiles through `steps` planes, and one of the rows that they read."""
    dy, sample = tl.program_id(0) % KY, tl.program_id(1)
    blocks = (tiles + BLOCK - 1) // BLOCK
    x += sample * D * H * W * X_STRIDE + x_part * C_IN + (dy - KY // 2) * W * X_STRIDE
    grad += sample * D * H * W * GRAD_STRIDE + grad_part * C_OUT
    plane_size = H * W * GRAD_STRIDE

    # An input plane belongs to the results of the plane behind it by its first tap, and so on.
    first, middle, last = (tl.zeros((N, K), tl.float32), tl.zeros((N, K), tl.float32), tl.zeros((N, K), tl.float32))
    for walk in range(tl.program_id(0) // KY, walks, tl.num_programs(0) // KY):
        begin = walk // blocks * steps
        end = tl.minimum(begin + steps, D)
        tile = walk % blocks * BLOCK + tl.arange(0, BLOCK)
        _, row, _ = place_of(tile, H, W, 1, TX)
        row += dy - KY // 2
        runs, in_row = runs_of(tile, tiles, H, W, X_STRIDE, C_IN, KX, 1, TX, K)
        in_row = in_row & ((row >= 0) & (row < H))[:, None]
        offset, in_plane = results_of(tile, tiles, H, W, GRAD_STRIDE, C_OUT, 1, TX, N, LANES)
        here = _gradients(grad, offset, in_plane, begin, D, plane_size)
        before = here
        if KZ == 3:
            before = _gradients(grad, offset, in_plane, begin - 1, D, plane_size)
        for plane in range(begin, end):
            run = tl.load(x + plane * H * W * X_STRIDE + runs, mask=in_row, other=0.0)
            behind = _gradients(grad, offset, in_plane, plane + 1, D, plane_size)
            middle = tl.dot(tl.trans(here), run, middle)
            if KZ == 3:
                first = tl.dot(tl.trans(behind), run, first)
                last = tl.dot(tl.trans(before), run, last)
            before, here = here, behind
    matrix = tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]
    partial += (sample * tl.num_programs(0) + tl.program_id(0)) * KZ * N * K
    if KZ == 3:
        tl.store(partial + matrix, first)
        tl.store(partial + N * K + matrix, middle)
        tl.store(partial + 2 * N * K + matrix, last)
    else:
        tl.store(partial + matrix, middle)


@triton.jit(
    do_not_specialize=[
        "out_first", "weights", "programs", "c_in", "c_out", "kz", "ky", "kx", "k_results", "n_results", "lanes",
    ]
)  # fmt: skip
def _conv_weight_reduce_kernel(
    partial,  # (programs, ky, kz, n_results, k_results)
    out,  # (groups * c_out, c_in, kz, ky, kx)
    out_first, weights, programs, c_in, c_out, kz, ky, kx, k_results, n_results, lanes,
    TX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of COLUMNS weights: over the programs, and over the results of a tile."""
    weight = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i, o, tap = weight % c_in, weight // c_in % c_out, weight // (c_in * c_out)
    dx, dy, dz = tap % kx, tap // kx % ky, tap // (kx * ky)
    matrix = n_results * k_results
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        inside = (program < programs)[:, None] & (weight < weights)[None, :]
        first = (program[:, None] * ky + dy[None, :]) * kz * matrix + dz[None, :] * matrix
        for ox in tl.static_range(TX):
            place = (ox * lanes + o) * k_results + (ox + dx) * c_in + i
            total += tl.load(partial + first + place[None, :], mask=inside, other=0.0)
    tl.store(out + out_first + (o * c_in + i) * kz * ky * kx + tap, tl.sum(total, 0), mask=weight < weights)
