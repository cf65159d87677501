"""Triton kernels of attention with small heads, for instance of 8 channels.

A product on tensor cores takes 16 channels at least, so a head of 8 leaves room, and the room is used: what would be
done to every logit is a channel of its operands instead. Keys and values, in the backward pass queries and gradients
too, are copied into rows of LANES numbers ("packed"), with the D channels of the head in front:

    query     c q,   -m in three parts,      1            c = log2(e) / sqrt(D)
    key       k,     1, 1, 1,                0, or a very negative number where the key must not be attended
    gradient  g,     -delta in three parts,  0            delta = sum of g * out over the channels
    value     v,     1, 1, 1,                0

Then query . key is c q.k - m, the power of two that is wanted, gradient . value is g.v - delta, and weights . value
holds the sum of the weights beside the result. Padded tokens are rows like any other, so no loop has a mask. In the
forward pass m is an estimate from the largest logit of some keys that lie apart; where a row overflows with it, the
program looks for the largest logit of all and does its work again. In the backward pass m is the logarithm of the sum
of powers.

What is left for every pair of tokens is the power itself, and in the backward pass one multiplication. Of the powers in
float16 a part is computed by polynomials, two at a time, because a multiprocessor has only 16 units for powers. Of 16 x
1024^2, 78e9 pairs in all levels of the published network, these units alone would need 19 ms forward and 37 ms
backward on an H200 (132 multiprocessors at 1.98 GHz); with half of the powers as polynomials the bound is the number
of instructions, 4.5 and 10.1 a pair at 128 a clock, 10 and 23 ms. The products take less: 32 and 112 multiplications
a pair at 2048 a clock, 5 and 16 ms.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton

EXTRA = 4  # channels beside those of the head
SAMPLE = 256  # keys from which the largest logit is estimated
# From there to m: the largest weight of the sample is 2^5, where float16 ends at 2^16 and, here, at 2^-14. A higher one
# would have more weights in the range, with fewer digits of their exponents.
MARGIN = -5.0
LOG2_E = 1 / math.log(2)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """Tokens of a program, tokens that it takes at a time, warps, stages; whether logits may be summed in float16, and
    how many of 4 powers are computed by polynomials. As they were fastest on an H200.
    """

    rows: int = 128
    columns: int = 64
    warps: int = 4
    stages: int = 3
    half_logits: bool = True
    polynomials: int = 2


FORWARD, GRADIENTS = Tiles(half_logits=False), Tiles(rows=64, columns=128, stages=4)
FLOAT32 = Tiles(rows=64, columns=16, stages=2)  # of all three
NUMBERS = 128 * 16  # of tokens taken at a time: more would not fit the registers of every card
BLOCK = 128  # tokens are padded to a multiple, or to a power of two below


class Sizes(NamedTuple):
    """Of attention of (S, N, 3, HEADS, D)."""

    sequences: int
    tokens: int
    heads: int
    channels: int
    padded: int
    lanes: int

    @classmethod
    def of(cls, qkv: Tensor) -> Sizes:
        sequences, tokens, _, heads, channels = qkv.shape
        block = min(BLOCK, max(16, triton.next_power_of_2(tokens)))
        return cls(sequences, tokens, heads, channels, -(-tokens // block) * block, lanes(channels))

    def packed(self, like: Tensor) -> Tensor:
        return like.new_empty((self.sequences * self.heads, self.padded, self.lanes))

    def grid(self, rows: int) -> tuple[int]:
        return (self.sequences * self.heads * (self.padded // rows),)

    @property
    def constants(self) -> dict[str, int]:
        return {"HEADS": self.heads, "D": self.channels, "LANES": self.lanes}


def lanes(channels: int) -> int:
    """Numbers of a packed row."""
    return max(16, triton.next_power_of_2(channels + EXTRA))


@cache
def _sums_in_one_go(device: torch.device) -> bool:
    """Whether 16 products are summed before they are rounded to float16, as Hopper was seen to do.

    A logit is a small difference of large numbers, which must not be rounded on the way.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _options(tiles: Tiles, sizes: Sizes, like: Tensor, precision: str) -> dict:
    half = tiles.half_logits and like.dtype == torch.float16 and sizes.lanes == 16 and _sums_in_one_go(like.device)
    return {
        "ROWS": min(tiles.rows, sizes.padded),
        "COLUMNS": min(tiles.columns, sizes.padded, NUMBERS // sizes.lanes),
        "HALF": half,
        "POLYNOMIALS": -1 if INTERPRETED else tiles.polynomials,
        "PRECISION": precision,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **sizes.constants,
    }


def _pack(
    qkv: Tensor, mask: Tensor | None, sizes: Sizes, backward: tuple[Tensor, Tensor, Tensor] | None = None
) -> list[Tensor]:
    """Keys and values; in the backward pass, which has (out, its gradient, logarithms), queries and gradients too."""
    names = ("keys", "values") if backward is None else ("keys", "values", "queries", "gradients")
    packed = [sizes.packed(qkv) for _ in names]
    queries, gradients = packed[2:] or (None, None)
    out, grad, lse = backward or (None, None, None)
    rows = min(BLOCK, sizes.padded)
    launch(wrap_triton(_attention_pack_kernel))[sizes.grid(rows)](
        qkv, mask, out, grad, lse, *packed[:2], queries, gradients, sizes.tokens, sizes.padded,
        1 if mask is None else mask.shape[0], FACTOR=LOG2_E / math.sqrt(sizes.channels), SHIFT=_shift(sizes),
        ROWS=rows, **sizes.constants,
    )  # fmt: skip
    return packed


def _shift(sizes: Sizes) -> float:
    """Weights of the backward pass are this power of two too large: float16 has few digits for those of many tokens."""
    return float(min(11, max(0, sizes.tokens.bit_length() - 4)))


def forward(qkv: Tensor, mask: Tensor | None, precision: str, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """(S, N, 3, HEADS, D), mask (P, N) -> (S, N, HEADS, D), logarithms to base 2 (S * HEADS, padded N) in float32."""
    sizes, tiles = Sizes.of(qkv), tiles or (FLOAT32 if qkv.dtype == torch.float32 else FORWARD)
    out = qkv.new_empty((sizes.sequences, sizes.tokens, sizes.heads, sizes.channels))
    lse = qkv.new_empty((sizes.sequences * sizes.heads, sizes.padded), dtype=torch.float32)
    options = _options(tiles, sizes, qkv, precision)
    launch(wrap_triton(_attention_forward_kernel))[sizes.grid(options["ROWS"])](
        qkv, *_pack(qkv, mask, sizes), out, lse, sizes.tokens, sizes.padded, LOG2_E / math.sqrt(sizes.channels),
        SAMPLE=min(SAMPLE, sizes.padded), MARGIN=MARGIN, **options,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, precision: str,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of qkv."""
    sizes = Sizes.of(qkv)
    tiles = tiles or (FLOAT32 if qkv.dtype == torch.float32 else GRADIENTS)
    grad_qkv = torch.empty_like(qkv)
    keys, values, queries, gradients = _pack(qkv, mask, sizes, (out, grad, lse))
    unit = 2.0 ** -_shift(sizes)
    options = _options(tiles, sizes, qkv, precision)
    launch(wrap_triton(_attention_key_gradient_kernel))[sizes.grid(options["ROWS"])](
        keys, values, queries, gradients, grad_qkv, sizes.tokens, sizes.padded, unit / LOG2_E, unit, **options
    )
    launch(wrap_triton(_attention_query_gradient_kernel))[sizes.grid(options["ROWS"])](
        keys, values, queries, gradients, grad_qkv, sizes.tokens, sizes.padded, unit / math.sqrt(sizes.channels),
        **options,
    )  # fmt: skip
    return grad_qkv


# 2^x of two float16 in a register, -14.5 < x < 15.5, 0 below. x + 1551 is rounded to a whole number n + 1551, whose
# last six bits are the exponent of 2^n; for 2^f, |f| <= 1/2, a polynomial of degree 3.
_POLYNOMIAL = """
    max.NaN.f16x2 y, $X, lowest;
    add.rn.f16x2 t, y, magic;
    sub.rn.f16x2 n, t, magic;
    sub.rn.f16x2 y, y, n;
    and.b32 t, t, 0x003F003F;
    shl.b32 t, t, 10;
    fma.rn.f16x2 n, y, c3, c2;
    fma.rn.f16x2 n, n, y, c1;
    mul.rn.f16x2 y, y, t;
    fma.rn.f16x2 $Y, n, y, t;
"""
_HIGHEST = "max.NaN.f16x2 y, $X, lowest;\n    min.NaN.f16x2 y, y, highest;"  # NaN above
_CONSTANTS = {
    "lowest": -15.0, "highest": 16.0, "magic": 1551.0, "c1": 0.69287109375, "c2": 0.241455078125,
    "c3": 0.055999755859375,
}  # fmt: skip


def _two_halves(value: float) -> str:
    bits = int(torch.tensor(value, dtype=torch.float16).view(torch.int16)) & 0xFFFF
    return f"0x{bits:04X}{bits:04X}"


def _powers(polynomials: int, factor: bool) -> str:
    """PTX for 2^x of eight float16, so many of four pairs by polynomials; times a factor beside them.

    In one line, as torch.compile writes the kernels' constants into a string of its own.
    """
    lines = ["{", ".reg .b32 y, t, n;", f".reg .b32 {', '.join(_CONSTANTS)};"]
    lines += [f"mov.b32 {name}, {_two_halves(value)};" for name, value in _CONSTANTS.items()]
    results = 8 if factor else 4
    for i in range(4):
        x, y = f"${results + i}", f"${i}"
        if i < polynomials:
            code = _POLYNOMIAL if factor else _POLYNOMIAL.replace(_HIGHEST.split("\n")[0], _HIGHEST)
            lines.append(code.replace("$X", x).replace("$Y", y))
        else:
            lines.append(f"ex2.approx.f16x2 {y}, {x};")
        if factor:
            lines.append(f"mul.rn.f16x2 ${4 + i}, {y}, ${results + 4 + i};")
    return " ".join(" ".join([*lines, "}"]).split())


_POWERS_0, _POWERS_1, _POWERS_2, _POWERS_3, _POWERS_4 = (tl.constexpr(_powers(i, False)) for i in range(5))
_PRODUCTS_0, _PRODUCTS_1, _PRODUCTS_2, _PRODUCTS_3, _PRODUCTS_4 = (tl.constexpr(_powers(i, True)) for i in range(5))


@triton.jit
def _weights(logits, DTYPE: tl.constexpr, POLYNOMIALS: tl.constexpr):
    """2^logits, for a product with tensors of DTYPE; in float32 where POLYNOMIALS is negative."""
    if (DTYPE == tl.float16) and (POLYNOMIALS >= 0):
        if POLYNOMIALS == 0:
            code: tl.constexpr = _POWERS_0
        elif POLYNOMIALS == 1:
            code: tl.constexpr = _POWERS_1
        elif POLYNOMIALS == 2:
            code: tl.constexpr = _POWERS_2
        elif POLYNOMIALS == 3:
            code: tl.constexpr = _POWERS_3
        else:
            code: tl.constexpr = _POWERS_4
        weights = tl.inline_asm_elementwise(
            code, "=&r,=&r,=&r,=&r,r,r,r,r", [logits.to(tl.float16)], dtype=tl.float16, is_pure=True, pack=8
        )
    else:
        weights = tl.exp2(logits.to(tl.float32)).to(DTYPE)
    return weights


@triton.jit
def _weights_and_gradient(logits, factor, DTYPE: tl.constexpr, POLYNOMIALS: tl.constexpr):
    """2^logits, and the same times a factor."""
    if (DTYPE == tl.float16) and (POLYNOMIALS >= 0):
        if POLYNOMIALS == 0:
            code: tl.constexpr = _PRODUCTS_0
        elif POLYNOMIALS == 1:
            code: tl.constexpr = _PRODUCTS_1
        elif POLYNOMIALS == 2:
            code: tl.constexpr = _PRODUCTS_2
        elif POLYNOMIALS == 3:
            code: tl.constexpr = _PRODUCTS_3
        else:
            code: tl.constexpr = _PRODUCTS_4
        weights, product = tl.inline_asm_elementwise(
            code, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [logits.to(tl.float16), factor.to(tl.float16)],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=8,
        )  # fmt: skip
    else:
        weights = tl.exp2(logits.to(tl.float32))
        product = (weights * factor).to(DTYPE)
        weights = weights.to(DTYPE)
    return weights, product


@triton.jit
def _place(rows, padded, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Number of sequence and head together, sequence, head and tokens of a program."""
    blocks = padded // ROWS
    both = tl.program_id(0) // blocks
    return both, both // HEADS, both % HEADS, tl.program_id(0) % blocks * ROWS + rows


@triton.jit
def _parts(value, lane, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """A float32 of each row as the sum of three numbers of DTYPE, in three lanes; zero in the other lanes."""
    value = value[:, None]
    first = value.to(DTYPE)
    second = (value - first.to(tl.float32)).to(DTYPE)
    third = (value - first.to(tl.float32) - second.to(tl.float32)).to(DTYPE)
    parts = tl.where(lane == FIRST, first, tl.where(lane == FIRST + 1, second, third))
    return tl.where((lane >= FIRST) & (lane < FIRST + 3), parts, tl.zeros_like(parts))


@triton.jit(do_not_specialize=["tokens", "groups"])
def _attention_pack_kernel(
    qkv,  # (S, tokens, 3, HEADS, D)
    mask,  # (groups, tokens) or None: which keys may be attended
    out, grad,  # (S, tokens, HEADS, D), or None in the forward pass
    lse,  # (S * HEADS, padded), likewise
    keys, values, queries, gradients,  # (S * HEADS, padded, LANES)
    tokens, padded, groups, FACTOR: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Packs tokens of a head."""
    both, sequence, head, row = _place(tl.arange(0, ROWS), padded, ROWS, HEADS)
    lane = tl.arange(0, LANES)[None, :]
    exists = row < tokens
    token = sequence * tokens + row
    inside = exists[:, None] & (lane < D)
    source = qkv + (token * 3 * HEADS + head)[:, None] * D + lane
    target = (both * padded + row)[:, None] * LANES + lane
    dtype: tl.constexpr = qkv.dtype.element_ty

    attended = exists
    if mask is not None:
        attended = attended & (tl.load(mask + (sequence % groups) * tokens + row, mask=exists, other=0) != 0)
    one = (lane >= D) & (lane < D + 3)
    k = tl.load(source + HEADS * D, mask=inside, other=0.0)
    k = tl.where(one, 1.0, k.to(tl.float32))
    k = tl.where((lane == D + 3) & ~attended[:, None], -60000.0, k)
    tl.store(keys + target, k.to(dtype))
    v = tl.load(source + 2 * HEADS * D, mask=inside, other=0.0)
    tl.store(values + target, tl.where(one, 1.0, v.to(tl.float32)).to(dtype))
    if queries is not None:
        q = tl.load(source, mask=inside, other=0.0).to(tl.float32) * FACTOR
        level = tl.load(lse + both * padded + row, mask=exists, other=60000.0) - SHIFT
        q = tl.where(lane == D + 3, 1.0, q).to(dtype) + _parts(-level, lane, D, dtype)
        tl.store(queries + target, q)
        source = (token * HEADS + head)[:, None] * D + lane
        g = tl.load(grad + source, mask=inside, other=0.0)
        o = tl.load(out + source, mask=inside, other=0.0)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(gradients + target, g + _parts(-delta, lane, D, dtype))


@triton.jit
def _attend(
    query, keys, values, padded, COLUMNS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    POLYNOMIALS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over all keys of weights times values, (ROWS, LANES)."""
    place = tl.arange(0, COLUMNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    logit: tl.constexpr = tl.float16 if HALF else tl.float32
    acc = tl.zeros((ROWS, LANES), tl.float32)
    for first in range(0, padded, COLUMNS):
        key = tl.load(keys + first * LANES + place)
        value = tl.load(values + first * LANES + place)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=logit)
        weights = _weights(logits, value.dtype, POLYNOMIALS)
        acc = tl.dot(weights, value, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _highest(highest, query, keys, tokens, LANES: tl.constexpr, PRECISION: tl.constexpr):
    """The largest logit of each query with some keys, or what it was before."""
    key = tl.load(keys + tokens[:, None] * LANES + tl.arange(0, LANES)[None, :])
    return tl.maximum(highest, tl.max(tl.dot(query, tl.trans(key), input_precision=PRECISION), 1))


@triton.jit(do_not_specialize=["tokens"])
def _attention_forward_kernel(
    qkv,  # (S, tokens, 3, HEADS, D)
    keys, values,  # (S * HEADS, padded, LANES)
    out,  # (S, tokens, HEADS, D)
    lse,  # (S * HEADS, padded)
    tokens, padded, factor, SAMPLE: tl.constexpr, MARGIN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HALF: tl.constexpr, POLYNOMIALS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Attention of some queries of a head."""
    both, sequence, head, row = _place(tl.arange(0, ROWS), padded, ROWS, HEADS)
    lane = tl.arange(0, LANES)[None, :]
    inside = (row < tokens)[:, None] & (lane < D)
    token = sequence * tokens + row
    keys += both * padded * LANES
    values += both * padded * LANES
    dtype: tl.constexpr = qkv.dtype.element_ty
    query = tl.load(qkv + (token * 3 * HEADS + head)[:, None] * D + lane, mask=inside, other=0.0)
    query = tl.where(lane == D + 3, 1.0, query.to(tl.float32) * factor).to(dtype)

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, SAMPLE, COLUMNS):
        some = (first + tl.arange(0, COLUMNS)) * tokens // SAMPLE
        highest = _highest(highest, query, keys, some, LANES, PRECISION)
    highest = (highest + MARGIN).to(dtype).to(tl.float32)
    acc = _attend(
        query + _parts(-highest, lane, D, dtype), keys, values, padded, COLUMNS, LANES, ROWS, HALF, POLYNOMIALS,
        PRECISION,
    )  # fmt: skip
    total = tl.sum(tl.where(lane == D, acc, 0.0), 1)
    if tl.min((total < float("inf")).to(tl.int32)) == 0:  # of some row it is infinite or NaN
        highest = tl.full((ROWS,), float("-inf"), tl.float32)
        for first in range(0, padded, COLUMNS):
            highest = _highest(highest, query, keys, first + tl.arange(0, COLUMNS), LANES, PRECISION)
        highest = (highest + MARGIN).to(dtype).to(tl.float32)
        acc = _attend(
            query + _parts(-highest, lane, D, dtype), keys, values, padded, COLUMNS, LANES, ROWS, HALF, POLYNOMIALS,
            PRECISION,
        )  # fmt: skip
        total = tl.sum(tl.where(lane == D, acc, 0.0), 1)
    tl.store(out + (token * HEADS + head)[:, None] * D + lane, (acc / total[:, None]).to(dtype), mask=inside)
    tl.store(lse + both * padded + row, highest + tl.log2(total))


@triton.jit(do_not_specialize=["tokens"])
def _attention_key_gradient_kernel(
    keys, values, queries, gradients,  # (S * HEADS, padded, LANES)
    grad,  # (S, tokens, 3, HEADS, D)
    tokens, padded, key_factor, value_factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    POLYNOMIALS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values of a head."""
    both, sequence, head, row = _place(tl.arange(0, ROWS), padded, ROWS, HEADS)
    lane = tl.arange(0, LANES)[None, :]
    here = (both * padded + row)[:, None] * LANES + lane
    key, value = tl.load(keys + here), tl.load(values + here)
    queries += both * padded * LANES
    gradients += both * padded * LANES
    place = tl.arange(0, COLUMNS)[:, None] * LANES + lane
    logit: tl.constexpr = tl.float16 if HALF else tl.float32
    of_key = tl.zeros((ROWS, LANES), tl.float32)
    of_value = tl.zeros((ROWS, LANES), tl.float32)
    for first in range(0, padded, COLUMNS):
        query = tl.load(queries + first * LANES + place)
        gradient = tl.load(gradients + first * LANES + place)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=logit)
        of_weights = tl.dot(value, tl.trans(gradient), input_precision=PRECISION, out_dtype=logit)
        weights, of_logits = _weights_and_gradient(logits, of_weights, key.dtype, POLYNOMIALS)
        of_value = tl.dot(weights, gradient, of_value, input_precision=PRECISION)
        of_key = tl.dot(of_logits, query, of_key, input_precision=PRECISION)
    target = grad + ((sequence * tokens + row) * 3 * HEADS + head)[:, None] * D + lane
    inside = (row < tokens)[:, None] & (lane < D)
    tl.store(target + HEADS * D, (of_key * key_factor).to(grad.dtype.element_ty), mask=inside)
    tl.store(target + 2 * HEADS * D, (of_value * value_factor).to(grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _attention_query_gradient_kernel(
    keys, values, queries, gradients,  # (S * HEADS, padded, LANES)
    grad,  # (S, tokens, 3, HEADS, D)
    tokens, padded, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    POLYNOMIALS: tl.constexpr, PRECISION: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of some queries of a head."""
    both, sequence, head, row = _place(tl.arange(0, ROWS), padded, ROWS, HEADS)
    lane = tl.arange(0, LANES)[None, :]
    here = (both * padded + row)[:, None] * LANES + lane
    query, gradient = tl.load(queries + here), tl.load(gradients + here)
    keys += both * padded * LANES
    values += both * padded * LANES
    place = tl.arange(0, COLUMNS)[:, None] * LANES + lane
    logit: tl.constexpr = tl.float16 if HALF else tl.float32
    of_query = tl.zeros((ROWS, LANES), tl.float32)
    for first in range(0, padded, COLUMNS):
        key = tl.load(keys + first * LANES + place)
        value = tl.load(values + first * LANES + place)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=logit)
        of_weights = tl.dot(gradient, tl.trans(value), input_precision=PRECISION, out_dtype=logit)
        _, of_logits = _weights_and_gradient(logits, of_weights, query.dtype, POLYNOMIALS)
        of_query = tl.dot(of_logits, key, of_query, input_precision=PRECISION)
    target = grad + ((sequence * tokens + row) * 3 * HEADS + head)[:, None] * D + lane
    inside = (row < tokens)[:, None] & (lane < D)
    tl.store(target, (of_query * factor).to(grad.dtype.element_ty), mask=inside)
