"""Activations inside Triton kernels, chosen at compile time by their code."""

from __future__ import annotations

import triton
import triton.language as tl

CODES = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_first": 4}


@triton.jit
def normal(x):
    """Distribution function and density of the normal distribution, without the slow `erf` of the device's library.

    Abramowitz and Stegun, 7.1.26: absolute error below 1e-7. Density and tail share one exponential.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    bell = tl.exp(-z * z)
    tail = 0.5 * polynomial * bell
    return tl.where(x < 0, tail, 1.0 - tail), 0.3989422804014327 * bell


@triton.jit
def before_norm(x, ACT: tl.constexpr):
    """The activation in front of the norm."""
    if ACT == 4:
        below, _ = normal(x)
        x = x * below
    return x


@triton.jit
def after_norm(z, ACT: tl.constexpr):
    """The activation behind the norm."""
    if ACT == 1:
        z = tl.maximum(z, 0.0)
    elif ACT == 2:
        z = z * tl.sigmoid(z)
    elif ACT == 3:
        below, _ = normal(z)
        z = z * below
    return z


@triton.jit
def slope_after_norm(z, ACT: tl.constexpr):
    """Derivative of `after_norm`."""
    if ACT == 1:
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACT == 2:
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACT == 3:
        below, density = normal(z)
        slope = below + z * density
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def affine(mean, variance, weight, bias, statistics, channel, C: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr):
    """Mean, reciprocal deviation, and the norm's scale and shift per channel."""
    inside = channel < C
    m = tl.load(mean + statistics + channel, mask=inside, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(variance + statistics + channel, mask=inside, other=1.0) + EPS)
    scale, shift = r, -m * r
    if AFFINE:
        scale = r * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) - m * scale
    return m, r, scale, shift
