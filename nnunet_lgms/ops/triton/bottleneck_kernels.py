"""Triton kernels of the inverted bottleneck: its wide map lives in registers alone.

    y = norm1(gelu(x))       D channels
    z = expand y + b         H channels, H = 2 D
    v = norm2(gelu(z))       H channels
    out = squeeze v + b      C channels

All four steps act on single voxels but for the statistics of the norms, so every pass over the map reads x (and the
gradient of out) and computes the rest again: `_hidden_moments_kernel` for the statistics of norm2,
`_bottleneck_forward_kernel` for the result, `_hidden_gradient_sums_kernel` and `_bottleneck_backward_kernel` for the
gradients. The narrow maps are all that memory moves; z and v, written out, were four fifths of it. Products are on
tensor cores, which want powers of two, with sums in float32, z stays in float32. Slices of voxels are merged in a fixed
order, so gradients repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.backend import capability
from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import wrap_triton
from nnunet_lgms.ops.memory_format import map_memory
from nnunet_lgms.ops.triton.activation import affine, gelu, normal
from nnunet_lgms.ops.triton.norm_act_kernels import (
    LaunchGrid,
    Norm,
    input_gradient,
    merge_gradient_sums,
    merge_moments,
    over_samples,
    store_moments,
)
from nnunet_lgms.ops.triton.sums import sum_of_rows

ELEMENTS = 4096  # of the wide map in a program
WARPS = 4
BLACKWELL = 10  # major capability of a B200
SLICES = 1024  # of the batch, for the sums: each holds a partial gradient of the weights
ACTIVATION = "gelu_first"


class Bottleneck(NamedTuple):
    """Norms and weights; expand (H, D, 1...) and squeeze (C, H, 1...) with their biases."""

    norm1: Norm
    expand: Tensor
    expand_bias: Tensor
    norm2: Norm | None
    squeeze: Tensor
    squeeze_bias: Tensor

    def constants(self) -> dict[str, int]:
        hidden, channels = self.expand.shape[:2]
        sizes = {"D": channels, "H": hidden, "C": self.squeeze.shape[0]}
        return {**sizes, "EPS1": self.norm1.eps, "AFFINE1": self.norm1.weight is not None}

    def all_constants(self) -> dict[str, int]:
        return {**self.constants(), "EPS2": self.norm2.eps, "AFFINE2": self.norm2.weight is not None}


def _rows(b: Bottleneck) -> int:
    return ELEMENTS // b.expand.shape[0]


def _gradient_warps(device: torch.device) -> int:
    """Warps of a program of `_bottleneck_backward_kernel`.

    For a B200 Triton takes its tensor memory, and four warps spill 888 bytes of a thread: 622 of the loop's 5,024
    instructions go there (compiled, not timed). Eight spill nothing.
    """
    return 8 if capability(device)[0] == BLACKWELL else WARPS


def _strides(b: Bottleneck) -> tuple[int, ...]:
    """From the statistics of a sample to those of the next."""
    return tuple(n.mean.shape[1] if n.mean.shape[0] > 1 else 0 for n in (b.norm1, b.norm2) if n is not None)


def _slices(x: Tensor) -> int:
    return max(1, SLICES // x.shape[0])


def _grids(x: Tensor, b: Bottleneck, specs: Sequence[tuple[str, int]]) -> list[LaunchGrid]:
    """One for each norm, with the same slices: how many can be merged depends on kind and channels."""
    sizes = b.expand.shape[1], b.expand.shape[0]

    def grids(slices: int) -> list[LaunchGrid]:
        return [LaunchGrid(x, *spec, channels, _rows(b), slices) for spec, channels in zip(specs, sizes, strict=True)]

    return grids(min(grid.slices for grid in grids(_slices(x))))


def hidden_moments(x: Tensor, b: Bottleneck, kind: str, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of gelu(z), the statistics of norm2."""
    grid = LaunchGrid(x, kind, groups, b.expand.shape[0], _rows(b), _slices(x))
    partial = grid.partial_moments(x)
    launch(wrap_triton(_hidden_moments_kernel))[grid.slices_grid](
        x, *b.norm1.tensors, b.expand, b.expand_bias, *partial, grid.voxels, grid.steps, *_strides(b),
        ROWS=_rows(b), **b.constants(), num_warps=WARPS,
    )  # fmt: skip
    return merge_moments(partial, kind, groups)


def forward(x: Tensor, b: Bottleneck) -> Tensor:
    """(B, D, *spatial) channels-last -> (B, C, *spatial) channels-last, with given statistics."""
    out = map_memory(x, b.squeeze.shape[0], x.shape[2:])
    grid = LaunchGrid(x, "instance", 1, None, _rows(b), _slices(x))
    launch(wrap_triton(_bottleneck_forward_kernel))[grid.slices_grid](
        x, *b.norm1.tensors, b.expand, b.expand_bias, *b.norm2.tensors, b.squeeze, b.squeeze_bias, out, grid.voxels,
        grid.steps, *_strides(b), ROWS=_rows(b), **b.all_constants(), num_warps=WARPS,
    )  # fmt: skip
    return out.movedim(-1, 1)


def backward(grad: Tensor, x: Tensor, b: Bottleneck, specs: Sequence[tuple[str, int]]) -> tuple[Tensor, ...]:
    """Gradients of x, of weight and bias of norm1, expand, norm2, squeeze.

    ``specs`` are kind and groups of the two norms.
    """
    rows, (hidden, channels), out_channels = _rows(b), b.expand.shape[:2], b.squeeze.shape[0]
    grid1, grid2 = _grids(x, b, specs)
    programs = grid1.batch * grid1.slices

    def partial(*shape: int) -> Tensor:
        return torch.empty((programs, *shape), dtype=torch.float32, device=x.device)

    sums2, grad_squeeze, grad_squeeze_bias = grid2.partial(x), partial(out_channels, hidden), partial(out_channels)
    launch(wrap_triton(_hidden_gradient_sums_kernel))[grid1.slices_grid](
        grad, x, *b.norm1.tensors, b.expand, b.expand_bias, *b.norm2.tensors, b.squeeze, *sums2, grad_squeeze,
        grad_squeeze_bias, grid1.voxels, grid1.steps, *_strides(b), ROWS=rows, **b.all_constants(), num_warps=WARPS,
    )  # fmt: skip
    grad_weight2, grad_bias2, *means = merge_gradient_sums(grid2, sums2, b.norm2)

    sums1, grad_expand, grad_expand_bias = grid1.partial(x), partial(hidden, channels), partial(hidden)
    grad_y = map_memory(x, channels, x.shape[2:])
    launch(wrap_triton(_bottleneck_backward_kernel))[grid1.slices_grid](
        grad, x, *b.norm1.tensors, b.expand, b.expand_bias, *b.norm2.tensors, b.squeeze, *means, grad_y, *sums1,
        grad_expand, grad_expand_bias, grid1.voxels, grid1.steps, *_strides(b),
        ROWS=rows, **b.all_constants(), num_warps=_gradient_warps(x.device),
    )  # fmt: skip
    grad_weight1, grad_bias1, *means = merge_gradient_sums(grid1, sums1, b.norm1)
    grad_x = input_gradient(grid1, grad_y.movedim(-1, 1), x, b.norm1, *means, ACTIVATION, out=grad_y)
    return (
        grad_x, over_samples(grad_weight1, b.norm1), over_samples(grad_bias1, b.norm1), sum_of_rows(grad_expand),
        sum_of_rows(grad_expand_bias), over_samples(grad_weight2, b.norm2), over_samples(grad_bias2, b.norm2),
        sum_of_rows(grad_squeeze), sum_of_rows(grad_squeeze_bias),
    )  # fmt: skip


@triton.jit
def _tile(x, first, voxels, N: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, N) of a map of N channels from voxel `first` on, zero outside, and the rows that are inside."""
    voxel = first + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None]
    return tl.load(x + voxel[:, None] * N + tl.arange(0, N)[None, :], mask=inside, other=0.0), inside


@triton.jit
def _weights(weight, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, dtype: tl.constexpr):
    """A matrix of (ROWS, COLUMNS), or its transpose."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if TRANSPOSED:
        offset = row[None, :] * COLUMNS + column[:, None]
    else:
        offset = row[:, None] * COLUMNS + column[None, :]
    return tl.load(weight + offset).to(dtype)


@triton.jit
def _vector(pointer, N: tl.constexpr):
    return tl.load(pointer + tl.arange(0, N)).to(tl.float32)


@triton.jit
def _hidden_moments_kernel(
    x,  # (B, V, D)
    mean1, variance1, norm_weight1, norm_bias1,  # as in `_bottleneck_forward_kernel`
    expand, expand_bias,  # (H, D), (H,)
    partial_mean, partial_m2, partial_count,  # (B, slices, H), (B, slices, H), (B, slices)
    voxels, steps, stride1, EPS1: tl.constexpr, AFFINE1: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and centred second moment of gelu(z) over a slice, about its first voxel."""
    sample, hidden = tl.program_id(1), tl.arange(0, H)
    dtype: tl.constexpr = x.dtype.element_ty
    x += sample * voxels * D
    m1, r1, a1, b1 = affine(
        mean1, variance1, norm_weight1, norm_bias1, sample * stride1, tl.arange(0, D), D, EPS1, AFFINE1
    )
    weight, bias = _weights(expand, H, D, True, dtype), _vector(expand_bias, H)
    begin = tl.program_id(0) * steps * ROWS
    nearest = _vector(x + begin * D, D)
    nearest = (gelu(nearest, dtype) * a1 + b1)[:, None] * weight.to(tl.float32)
    origin = gelu(tl.sum(nearest, 0) + bias, dtype)
    total, squares = tl.zeros((ROWS, H), tl.float32), tl.zeros((ROWS, H), tl.float32)
    for step in range(steps):
        raw, inside = _tile(x, begin + step * ROWS, voxels, D, ROWS)
        y = gelu(raw.to(tl.float32), dtype) * a1[None, :] + b1[None, :]
        value = gelu(tl.dot(y.to(dtype), weight) + bias[None, :], dtype)
        value = tl.where(inside, value - origin[None, :], 0.0)
        total += value
        squares += value * value
    count = tl.minimum(steps * ROWS, voxels - begin).to(tl.float32)
    store_moments(partial_mean, partial_m2, partial_count, sample * tl.num_programs(0) + tl.program_id(0), H, hidden,
                  hidden < H, origin, tl.sum(total, 0), tl.sum(squares, 0), count)  # fmt: skip


@triton.jit
def _bottleneck_forward_kernel(
    x,  # (B, V, D)
    mean1, variance1,  # (B, D), or (1, D) for the batch norm
    norm_weight1, norm_bias1,  # (D,), if AFFINE1
    expand, expand_bias,  # (H, D), (H,)
    mean2, variance2,  # (B, H), or (1, H)
    norm_weight2, norm_bias2,  # (H,), if AFFINE2
    squeeze, squeeze_bias,  # (C, H), (C,)
    out,  # (B, V, C)
    voxels, steps,  # V, and blocks of ROWS voxels of a program
    stride1, stride2,  # from the statistics of a sample to those of the next
    EPS1: tl.constexpr, AFFINE1: tl.constexpr, EPS2: tl.constexpr, AFFINE2: tl.constexpr, D: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The result, with given statistics."""
    sample, channel = tl.program_id(1), tl.arange(0, C)
    dtype: tl.constexpr = x.dtype.element_ty
    x += sample * voxels * D
    out += sample * voxels * C
    m1, r1, a1, b1 = affine(
        mean1, variance1, norm_weight1, norm_bias1, sample * stride1, tl.arange(0, D), D, EPS1, AFFINE1
    )
    m2, r2, a2, b2 = affine(
        mean2, variance2, norm_weight2, norm_bias2, sample * stride2, tl.arange(0, H), H, EPS2, AFFINE2
    )
    weight, bias = _weights(expand, H, D, True, dtype), _vector(expand_bias, H)
    weight2, bias2 = _weights(squeeze, C, H, True, dtype), _vector(squeeze_bias, C)
    begin = tl.program_id(0) * steps * ROWS
    for step in range(steps):
        raw, inside = _tile(x, begin + step * ROWS, voxels, D, ROWS)
        y = gelu(raw.to(tl.float32), dtype) * a1[None, :] + b1[None, :]
        value = gelu(tl.dot(y.to(dtype), weight) + bias[None, :], dtype)
        result = tl.dot((value * a2[None, :] + b2[None, :]).to(dtype), weight2) + bias2[None, :]
        offset = (begin + step * ROWS + tl.arange(0, ROWS))[:, None] * C + channel[None, :]
        tl.store(out + offset, result.to(dtype), mask=inside)


@triton.jit
def _hidden_gradient_sums_kernel(
    grad,  # (B, V, C), of the result
    x, mean1, variance1, norm_weight1, norm_bias1, expand, expand_bias, mean2, variance2, norm_weight2, norm_bias2,
    squeeze,  # all as in `_bottleneck_forward_kernel`
    partial_g, partial_gx,  # (B, slices, H)
    grad_squeeze, grad_squeeze_bias,  # (B, slices, C, H), (B, slices, C)
    voxels, steps, stride1, stride2, EPS1: tl.constexpr, AFFINE1: tl.constexpr, EPS2: tl.constexpr,
    AFFINE2: tl.constexpr, D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A slice's part of the gradients of squeeze, and with these the sums that the gradient of norm2 needs.

    Those are of g = squeeze' grad and of g vhat, over the voxels; squeeze is the same for all voxels, so they follow
    from the sums of grad and of grad vhat'.
    """
    sample, hidden, channel = tl.program_id(1), tl.arange(0, H), tl.arange(0, C)
    dtype: tl.constexpr = x.dtype.element_ty
    x += sample * voxels * D
    grad += sample * voxels * C
    m1, r1, a1, b1 = affine(
        mean1, variance1, norm_weight1, norm_bias1, sample * stride1, tl.arange(0, D), D, EPS1, AFFINE1
    )
    m2, r2, a2, b2 = affine(mean2, variance2, norm_weight2, norm_bias2, sample * stride2, hidden, H, EPS2, AFFINE2)
    weight, bias = _weights(expand, H, D, True, dtype), _vector(expand_bias, H)
    begin = tl.program_id(0) * steps * ROWS
    by_voxel, products = tl.zeros((ROWS, C), tl.float32), tl.zeros((C, H), tl.float32)
    for step in range(steps):
        raw, rows = _tile(x, begin + step * ROWS, voxels, D, ROWS)
        incoming, rows = _tile(grad, begin + step * ROWS, voxels, C, ROWS)  # zero outside: no part in any sum
        y = gelu(raw.to(tl.float32), dtype) * a1[None, :] + b1[None, :]
        centred = gelu(tl.dot(y.to(dtype), weight) + bias[None, :], dtype) - m2[None, :]
        products = tl.dot(tl.trans(incoming).to(dtype), centred.to(dtype), products)
        by_voxel += incoming.to(tl.float32)
    total = tl.sum(by_voxel, 0)
    back = _weights(squeeze, C, H, False, dtype).to(tl.float32)
    program = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_g + program * H + hidden, tl.sum(back * total[:, None], 0))
    tl.store(partial_gx + program * H + hidden, tl.sum(back * products, 0) * r2)
    # v is a2 times what was summed, plus norm2's bias
    gradient = products * a2[None, :] + total[:, None] * (b2 + m2 * a2)[None, :]
    matrix = (program * C + channel)[:, None] * H + hidden[None, :]
    tl.store(grad_squeeze + matrix, gradient)
    tl.store(grad_squeeze_bias + program * C + channel, total)


@triton.jit
def _bottleneck_backward_kernel(
    grad,  # (B, V, C), of the result
    x, mean1, variance1, norm_weight1, norm_bias1, expand, expand_bias, mean2, variance2, norm_weight2, norm_bias2,
    squeeze,  # all as in `_bottleneck_forward_kernel`
    mean_g, mean_gx,  # like mean2
    grad_y,  # (B, V, D), in front of norm1
    partial_g, partial_gx,  # (B, slices, D)
    grad_expand, grad_expand_bias,  # (B, slices, H, D), (B, slices, H)
    voxels, steps, stride1, stride2,
    EPS1: tl.constexpr, AFFINE1: tl.constexpr, EPS2: tl.constexpr, AFFINE2: tl.constexpr, D: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of y, and a slice's part of the gradients of expand, with the sums for the gradient of norm1."""
    sample, hidden, channel = tl.program_id(1), tl.arange(0, H), tl.arange(0, D)
    dtype: tl.constexpr = x.dtype.element_ty
    x += sample * voxels * D
    grad += sample * voxels * C
    grad_y += sample * voxels * D
    m1, r1, a1, b1 = affine(mean1, variance1, norm_weight1, norm_bias1, sample * stride1, channel, D, EPS1, AFFINE1)
    m2, r2, a2, b2 = affine(mean2, variance2, norm_weight2, norm_bias2, sample * stride2, hidden, H, EPS2, AFFINE2)
    # the gradient of gelu(z) is a2 squeeze' grad + by_value gelu(z) + constant, per hidden channel
    by_value = -r2 * r2 * _vector(mean_gx + sample * stride2, H)
    constant = -m2 * by_value - r2 * _vector(mean_g + sample * stride2, H)
    back = (_weights(squeeze, C, H, False, tl.float32) * a2[None, :]).to(dtype)
    weight, bias = _weights(expand, H, D, True, dtype), _vector(expand_bias, H)
    weight_back = _weights(expand, H, D, False, dtype)
    begin = tl.program_id(0) * steps * ROWS
    by_voxel, products = tl.zeros((ROWS, H), tl.float32), tl.zeros((H, D), tl.float32)
    for step in range(steps):
        raw, inside = _tile(x, begin + step * ROWS, voxels, D, ROWS)
        incoming, inside = _tile(grad, begin + step * ROWS, voxels, C, ROWS)
        first = gelu(raw.to(tl.float32), dtype)
        z = tl.dot((first * a1[None, :] + b1[None, :]).to(dtype), weight) + bias[None, :]
        below, density = normal(z)
        g = tl.dot(incoming.to(dtype), back) + z * below * by_value[None, :] + constant[None, :]
        g = tl.where(inside, g * (below + z * density), 0.0)
        by_voxel += g
        g = g.to(dtype)
        normalised = ((first - m1[None, :]) * r1[None, :]).to(dtype)
        products = tl.dot(tl.trans(g), normalised, products)
        offset = (begin + step * ROWS + tl.arange(0, ROWS))[:, None] * D + channel[None, :]
        tl.store(grad_y + offset, tl.dot(g, weight_back).to(dtype), mask=inside)
    total, back = tl.sum(by_voxel, 0), weight_back.to(tl.float32)
    program = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_g + program * D + channel, tl.sum(back * total[:, None], 0))
    tl.store(partial_gx + program * D + channel, tl.sum(back * products, 0))
    # y is a1 / r1 times what was summed, plus norm1's bias
    gradient = products * (a1 / r1)[None, :] + total[:, None] * (b1 + m1 * a1)[None, :]
    matrix = (program * H + hidden)[:, None] * D + channel[None, :]
    tl.store(grad_expand + matrix, gradient)
    tl.store(grad_expand_bias + program * H + hidden, total)
