"""Triton kernels of norm and activation over channels-last maps, seen as (B, V, C): V voxels, C channels innermost.

Forward: `_moments` (mean and centred second moment of a slice of voxels, per channel), `_finish_forward` (joins the
slices, gives one scale and shift per sample and channel), `_apply`. Backward: `_gradient_sums`, `_finish_backward`,
`_apply_gradient`. Slices are joined in a fixed order, so results repeat bit for bit. All sums are in float32, moments
about the first voxel of their slice: a large mean costs no digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.backend import CHANNELS_LAST

CODES = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_first": 4}
TILE = 4096  # elements that a program holds at once
JOINED = 16384  # slices x channels that are joined by one program, at most


class _Plan:
    """Grid and sizes of the kernels for one map and kind of norm."""

    def __init__(self, x: Tensor, kind: str, groups: int):
        self.batch, self.channels = x.shape[:2]
        self.voxels = x[0, 0].numel()
        self.lanes = triton.next_power_of_2(self.channels)
        self.rows = max(1, TILE // self.lanes)
        # The batch norm joins the slices of all samples, the others those of one.
        self.statistics = 1 if kind == "batch" else self.batch
        self.joined_samples = self.batch // self.statistics
        tiles = triton.cdiv(self.voxels, self.rows)
        slices = min(tiles, max(1, JOINED // (self.lanes * triton.next_power_of_2(self.joined_samples))))
        self.steps = triton.cdiv(tiles, slices)
        self.slices = triton.cdiv(tiles, self.steps)
        self.group_channels = self.channels // groups if kind == "group" else 1
        self.sample_stride = 0 if kind == "batch" else self.channels
        self.tiles_grid = (tiles, self.batch)
        self.slices_grid = (self.slices, self.batch)
        self.finish = {
            "slices": self.slices * self.joined_samples,
            "SLICES_2": triton.next_power_of_2(self.slices * self.joined_samples),
            "per_sample": self.slices,
            "slice_voxels": self.steps * self.rows,
            "C": self.channels,
            "LANES": self.lanes,
            "GROUP": self.group_channels,
        }
        self.tile = {"C": self.channels, "LANES": self.lanes, "ROWS": self.rows}

    def empty(self, x: Tensor, n: int, rows: int) -> list[Tensor]:
        """n buffers of (rows, C) in float32."""
        return [torch.empty((rows, self.channels), dtype=torch.float32, device=x.device) for _ in range(n)]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, variance); see `norm_act.py`."""
    plan = _Plan(x, kind, groups)
    code = CODES[activation]
    partial = plan.empty(x, 2, plan.batch * plan.slices)
    wrap_triton(_moments)[plan.slices_grid](x, *partial, plan.voxels, plan.steps, ACT=code, **plan.tile)
    mean, variance, scale, shift = plan.empty(x, 4, plan.statistics)
    wrap_triton(_finish_forward)[(plan.statistics,)](
        *partial, weight, bias, mean, variance, scale, shift, plan.voxels, plan.joined_samples, eps,
        AFFINE=weight is not None, **plan.finish,
    )  # fmt: skip
    out = torch.empty_like(x, memory_format=CHANNELS_LAST[x.ndim])
    if residual is not None:
        residual = residual.contiguous(memory_format=CHANNELS_LAST[x.ndim])
    wrap_triton(_apply)[plan.tiles_grid](
        x, scale, shift, residual, out, plan.voxels, plan.sample_stride,
        ACT=code, RESIDUAL=residual is not None, **plan.tile,
    )  # fmt: skip
    return out, mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; see `norm_act.py`."""
    plan = _Plan(x, kind, groups)
    code = CODES[activation]
    affine = weight is not None
    partial = plan.empty(x, 2, plan.batch * plan.slices)
    wrap_triton(_gradient_sums)[plan.slices_grid](
        grad, x, weight, bias, mean, variance, *partial, plan.voxels, plan.steps, plan.sample_stride, eps,
        ACT=code, AFFINE=affine, **plan.tile,
    )  # fmt: skip
    grad_weight, grad_bias, by_grad, by_x, constant = plan.empty(x, 5, plan.statistics)
    wrap_triton(_finish_backward)[(plan.statistics,)](
        *partial, weight, mean, variance, grad_weight, grad_bias, by_grad, by_x, constant, plan.voxels,
        plan.joined_samples, eps, AFFINE=affine, **plan.finish,
    )  # fmt: skip
    out = torch.empty_like(x, memory_format=CHANNELS_LAST[x.ndim])
    wrap_triton(_apply_gradient)[plan.tiles_grid](
        grad, x, weight, bias, mean, variance, by_grad, by_x, constant, out, plan.voxels, plan.sample_stride, eps,
        ACT=code, AFFINE=affine, **plan.tile,
    )  # fmt: skip
    return out, grad_weight, grad_bias


@triton.jit
def _normal_density(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _before(x, ACT: tl.constexpr):
    """The activation in front of the norm."""
    if ACT == 4:
        x = x * _normal_cdf(x)
    return x


@triton.jit
def _after(z, ACT: tl.constexpr):
    """The activation behind the norm."""
    if ACT == 1:
        z = tl.maximum(z, 0.0)
    elif ACT == 2:
        z = z * tl.sigmoid(z)
    elif ACT == 3:
        z = z * _normal_cdf(z)
    return z


@triton.jit
def _slope_after(z, ACT: tl.constexpr):
    """Derivative of `_after`."""
    if ACT == 1:
        slope = tl.where(z > 0, 1.0, 0.0)
    elif ACT == 2:
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    elif ACT == 3:
        slope = _normal_cdf(z) + z * _normal_density(z)
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _affine(weight, bias, mean, variance, statistics, channel, C: tl.constexpr, eps, AFFINE: tl.constexpr):
    """Mean, reciprocal deviation, scale and shift per channel."""
    m = tl.load(mean + statistics + channel, mask=channel < C, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(variance + statistics + channel, mask=channel < C, other=1.0) + eps)
    if AFFINE:
        scale = r * tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
        shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32) - m * scale
    else:
        scale = r
        shift = -m * r
    return m, r, scale, shift


@triton.jit
def _moments(x, partial_mean, partial_m2, voxels, steps, ACT: tl.constexpr,
             C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    channel = tl.arange(0, LANES)
    begin = tl.program_id(0) * steps * ROWS
    x += tl.program_id(1) * voxels * C
    origin = _before(tl.load(x + begin * C + channel, mask=channel < C, other=0.0).to(tl.float32), ACT)
    first = tl.zeros((ROWS, LANES), tl.float32)
    second = tl.zeros((ROWS, LANES), tl.float32)
    for step in range(steps):
        voxel = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
        value = tl.load(x + voxel[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, _before(value, ACT) - origin[None, :], 0.0)
        first += value
        second += value * value
    count = tl.minimum(steps * ROWS, voxels - begin).to(tl.float32)
    total = tl.sum(first, 0)
    out = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(partial_mean + out, origin + total / count, mask=channel < C)
    tl.store(partial_m2 + out, tl.sum(second, 0) - total * total / count, mask=channel < C)


@triton.jit
def _over_group(value, channel, C: tl.constexpr, GROUP: tl.constexpr):
    """Sum over the channels of a group, for each of its channels."""
    if GROUP == 1:
        return value
    same = (channel[:, None] // GROUP == channel[None, :] // GROUP) & (channel < C)[None, :]
    return tl.sum(tl.where(same, value[None, :], 0.0), 1)


@triton.jit
def _finish_forward(
    partial_mean, partial_m2, weight, bias, mean, variance, scale, shift, voxels, samples, eps,
    slices, per_sample, slice_voxels, AFFINE: tl.constexpr, SLICES_2: tl.constexpr, C: tl.constexpr, LANES:
    tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    statistic = tl.program_id(0)
    channel, piece = tl.arange(0, LANES), tl.arange(0, SLICES_2)
    inside = (piece < slices)[:, None] & (channel < C)[None, :]
    offset = (statistic * slices + piece)[:, None] * C + channel[None, :]
    means = tl.load(partial_mean + offset, mask=inside, other=0.0)
    m2 = tl.load(partial_m2 + offset, mask=inside, other=0.0)
    counts = tl.minimum(slice_voxels, voxels - (piece % per_sample) * slice_voxels).to(tl.float32)
    counts = tl.where(inside, counts[:, None], 0.0)
    count = voxels * samples * 1.0  # either number may be a constant

    channel_mean = tl.sum(means * counts, 0) / count
    group_mean = _over_group(channel_mean, channel, C, GROUP) / GROUP
    spread = means - group_mean[None, :]
    centred = tl.sum(tl.where(inside, m2 + counts * spread * spread, 0.0), 0)
    group_variance = _over_group(centred, channel, C, GROUP) / (count * GROUP)

    r = 1.0 / tl.sqrt(group_variance + eps)
    b = -group_mean * r
    if AFFINE:
        w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
        r = r * w
        b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32) - group_mean * r
    out = statistic * C + channel
    tl.store(mean + out, group_mean, mask=channel < C)
    tl.store(variance + out, group_variance, mask=channel < C)
    tl.store(scale + out, r, mask=channel < C)
    tl.store(shift + out, b, mask=channel < C)


@triton.jit
def _apply(
    x, scale, shift, residual, out, voxels, sample_stride, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    a = tl.load(scale + sample * sample_stride + channel, mask=channel < C, other=0.0)
    b = tl.load(shift + sample * sample_stride + channel, mask=channel < C, other=0.0)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
    value = _before(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
    value = _after(value * a[None, :] + b[None, :], ACT)
    if RESIDUAL:
        value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(
    grad, x, weight, bias, mean, variance, partial_g, partial_gx, voxels, steps, sample_stride, eps,
    ACT: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of g, the gradient behind the activation, and of g times the normalised x."""
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    m, r, a, b = _affine(weight, bias, mean, variance, sample * sample_stride, channel, C, eps, AFFINE)
    begin = tl.program_id(0) * steps * ROWS
    sum_g = tl.zeros((ROWS, LANES), tl.float32)
    sum_gx = tl.zeros((ROWS, LANES), tl.float32)
    for step in range(steps):
        voxel = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
        offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
        value = _before(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), ACT)
        g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        g = g * _slope_after(value * a[None, :] + b[None, :], ACT)
        sum_g += g
        sum_gx += g * (value - m[None, :]) * r[None, :]
    out = (sample * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(partial_g + out, tl.sum(sum_g, 0), mask=channel < C)
    tl.store(partial_gx + out, tl.sum(sum_gx, 0), mask=channel < C)


@triton.jit
def _finish_backward(
    partial_g, partial_gx, weight, mean, variance, grad_weight, grad_bias, by_grad, by_x, constant, voxels, samples,
    eps,
    slices, per_sample, slice_voxels, AFFINE: tl.constexpr, SLICES_2: tl.constexpr, C: tl.constexpr, LANES:
    tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = r w g - r mean(w g) - r xhat mean(w g xhat), as by_grad * g + by_x * x + constant."""
    statistic = tl.program_id(0)
    channel, piece = tl.arange(0, LANES), tl.arange(0, SLICES_2)
    inside = (piece < slices)[:, None] & (channel < C)[None, :]
    offset = (statistic * slices + piece)[:, None] * C + channel[None, :]
    sum_g = tl.sum(tl.load(partial_g + offset, mask=inside, other=0.0), 0)
    sum_gx = tl.sum(tl.load(partial_gx + offset, mask=inside, other=0.0), 0)

    out = statistic * C + channel
    w = tl.full((LANES,), 1.0, tl.float32)
    if AFFINE:
        w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    m = tl.load(mean + out, mask=channel < C, other=0.0)
    r = 1.0 / tl.sqrt(tl.load(variance + out, mask=channel < C, other=1.0) + eps)
    count = voxels * samples * GROUP * 1.0  # either number may be a constant
    mean_g = _over_group(w * sum_g, channel, C, GROUP) / count
    mean_gx = _over_group(w * sum_gx, channel, C, GROUP) / count
    tl.store(grad_weight + out, sum_gx, mask=channel < C)
    tl.store(grad_bias + out, sum_g, mask=channel < C)
    tl.store(by_grad + out, r * w, mask=channel < C)
    tl.store(by_x + out, -r * r * mean_gx, mask=channel < C)
    tl.store(constant + out, r * (m * r * mean_gx - mean_g), mask=channel < C)


@triton.jit
def _apply_gradient(
    grad, x, weight, bias, mean, variance, by_grad, by_x, constant, out, voxels, sample_stride, eps,
    ACT: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    statistics = sample * sample_stride
    m, r, a, b = _affine(weight, bias, mean, variance, statistics, channel, C, eps, AFFINE)
    p = tl.load(by_grad + statistics + channel, mask=channel < C, other=0.0)
    q = tl.load(by_x + statistics + channel, mask=channel < C, other=0.0)
    s = tl.load(constant + statistics + channel, mask=channel < C, other=0.0)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
    raw = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value = _before(raw, ACT)
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    g = g * _slope_after(value * a[None, :] + b[None, :], ACT)
    g = g * p[None, :] + value * q[None, :] + s[None, :]
    if ACT == 4:
        g = g * (_normal_cdf(raw) + raw * _normal_density(raw))
    tl.store(out + offset, g.to(out.dtype.element_ty), mask=inside)
