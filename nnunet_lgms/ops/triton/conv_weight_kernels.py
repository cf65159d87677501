"""Triton kernels of the weight gradient of the narrow dense convolution, over channels-last maps.

It is the product of `conv_kernels.py` turned round: there, a tile of TX neighbouring results is the product of its run
of inputs and a band matrix of the weights, for each of the KZ * KY rows that it reads; here, the runs times the tiles'
gradients, summed over all tiles, are the gradients of those matrices, in which a weight stands TX times, along a
diagonal. cuDNN computes groups as if all were connected, and wants the maps of the groups copied into one.

A tile has KZ * KY pairs of a run and of gradients. A program that holds the runs of one plane, KY of them, and the
gradients of the KZ planes that they belong to, loads KZ + KY and multiplies each with each. So a program of
`_conv_weight_gradient_kernel` goes from place to place of a map, a block of tiles of a plane at a time, and keeps the
KZ * KY sums in registers, in float32. Of more channels than registers hold, it takes a part; the programs of the other
parts run beside it and find its loads in the L2 cache. All have as many places, and `_conv_weight_reduce_kernel` adds
their sums and the diagonals up in a fixed order, so gradients repeat bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.triton import device
from nnunet_lgms.ops.triton.conv_kernels import Tiling, as_3d

MAX_K = 64  # numbers of a run, beyond that its channels are summed in parts
MAX_SUMS = 9 * 64 * 32  # numbers that a program keeps
WEIGHTS, TOGETHER = 16, 128  # of which a program adds up the sums, and how many of each at once


class _Product(NamedTuple):
    """What a program sums: bands of some input and output channels of a group."""

    tiling: Tiling  # for a part of the channels
    in_parts: int  # of a group, as out_parts
    out_parts: int

    @classmethod
    def of(cls, weight: Tensor, groups: int) -> _Product:
        kz, ky, kx = as_3d(weight.shape[2:], False)
        c_in, c_out = weight.shape[1], weight.shape[0] // groups
        tx = 1 if kx == 1 else 2
        while kx > 1 and (2 * tx + kx - 1) * c_in <= 16:  # a product has no fewer numbers
            tx *= 2
        in_parts = triton.cdiv(c_in * (tx + kx - 1), MAX_K)
        t = Tiling(kz, ky, kx, 1, tx, triton.cdiv(c_in, in_parts), c_out)
        most = MAX_SUMS // (t.rows * t.k * tx)
        out_parts = triton.cdiv(c_out, 1 << most.bit_length() - 1)
        return cls(t._replace(c_out=triton.cdiv(c_out, out_parts)), in_parts, out_parts)

    def constants(self) -> dict[str, int]:
        constants = {**self.tiling.constants(), "IN_PARTS": self.in_parts, "OUT_PARTS": self.out_parts}
        del constants["TY"]
        return constants


class _Options(NamedTuple):
    """Of a launch."""

    block: int  # tiles that a program holds at once
    occupancy: int  # programs for every processor
    compiler: dict[str, int]

    @classmethod
    def of(cls, t: Tiling) -> _Options:
        if t.rows == 1:
            return cls(128, 8, {"num_warps": 4 if t.k * t.n > 1024 else 2, "num_stages": 3})
        if t.rows * t.k * t.n > MAX_SUMS // 2:  # more tiles at once would not fit the registers
            return cls(32, 2, {"num_warps": 4, "num_stages": 3})
        return cls(64, 4, {"num_warps": 4, "num_stages": 2})


def _across(height: int, width: int, block: int) -> int:
    """Tiles of a block along x, so that blocks of so many tiles cover a plane of height x width tiles with fewest."""

    def blocks(across: int) -> tuple[int, int]:
        return triton.cdiv(width, across) * triton.cdiv(height, block // across), -across

    return min((1 << i for i in range(block.bit_length())), key=blocks)


def weight_gradient(grad: Tensor, xs: Sequence[Tensor], weight: Tensor, groups: int) -> Tensor:
    """Gradient of ``weight``, (C_out, C_in / groups, *k), in float32.

    Args:
        grad: of the result, (B, C_out, *spatial) channels-last.
        xs: one map or one for each group, channels-last, of the dtype of ``grad``.
        weight: with kernels of 1 and 3; only its shape is read.
        groups: groups of the convolution.
    """
    p = _Product.of(weight, groups)
    t, options = p.tiling, _Options.of(p.tiling)
    depth, height, width = as_3d(grad.shape[2:], False)
    columns = triton.cdiv(width, t.tx)
    across = _across(height, columns, options.block)
    columns, rows = triton.cdiv(columns, across), triton.cdiv(height, options.block // across)
    places = grad.shape[0] * columns * rows * depth
    products = groups // len(xs) * p.in_parts * p.out_parts
    programs = min(places, triton.cdiv(options.occupancy * device.sizes(grad.device).processors, products))
    steps = triton.cdiv(places, programs)
    programs = triton.cdiv(places, steps)
    group_in, group_out = weight.shape[1], weight.shape[0] // groups
    sums = grad.new_empty((len(xs) * products, programs, t.rows, t.k, t.n), dtype=torch.float32)
    for i, x in enumerate(xs):
        launch(wrap_triton(_conv_weight_gradient_kernel))[(programs * products,)](
            x, grad, sums, i * products, products, steps, places, columns, rows, across, depth, height, width,
            X_STRIDE=x.shape[1], GRAD_STRIDE=grad.shape[1], GROUP_IN=group_in, GROUP_OUT=group_out,
            BLOCK=options.block, **p.constants(), **options.compiler,
        )  # fmt: skip
    out = torch.empty(tuple(weight.shape), dtype=torch.float32, device=grad.device)
    launch(wrap_triton(_conv_weight_reduce_kernel))[(triton.cdiv(out.numel(), WEIGHTS),)](
        sums, out, out.numel(), programs, group_in, group_out, t.c_in, t.c_out, p.in_parts, p.out_parts,
        math.prod(weight.shape[2:]), t.kx, t.tx, t.rows, t.k, t.n, t.lanes, WEIGHTS=WEIGHTS, TOGETHER=TOGETHER,
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=[
        "first_product", "products", "steps", "places", "columns", "rows", "across", "D", "H", "W",
    ]
)  # fmt: skip
def _conv_weight_gradient_kernel(
    x,  # (B, D, H, W, X_STRIDE)
    grad,  # (B, D, H, W, GRAD_STRIDE)
    sums,  # (all products, programs, KZ * KY, K, N), those of the products of x from first_product on
    first_product,
    products,  # of x: groups, parts of C_IN and parts of C_OUT channels
    steps,  # places of a program
    places,  # of the batch: blocks of tiles, in rows and columns of a plane
    columns, rows,
    across,  # tiles of a block along x
    D, H, W, X_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr, GROUP_IN: tl.constexpr, GROUP_OUT: tl.constexpr,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, IN_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, KZ: tl.constexpr,
    KY: tl.constexpr, KX: tl.constexpr, TX: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a product over some places."""
    PARTS: tl.constexpr = IN_PARTS * OUT_PARTS
    product, program = tl.program_id(0) % products, tl.program_id(0) // products
    in_first, out_first = product // OUT_PARTS % IN_PARTS * C_IN, product % OUT_PARTS * C_OUT  # in the group
    x += product // PARTS * GROUP_IN + in_first
    grad += (first_product + product) // PARTS * GROUP_OUT + out_first
    tile = tl.arange(0, BLOCK)
    down, right = tile // across, tile % across * TX  # from the first output of a block
    k, n = tl.arange(0, K), tl.arange(0, N)
    # (K, BLOCK) inputs and (BLOCK, N) results
    run_right = right[None, :] + (k // C_IN - KX // 2)[:, None]
    result_right = right[:, None] + (n // LANES)[None, :]
    within = k if X_STRIDE == C_IN else k // C_IN * X_STRIDE + k % C_IN
    run_offset = (down * W + right - KX // 2)[None, :] * X_STRIDE + within[:, None]
    result_offset = (down * W + right)[:, None] * GRAD_STRIDE + (n // LANES * GRAD_STRIDE + n % LANES)[None, :]
    is_input = (k < (TX + KX - 1) * C_IN) & (in_first + k % C_IN < GROUP_IN)
    is_result = (n % LANES < C_OUT) & (out_first + n % LANES < GROUP_OUT)
    total = ()
    for _ in tl.static_range(KZ * KY):
        total = total + (tl.zeros((K, N), tl.float32),)
    begin = program * steps
    for place in range(begin, tl.minimum(begin + steps, places)):
        plane, block = place % D, place // D
        column, row = block % columns * across * TX, block // columns % rows * (BLOCK // across)
        voxel = ((block // (columns * rows) * D + plane) * H + row) * W + column
        y, planes = row + down, tl.zeros((BLOCK,), tl.int32) + plane  # the interpreter has no masks of single numbers
        in_row = is_input[:, None] & (column + run_right >= 0) & (column + run_right < W)
        in_map = is_result[None, :] & (y < H)[:, None] & (column + result_right < W)
        runs = ()
        for dy in tl.static_range(KY):
            up = y + (dy - KY // 2)
            offset = (voxel + (dy - KY // 2) * W) * X_STRIDE + run_offset
            runs = runs + (tl.load(x + offset, mask=in_row & ((up >= 0) & (up < H))[None, :], other=0.0),)
        so_far = total
        total = ()
        for dz in tl.static_range(KZ):
            z = planes + (KZ // 2 - dz)
            offset = (voxel + (KZ // 2 - dz) * H * W) * GRAD_STRIDE + result_offset
            result = tl.load(grad + offset, mask=in_map & ((z >= 0) & (z < D))[:, None], other=0.0)
            for dy in tl.static_range(KY):
                total = total + (tl.dot(runs[dy], result, so_far[dz * KY + dy]),)
    programs = tl.num_programs(0) // products
    sums += ((first_product + product) * programs + program) * KZ * KY * K * N
    for row in tl.static_range(KZ * KY):
        tl.store(sums + row * K * N + k[:, None] * N + n[None, :], total[row])


@triton.jit(
    do_not_specialize=[
        "numbers", "programs", "group_in", "group_out", "c_in", "c_out", "in_parts", "out_parts", "taps", "kx", "tx",
        "rows", "k", "n", "lanes",
    ]
)  # fmt: skip
def _conv_weight_reduce_kernel(
    sums,  # (products, programs, rows, k, n), as `_conv_weight_gradient_kernel` writes it
    out,  # (groups * group_out, group_in, taps)
    numbers,  # of out
    programs, group_in, group_out, c_in, c_out, in_parts, out_parts, taps, kx, tx, rows, k, n, lanes,
    WEIGHTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The sums of all programs, and of the places of a weight in a band: input (ox + dx) and output ox of a tile."""
    place = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    o, i, tap, group = (place % group_out, place // group_out % group_in, place // (group_out * group_in) % taps,
                        place // (group_out * group_in * taps))  # fmt: skip
    product = (group * in_parts + i // c_in) * out_parts + o // c_out
    band = rows * k * n
    source = product * programs * band + (tap // kx * k + tap % kx * c_in + i % c_in) * n + o % c_out
    total = tl.zeros((TOGETHER, WEIGHTS), tl.float32)
    for first in range(0, programs * tx, TOGETHER):
        addend = first + tl.arange(0, TOGETHER)
        program, ox = addend // tx, addend % tx
        exists = (program < programs)[:, None] & (place < numbers)[None, :]
        offset = (program * band + ox * (c_in * n + lanes))[:, None] + source[None, :]
        total += tl.load(sums + offset, mask=exists, other=0.0)
    weight = ((group * group_out + o) * group_in + i) * taps + tap
    tl.store(out + weight, tl.sum(total, 0), mask=place < numbers)
