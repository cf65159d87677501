"""Triton kernels of norm and activation over channels-last maps, seen as (B, V, C): V voxels, C channels innermost.

What is normed may be contiguous, (B, C, V), too, as the depthwise convolution writes it, and its gradient then is; the
result and its gradient never are. The norms differ only in what a statistic spans: the voxels of one channel of one
sample (instance), of a group of channels (group), of one channel of all samples (batch). All end as one factor and one
offset per sample and channel.

Forward: `_moments_kernel` (mean and centred second moment of a slice of voxels, per channel), `_merge_moments_kernel`
(of all slices and of the channels of a group), `_norm_act_forward_kernel`. Backward: `_gradient_sums_kernel`,
`_merge_gradient_sums_kernel`, `_norm_act_backward_kernel`. Slices are merged in a fixed order, so results repeat bit
for bit. All sums are in float32, moments about the first voxel of their slice: a large mean costs no digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.backend import capability
from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last, map_memory
from nnunet_lgms.ops.norms import FLAT
from nnunet_lgms.ops.triton.activation import CODES, affine, after_norm, before_norm, normal, slope_after_norm

MAX_CHANNELS = 512
TILE = 4096  # elements of a program that writes a map
SUM_TILE = 8192  # bytes of a map that a program of the sums takes at once
SUM_PROGRAMS = 512  # of the sums over a map, each for a slice of a sample
MERGED = 8192  # slices x channels that are merged by one program, at most
HOPPER = 9  # capability of the H100 and H200
MERGED_CHANNELS = 8  # that one program merges: a sector of memory


class MergeGrid:
    """The launch that merges what slices of samples gave to the statistics of one kind of norm.

    A program merges 8 channels or, for the group norm, all of them; for the batch norm it merges the slices of all
    samples, for the others those of one.
    """

    def __init__(self, batch: int, channels: int, kind: str, groups: int):
        self.channels = channels
        self.statistics = 1 if kind == "batch" else batch
        self.samples = batch // self.statistics
        self.group_channels = channels // groups if kind == "group" else 1
        lanes = triton.next_power_of_2(channels)
        self.lanes = lanes if self.group_channels > 1 else min(lanes, MERGED_CHANNELS)
        self.most_slices = max(1, MERGED // (self.lanes * triton.next_power_of_2(self.samples)))
        self.grid = (self.statistics, triton.cdiv(channels, self.lanes))

    def constants(self, slices: int) -> dict[str, int]:
        """The arguments of a kernel that merges ``slices`` of every sample."""
        merged = slices * self.samples
        most = max(MERGED // self.lanes, triton.next_power_of_2(merged))  # the latter of thousands of samples
        return {
            "slices": merged,
            "channels": self.channels,
            "PIECES": min(n for n in (16, SUM_PROGRAMS, most) if n >= merged),  # few versions to compile
            "LANES": self.lanes,
            "GROUP": self.group_channels,
        }


class LaunchGrid:
    """The grids and sizes of the kernels for a map like x, of one kind of norm.

    Args:
        channels: those of x if None.
        rows: voxels that a program of the sums holds at once.
        slices: of a sample, at most; a program of the sums works on one. If None, those that make SUM_PROGRAMS in all.
    """

    def __init__(
        self,
        x: Tensor,
        kind: str,
        groups: int,
        channels: int | None = None,
        rows: int | None = None,
        slices: int | None = None,
    ):
        self.batch, self.channels = x.shape[0], channels or x.shape[1]
        self.voxels = x[0, 0].numel()
        self.lanes = triton.next_power_of_2(self.channels)
        tile_rows, sum_rows = max(1, TILE // self.lanes), rows or max(1, SUM_TILE // (self.lanes * x.element_size()))
        self.merge = MergeGrid(self.batch, self.channels, kind, groups)
        tiles = triton.cdiv(self.voxels, sum_rows)
        slices = slices or max(1, SUM_PROGRAMS // self.batch)
        self.steps = triton.cdiv(tiles, min(tiles, self.merge.most_slices, slices))
        self.slices = triton.cdiv(tiles, self.steps)
        self.sample_stride = 0 if kind == "batch" else self.channels
        self.tiles_grid = (triton.cdiv(self.voxels, tile_rows), self.batch)
        self.slices_grid = (self.slices, self.batch)
        self.tile = {"C": self.channels, "LANES": self.lanes, "ROWS": tile_rows}
        warps = _sum_warps(x, self.lanes)
        self.sum_tile = {"C": self.channels, "LANES": self.lanes, "ROWS": sum_rows, "num_warps": warps}

    def empty(self, x: Tensor, n: int, rows: int) -> list[Tensor]:
        """n buffers of (rows, C) in float32."""
        return [torch.empty((rows, self.channels), dtype=torch.float32, device=x.device) for _ in range(n)]

    def partial(self, x: Tensor) -> list[Tensor]:
        """Two buffers for the sums of the slices."""
        return self.empty(x, 2, self.batch * self.slices)

    def partial_moments(self, x: Tensor) -> list[Tensor]:
        """Memory for mean and centred second moment of slices, (B, slices, C), and for their voxels, (B, slices)."""
        shapes = (self.batch, self.slices, self.channels), (self.batch, self.slices, self.channels)
        shapes += ((self.batch, self.slices),)
        return [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]


def _sum_warps(x: Tensor, lanes: int) -> int:
    """Warps of the sums' programs, which exchange what each has summed of every channel.

    Of many channels that takes longer than the rest. Other GPUs were not measured, and on an RTX 50 each thread of two
    warps would spill up to 96 bytes.
    """
    return 2 if lanes >= 64 and not channels_first(x) and capability(x.device)[0] == HOPPER else 4


class Norm(NamedTuple):
    """Statistics and parameters of a norm: (B, C) or, for the batch norm, (1, C); (C,) or None."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    def constants(self) -> dict:
        return {"EPS": self.eps, "AFFINE": self.weight is not None}


def moments(x: Tensor, kind: str, groups: int, activation: str, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of x + bias, behind the activation if that comes first."""
    grid = LaunchGrid(x, kind, groups)
    partial = grid.partial_moments(x)
    launch(wrap_triton(_moments_kernel))[grid.slices_grid](
        x, bias, *partial, grid.voxels, grid.steps, FIRST=channels_first(x), BIAS=bias is not None,
        ACT=_first_act(activation), **grid.sum_tile,
    )  # fmt: skip
    return merge_moments(partial, kind, groups)


def channels_first(x: Tensor) -> int:
    """0 for a channels-last map, for a contiguous one what surely divides its voxels: the kernels' FIRST."""
    if channels_last(x):
        return 0
    return 16 if x[0, 0].numel() % 16 == 0 else 1


def _first_act(activation: str) -> int:
    """The code of an activation in front of the norm; those behind it make no difference to its moments."""
    return CODES[activation if activation == "gelu_first" else "none"]


def merge_moments(partial: Sequence[Tensor], kind: str, groups: int) -> tuple[Tensor, Tensor]:
    """(mean, variance) from the moments of all slices, at most :attr:`MergeGrid.most_slices` of them."""
    batch, slices, channels = partial[0].shape
    merge = MergeGrid(batch, channels, kind, groups)
    mean, variance = (partial[0].new_empty((merge.statistics, channels)) for _ in range(2))
    launch(wrap_triton(_merge_moments_kernel))[merge.grid](
        *partial,
        mean,
        variance,
        FLAT=0.0 if kind == "batch" else FLAT,
        ALL=triton.next_power_of_2(channels),
        **merge.constants(slices),
        num_warps=8,
    )
    return mean, variance


def merge_processes(everyones: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance and unbiased variance of all processes, (1, C), and the share of one in what they have, (1, 1).

    Args:
        everyones: (processes, 3, C): mean, variance and count of each, in float32.
        rank: whose share.
    """
    processes, _, channels = everyones.shape
    mean, variance, unbiased = (everyones.new_empty((1, channels)) for _ in range(3))
    share = everyones.new_empty((1, 1))
    lanes = triton.next_power_of_2(channels)
    launch(wrap_triton(_merge_processes_kernel))[(1,)](
        everyones, mean, variance, unbiased, share, processes, rank, channels, LANES=lanes
    )
    return mean, variance, unbiased, share


def forward(
    x: Tensor, norm: Norm, residual: Tensor | None, kind: str, groups: int, activation: str, bias: Tensor | None = None
) -> Tensor:
    """activation(norm(x + bias)) + residual with given statistics."""
    grid = LaunchGrid(x, kind, groups)
    out = map_memory(x, grid.channels, x.shape[2:])
    if residual is not None:
        residual = residual.contiguous(memory_format=CHANNELS_LAST[x.ndim])
    launch(wrap_triton(_norm_act_forward_kernel))[grid.tiles_grid](
        x, bias, *norm.tensors, residual, out, grid.voxels, grid.sample_stride, FIRST=channels_first(x),
        BIAS=bias is not None, RESIDUAL=residual is not None, ACT=CODES[activation], **norm.constants(), **grid.tile,
    )  # fmt: skip
    return out.movedim(-1, 1)


def backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    kind: str,
    groups: int,
    activation: str,
    bias: Tensor | None = None,
    average: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of the norm's weight and bias.

    Where statistics span processes, ``average`` makes the means of this one, (2, C), those of all, in place.
    """
    grid = LaunchGrid(x, kind, groups)
    partial = grid.partial(x)
    launch(wrap_triton(_gradient_sums_kernel))[grid.slices_grid](
        grad, x, bias, *norm.tensors, *partial, grid.voxels, grid.steps, grid.sample_stride,
        FIRST=channels_first(x), BIAS=bias is not None, ACT=CODES[activation], **norm.constants(), **grid.sum_tile,
    )  # fmt: skip
    grad_weight, grad_bias, *means = merge_gradient_sums(grid, partial, norm)
    if average is not None:
        means = torch.cat(means)
        average(means)
        means = means.chunk(2)
    grad_x = input_gradient(grid, grad, x, norm, *means, activation, bias)
    return grad_x, over_samples(grad_weight, norm), over_samples(grad_bias, norm)


def over_samples(gradient: Tensor, norm: Norm) -> Tensor:
    """Sum of a parameter's gradients by sample, (B, C) -> (C,); those of the batch norm are (1, C).

    Of a norm without parameters nobody wants it, and it is one of the samples.
    """
    return gradient[0] if norm.weight is None or gradient.shape[0] == 1 else gradient.sum(0)


def merge_gradient_sums(grid: LaunchGrid, partial: list[Tensor], norm: Norm) -> list[Tensor]:
    """Gradients of weight and bias by sample, means of w g and of w g xhat, from the sums of all slices."""
    out = grid.empty(partial[0], 4, grid.merge.statistics)
    launch(wrap_triton(_merge_gradient_sums_kernel))[grid.merge.grid](
        *partial, norm.weight, *out, grid.voxels, grid.merge.samples,
        AFFINE=norm.weight is not None, **grid.merge.constants(grid.slices), num_warps=8,
    )  # fmt: skip
    return out


def input_gradient(
    grid: LaunchGrid, grad: Tensor, x: Tensor, norm: Norm, mean_g: Tensor, mean_gx: Tensor, activation: str,
    bias: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of x, in its layout; in the memory ``out``, (B, *spatial, C), if it is given, which may be grad's."""
    first = channels_first(x)
    if out is None and first:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elif out is None:
        out = map_memory(x, grid.channels, x.shape[2:])
    launch(wrap_triton(_norm_act_backward_kernel))[grid.tiles_grid](
        grad, x, bias, *norm.tensors, mean_g, mean_gx, out, grid.voxels, grid.sample_stride,
        FIRST=first, BIAS=bias is not None, ACT=CODES[activation], **norm.constants(), **grid.tile,
    )  # fmt: skip
    return out if first else out.movedim(-1, 1)


def update_running_statistics(
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    unbiased: float,
) -> None:
    """What BatchNorm does to its buffers in training."""
    channels = running_mean.numel()
    launch(wrap_triton(_running_statistics_kernel))[(1,)](
        mean, variance, bias, running_mean, running_variance, batches_tracked, channels, momentum, unbiased,
        BIAS=bias is not None, LANES=MAX_CHANNELS,
    )  # fmt: skip


@triton.jit
def known_divisor(voxels, FIRST: tl.constexpr):
    """Tells the compiler a divisor of the voxels, which a load of several of them at once needs."""
    if FIRST:
        voxels = voxels // FIRST * FIRST
    return voxels


@triton.jit
def places(sample, voxel, channel, voxels, C: tl.constexpr, FIRST: tl.constexpr):
    """(ROWS, LANES) offsets in a map."""
    if FIRST:
        return (sample * C + channel)[None, :] * voxels + voxel[:, None]
    return (sample * voxels + voxel)[:, None] * C + channel[None, :]


@triton.jit
def _biased(value, bias, channel, C: tl.constexpr, BIAS: tl.constexpr):
    """(ROWS, LANES) numbers of a map in float32, and to each channel its bias."""
    value = value.to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    return value


# Sizes stay run-time values, and tell the compiler nothing: each version less is a tenth of a second of compilation.
@triton.jit(do_not_specialize=["voxels", "steps"])
def _moments_kernel(
    x,  # (B, C, V) if FIRST, else (B, V, C)
    bias,  # (C,) of the convolution in front, if BIAS
    partial_mean, partial_m2, partial_count,  # (B, slices, C), (B, slices, C), (B, slices)
    voxels, steps,  # V, and blocks of ROWS voxels of a program
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of a contiguous x
    BIAS: tl.constexpr,
    ACT: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and centred second moment of a slice of voxels, per channel."""
    STAGES: tl.constexpr = 2 if ACT == 4 else 3  # blocks on their way or at hand: gelu takes longer than they do
    voxels = known_divisor(voxels, FIRST)
    channel = tl.arange(0, LANES)
    begin = tl.program_id(0) * steps * ROWS
    x += tl.program_id(1) * voxels * C
    start = channel * voxels + begin if FIRST else begin * C + channel
    origin = tl.load(x + start, mask=channel < C, other=0.0).to(tl.float32)
    if BIAS:
        origin += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    origin = before_norm(origin, ACT, x.dtype.element_ty)
    first = tl.zeros((ROWS, LANES), tl.float32)
    second = tl.zeros((ROWS, LANES), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        voxel = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
        value = tl.load(x + places(0, voxel, channel, voxels, C, FIRST), mask=inside, other=0.0)
        value = _biased(value, bias, channel, C, BIAS)
        value = tl.where(inside, before_norm(value, ACT, x.dtype.element_ty) - origin[None, :], 0.0)
        first += value
        second += value * value
    count = tl.minimum(steps * ROWS, voxels - begin).to(tl.float32)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    store_moments(partial_mean, partial_m2, partial_count, program, C, channel, channel < C, origin, tl.sum(first, 0),
                  tl.sum(second, 0), count)  # fmt: skip


@triton.jit
def store_moments(mean, m2, count, program, C: tl.constexpr, channel, inside, origin, first, second, voxels):
    """Moments of a slice from its sums about an origin, of `voxels` numbers a channel."""
    offset = program * C + channel
    tl.store(mean + offset, origin + first / voxels, mask=inside)
    tl.store(m2 + offset, second - first * first / voxels, mask=inside)
    tl.store(count + program, voxels)


@triton.jit
def _over_group(value, channel, channels, GROUP: tl.constexpr):
    """Sum over the channels of a group, for each of its channels."""
    if GROUP == 1:
        return value
    same = (channel[:, None] // GROUP == channel[None, :] // GROUP) & (channel < channels)[None, :]
    return tl.sum(tl.where(same, value[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["slices", "channels"])
def _merge_moments_kernel(
    partial_mean, partial_m2, partial_count,  # (B, slices, C), (B, slices, C), (B, slices)
    mean, variance,  # (B, C), or (1, C) for the batch norm
    slices, channels,  # that share a statistic, and C
    FLAT: tl.constexpr,  # deviations that are rounding, as a share of the largest mean; 0: all are kept
    ALL: tl.constexpr,  # channels, rounded up
    PIECES: tl.constexpr,  # slices, rounded up
    LANES: tl.constexpr, GROUP: tl.constexpr,  # channels of a program and of a statistic
):  # fmt: skip
    """Mean and variance from the moments of all slices that share a statistic; infinite where that is rounding."""
    statistic = tl.program_id(0)
    channel, piece = tl.program_id(1) * LANES + tl.arange(0, LANES), tl.arange(0, PIECES)
    inside = (piece < slices)[:, None] & (channel < channels)[None, :]
    offset = (statistic * slices + piece)[:, None] * channels + channel[None, :]
    means = tl.load(partial_mean + offset, mask=inside, other=0.0)
    m2 = tl.load(partial_m2 + offset, mask=inside, other=0.0)
    counts = tl.load(partial_count + statistic * slices + piece, mask=piece < slices, other=0.0)
    count = tl.sum(counts, 0)
    counts = counts[:, None]

    channel_mean = tl.sum(means * counts, 0) / count
    group_mean = _over_group(channel_mean, channel, channels, GROUP) / GROUP
    spread = means - group_mean[None, :]
    centred = tl.sum(tl.where(inside, m2 + counts * spread * spread, 0.0), 0)
    group_variance = _over_group(centred, channel, channels, GROUP) / (count * GROUP)
    if FLAT > 0:
        every = tl.arange(0, ALL)
        first = tl.load(partial_mean + statistic * slices * channels + every, mask=every < channels, other=0.0)
        rounding = FLAT * tl.max(tl.abs(first), 0)
        group_variance = tl.where(group_variance <= rounding * rounding, float("inf"), group_variance)
    tl.store(mean + statistic * channels + channel, group_mean, mask=channel < channels)
    tl.store(variance + statistic * channels + channel, group_variance, mask=channel < channels)


@triton.jit(do_not_specialize=["processes", "rank", "channels"])
def _merge_processes_kernel(
    everyones,  # (processes, 3, C): mean, variance and count
    mean, variance, unbiased,  # (1, C)
    share,  # (1, 1): of process `rank` in the count
    processes, rank, channels, LANES: tl.constexpr,
):  # fmt: skip
    """Mean, variance and unbiased variance of all processes, one added after the other."""
    channel = tl.arange(0, LANES)
    inside = channel < channels
    count = tl.zeros((LANES,), tl.float32)
    merged = tl.zeros((LANES,), tl.float32)
    centred = tl.zeros((LANES,), tl.float32)
    mine = tl.zeros((LANES,), tl.float32)
    for process in range(processes):
        row = everyones + process * 3 * channels + channel
        more = tl.load(row + 2 * channels, mask=inside, other=1.0)
        away = tl.load(row, mask=inside, other=0.0) - merged
        count += more
        merged += away * more / count
        centred += more * (tl.load(row + channels, mask=inside, other=0.0) + away * away * (count - more) / count)
        mine = tl.where(process == rank, more, mine)
    tl.store(mean + channel, merged, mask=inside)
    tl.store(variance + channel, centred / count, mask=inside)
    tl.store(unbiased + channel, centred / tl.maximum(count - 1.0, 1.0), mask=inside)
    tl.store(share + channel, mine / count, mask=channel == 0)


@triton.jit(do_not_specialize=["voxels", "sample_stride"])
def _norm_act_forward_kernel(
    x,  # (B, C, V) if FIRST, else (B, V, C)
    bias,  # (C,) of the convolution in front, if BIAS
    mean, variance,  # (B, C), or (1, C) for the batch norm
    norm_weight, norm_bias,  # (C,) or none
    residual,  # (B, V, C), if RESIDUAL
    out,  # (B, V, C)
    voxels, sample_stride,  # V, and from the statistics of a sample to those of the next
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of a contiguous x
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACT: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """activation(norm(x + bias)) + residual, with given statistics."""
    voxels = known_divisor(voxels, FIRST)
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    _, _, a, b = affine(mean, variance, norm_weight, norm_bias, sample * sample_stride, channel, C, EPS, AFFINE)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
    place = places(sample, voxel, channel, voxels, C, FIRST)
    raw = tl.load(x + place, mask=inside, other=0.0)
    value = before_norm(_biased(raw, bias, channel, C, BIAS), ACT, raw.dtype)
    value = after_norm(value * a[None, :] + b[None, :], ACT, raw.dtype)
    if RESIDUAL:
        value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["voxels", "steps", "sample_stride"])
def _gradient_sums_kernel(
    grad,  # (B, V, C), of the result
    x,  # (B, C, V) if FIRST, else (B, V, C)
    bias,  # (C,) of the convolution in front, if BIAS
    mean, variance,  # (B, C), or (1, C) for the batch norm
    norm_weight, norm_bias,  # (C,) or none
    partial_g, partial_gx,  # (B, slices, C)
    voxels, steps, sample_stride,
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of a contiguous x
    BIAS: tl.constexpr,
    ACT: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of g, the gradient behind the norm, and of g times the normalised x."""
    STAGES: tl.constexpr = 2 if ACT == 4 else 3
    voxels = known_divisor(voxels, FIRST)
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    m, r, a, b = affine(mean, variance, norm_weight, norm_bias, sample * sample_stride, channel, C, EPS, AFFINE)
    begin = tl.program_id(0) * steps * ROWS
    sum_g = tl.zeros((ROWS, LANES), tl.float32)
    sum_gx = tl.zeros((ROWS, LANES), tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        voxel = begin + step * ROWS + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
        offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
        place = places(sample, voxel, channel, voxels, C, FIRST)
        raw = tl.load(x + place, mask=inside, other=0.0)
        value = before_norm(_biased(raw, bias, channel, C, BIAS), ACT, raw.dtype)
        g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        g = g * slope_after_norm(value * a[None, :] + b[None, :], ACT)
        sum_g += g
        sum_gx += g * (value - m[None, :]) * r[None, :]
    out = (sample * tl.num_programs(0) + tl.program_id(0)) * C + channel
    tl.store(partial_g + out, tl.sum(sum_g, 0), mask=channel < C)
    tl.store(partial_gx + out, tl.sum(sum_gx, 0), mask=channel < C)


@triton.jit(do_not_specialize=["voxels", "samples", "slices", "channels"])
def _merge_gradient_sums_kernel(
    partial_g, partial_gx,  # (B, slices, C)
    weight,  # (C,) of the norm, if AFFINE
    grad_weight, grad_bias, mean_g, mean_gx,  # (B, C), or (1, C) for the batch norm
    voxels, samples, slices, channels,
    AFFINE: tl.constexpr, PIECES: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums over all slices, and the means of w g and of w g xhat over what shares a statistic."""
    statistic = tl.program_id(0)
    channel, piece = tl.program_id(1) * LANES + tl.arange(0, LANES), tl.arange(0, PIECES)
    inside = (piece < slices)[:, None] & (channel < channels)[None, :]
    offset = (statistic * slices + piece)[:, None] * channels + channel[None, :]
    sum_g = tl.sum(tl.load(partial_g + offset, mask=inside, other=0.0), 0)
    sum_gx = tl.sum(tl.load(partial_gx + offset, mask=inside, other=0.0), 0)
    out = statistic * channels + channel
    tl.store(grad_weight + out, sum_gx, mask=channel < channels)
    tl.store(grad_bias + out, sum_g, mask=channel < channels)
    if AFFINE:
        w = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
        sum_g, sum_gx = w * sum_g, w * sum_gx
    count = voxels * samples * GROUP * 1.0  # either number may be a constant
    tl.store(mean_g + out, _over_group(sum_g, channel, channels, GROUP) / count, mask=channel < channels)
    tl.store(mean_gx + out, _over_group(sum_gx, channel, channels, GROUP) / count, mask=channel < channels)


@triton.jit(do_not_specialize=["voxels", "sample_stride"])
def _norm_act_backward_kernel(
    grad,  # (B, V, C), of the result
    x,  # (B, C, V) if FIRST, else (B, V, C)
    bias,  # (C,) of the convolution in front, if BIAS
    mean, variance,  # (B, C), or (1, C) for the batch norm
    norm_weight, norm_bias,  # (C,) or none
    mean_g, mean_gx,  # like mean
    out,  # gradient of x, in its layout
    voxels, sample_stride,
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of a contiguous x
    BIAS: tl.constexpr,
    ACT: tl.constexpr, EPS: tl.constexpr, AFFINE: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dx = r (w g - mean(w g) - xhat mean(w g xhat)), through the activation in front of the norm if there is one."""
    voxels = known_divisor(voxels, FIRST)
    channel = tl.arange(0, LANES)
    sample = tl.program_id(1)
    statistics = sample * sample_stride
    m, r, a, b = affine(mean, variance, norm_weight, norm_bias, statistics, channel, C, EPS, AFFINE)
    # per channel: dx = a g + by_x x + constant
    by_x = -r * r * tl.load(mean_gx + statistics + channel, mask=channel < C, other=0.0)
    constant = -m * by_x - r * tl.load(mean_g + statistics + channel, mask=channel < C, other=0.0)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
    place = places(sample, voxel, channel, voxels, C, FIRST)
    raw = _biased(tl.load(x + place, mask=inside, other=0.0), bias, channel, C, BIAS)
    value = raw
    if ACT == 4:
        below, density = normal(raw)
        value = raw * below
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    g = g * slope_after_norm(value * a[None, :] + b[None, :], ACT)
    g = g * a[None, :] + value * by_x[None, :] + constant[None, :]
    if ACT == 4:
        g = g * (below + raw * density)
    tl.store(out + place, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["channels", "momentum", "unbiased"])
def _running_statistics_kernel(
    mean, variance, bias,  # (1, C), (1, C), and (C,) if BIAS
    running_mean, running_variance, batches_tracked,  # (C,), (C,), a single number
    channels, momentum, unbiased, BIAS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, LANES)
    inside = channel < channels
    now = tl.load(mean + channel, mask=inside)
    if BIAS:
        now += tl.load(bias + channel, mask=inside).to(tl.float32)
    before = tl.load(running_mean + channel, mask=inside)
    tl.store(running_mean + channel, before + momentum * (now - before), mask=inside)
    now = tl.load(variance + channel, mask=inside) * unbiased
    before = tl.load(running_variance + channel, mask=inside)
    tl.store(running_variance + channel, before + momentum * (now - before), mask=inside)
    tl.store(batches_tracked, tl.load(batches_tracked) + 1)
