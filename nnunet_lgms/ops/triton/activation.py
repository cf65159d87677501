"""Activations inside Triton kernels, chosen at compile time by their code."""

from __future__ import annotations

import triton
import triton.language as tl

CODES = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_first": 4}


# The kernels at full resolution are bound by these few lines as much as by memory. Of Triton's functions, `exp2` and
# `rsqrt` (of a square, for a reciprocal) are one instruction of the device; `exp` and a division are four and eight.


@triton.jit
def _tail(x):
    """Normal distribution beyond |x|, and exp(-x^2 / 2), which the two share.

    Abramowitz and Stegun, 7.1.26: absolute error below 1e-7.
    """
    d = 1.0 + 0.23164189 * tl.abs(x)
    t = tl.rsqrt(d * d)
    polynomial = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    bell = tl.exp2(-0.72134752 * x * x)
    return polynomial * bell, bell


@triton.jit
def normal(x):
    """Distribution function and density of the normal distribution."""
    tail, bell = _tail(x)
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * bell


@triton.jit
def _half_tail(x):
    """Normal distribution beyond |x|, for maps in half precision: |x| times its error is below 4e-6.

    Its eighth root is a polynomial of degree 5, zero at 6 and kept so beyond, with coefficients fitted here: |x| times
    the error has five extremes of the same size. `_tail` takes 13 instructions, two of them on the units for
    functions, of which there is one for eight multipliers; this takes 9, none of them there.
    """
    a = tl.minimum(tl.abs(x), 6.0)
    root = -0.0915456106 + a * (-0.0315685728 + a * (-0.00126500793 + a * (0.00200456662 + a * -0.00020009542)))
    root = 0.917007639 + a * root
    root *= root
    root *= root
    return root * root


@triton.jit
def gelu(x, dtype: tl.constexpr):
    """x times the normal distribution below it, in float32, as exact as the dtype of a map asks for."""
    if dtype == tl.float32:
        tail, bell = _tail(x)
    else:
        tail = _half_tail(x)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def sigmoid(x):
    d = 1.0 + tl.exp2(-1.44269504 * x)
    return tl.rsqrt(d * d)


@triton.jit
def before_norm(x, ACT: tl.constexpr, dtype: tl.constexpr):
    """The activation in front of the norm, of a map of such a dtype."""
    if ACT == 4:
        x = gelu(x, dtype)
    return x


@triton.jit
def after_norm(z, ACT: tl.constexpr, dtype: tl.constexpr):
    """The activation behind the norm, of a map of such a dtype."""
    if ACT == 1:
        z = tl.maximum(z, 0.0)
    elif ACT == 2:
        z = z * sigmoid(z)
    elif ACT == 3:
        z = gelu(z, dtype)
    return z


@triton.jit
def slope_after_norm(z, ACT: tl.constexpr):
    """Derivative of `after_norm`."""
    if ACT == 1:
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACT == 2:
        s = sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACT == 3:
        below, density = normal(z)
        slope = below + z * density
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def affine(mean, variance, weight, bias, statistics, channel, C: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr):
    """Mean, reciprocal deviation, and the norm's factor and offset per channel."""
    inside = channel < C
    m = tl.load(mean + statistics + channel, mask=inside, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(variance + statistics + channel, mask=inside, other=1.0) + EPS)
    factor, offset = r, -m * r
    if AFFINE:
        factor = r * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - m * factor
    return m, r, factor, offset
