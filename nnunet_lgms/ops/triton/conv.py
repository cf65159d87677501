"""Dense "same" convolutions of channels-last maps on a GPU.

Half-precision maps with many voxels and few channels go to the implicit matrix products of `conv_kernels.py` and, for
weight gradients, `conv_weight_kernels.py`. Other maps go to the libraries, 1x1 convolutions as the matrix
products that they are there, with the gradient of a bias as the sum of a few parallel slices.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.library import triton_op
from nnunet_lgms.ops.memory_format import HALF, as_channels_last, channels_last, compute_dtype
from nnunet_lgms.ops.norms import statistics_known
from nnunet_lgms.ops.of_weights import of_weights
from nnunet_lgms.ops.recompute import can_be_made_again
from nnunet_lgms.ops.triton import conv_kernels as kernels
from nnunet_lgms.ops.triton.concatenate import concatenate
from nnunet_lgms.ops.triton.conv_weight_kernels import weight_gradient
from nnunet_lgms.ops.triton.layout import to_channels_last
from nnunet_lgms.ops.triton.norm_act import channel_sums, ignores_bias, takes_statistics

CONV = {2: F.conv2d, 3: F.conv3d}
MAX_CHANNELS = {1: 64, 3: 32}  # of a group, by kernel along x: what fits shared memory
MIN_VOXELS = 1 << 20  # with fewer, cuDNN's kernels are as good
# A result so many times as wide as the input is made again in the backward pass, and not kept.
NARROW_WIDENS = 4
PRODUCT_WIDENS = 2
MIN_VOXELS_EPILOGUE = 1 << 16  # but not where norm and activation cost them a pass over the map


def same_conv(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The operator `same_conv` of one map or of one for each group."""
    if _is_narrow(xs, weight):
        dtype = compute_dtype(xs[0])
        xs = [x.to(dtype) for x in xs]
        out = _narrow_conv(xs, weight, bias, groups)
        if not _widens(weight, groups, NARROW_WIDENS):
            return out
        return can_be_made_again(out, lambda w, b, *xs: _narrow_conv(xs, w, b, groups), weight, bias, *xs)
    x = concatenate(xs)
    if not channels_last(x) or x.dtype == torch.float64:
        return _conv(x, weight, bias, groups)
    x = x.to(compute_dtype(x))
    out = _library_conv(x, weight, bias, groups)
    if not (_is_product(weight, groups) and _widens(weight, groups, PRODUCT_WIDENS)):
        return out
    return can_be_made_again(out, _product, x, weight, bias)


def fits_epilogue(xs: Sequence[Tensor], conv: _ConvNd, norm: nn.Module) -> bool:
    """Whether norm and activation behind a convolution can be part of it: in prediction with known statistics."""
    return (
        len(xs) == 1
        and statistics_known(norm)
        and not torch.is_grad_enabled()
        and _is_narrow(xs, conv.weight, MIN_VOXELS_EPILOGUE)
    )


def conv_norm_act(x: Tensor, conv: _ConvNd, norm: nn.Module, activation: str, residual: Tensor | None) -> Tensor:
    """The operator `conv_norm_act` in one pass over memory, where :func:`fits_epilogue` says so."""
    return _conv_norm_act(
        x.to(compute_dtype(x)), conv.weight, conv.bias, conv.groups, norm.running_mean, norm.running_var, norm.weight,
        norm.bias, norm.eps, activation, None if residual is None else to_channels_last(residual),
    )  # fmt: skip


def leaves_bias(xs: Sequence[Tensor], conv: _ConvNd, norm: nn.Module, activation: str) -> bool:
    """Whether the norm behind a convolution is the better place to add its bias.

    PyTorch adds the bias of cuDNN's convolutions in a pass of its own; products and this package's convolutions have it
    for nothing, but not its gradient, which is zero where the norm subtracts the mean of each channel.
    """
    x = xs[0]
    if conv.bias is None or x.dtype == torch.float64 or not all(map(channels_last, xs)):
        return False
    if ignores_bias(norm, activation):
        return True
    is_served = takes_statistics(norm) or (statistics_known(norm) and not torch.is_grad_enabled())
    return is_served and not _is_narrow(xs, conv.weight) and not _is_product(conv.weight, conv.groups)


def _is_narrow(xs: Sequence[Tensor], weight: Tensor, min_voxels: int | None = None) -> bool:
    """Few channels, many voxels, channels innermost, half precision, kernels 1 or 3, offsets that fit 32 bits."""
    x = xs[0]
    voxels = x.numel() // x.shape[1]
    return (
        compute_dtype(x) in HALF
        and all(channels_last(x) for x in xs)
        and all(k in (1, 3) for k in weight.shape[2:])
        and max(weight.shape[:2]) <= MAX_CHANNELS[weight.shape[-1]]
        and voxels >= (MIN_VOXELS if min_voxels is None else min_voxels)
        and voxels * max(weight.shape[0], *(x.shape[1] for x in xs)) < 2**31
    )


def _is_product(weight: Tensor, groups: int) -> bool:
    """Whether a convolution is a matrix product over channels."""
    return groups == 1 and all(k == 1 for k in weight.shape[2:])


def _widens(weight: Tensor, groups: int, times: int) -> bool:
    """Whether a convolution gives so many times the channels that it takes: what it read is all that need be kept."""
    return weight.shape[0] >= times * weight.shape[1] * groups


# --- narrow maps ------------------------------------------------------------------------------------------------------


@triton_op("nnunet_lgms::same_conv", mutates_args=())
def _narrow_conv(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return kernels.convolve(xs, weight, bias, groups)


@triton_op("nnunet_lgms::same_conv_input_gradient", mutates_args=())
def _narrow_input_gradient(grad: Tensor, weight: Tensor, groups: int, parts: int) -> typing.List[Tensor]:  # noqa: UP006  torch 2.6 knows this one only
    return kernels.convolve_transposed(grad, weight, groups, parts)


@triton_op("nnunet_lgms::same_conv_weight_gradient", mutates_args=())
def _narrow_weight_gradient(grad: Tensor, xs: Sequence[Tensor], weight: Tensor, groups: int) -> Tensor:
    return weight_gradient(grad, xs, weight, groups)


@triton_op("nnunet_lgms::conv_norm_act", mutates_args=())
def _conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """Convolution, norm of given statistics, (C_out,), and activation; for prediction, it has no gradient."""
    epilogue = kernels.Epilogue(mean, variance, norm_weight, norm_bias, eps, activation, residual)
    return kernels.convolve([x], weight, bias, groups, epilogue)


def _setup(ctx, inputs, output):
    xs, weight, bias, ctx.groups = inputs
    ctx.save_for_backward(weight, *xs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    weight, *xs = ctx.saved_tensors
    grad = to_channels_last(grad)
    parts = len(xs)
    grad_xs = [None] * parts
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(grad, xs, weight, ctx.groups)
    del xs  # made for this, maybe, and as large as their gradient
    if any(ctx.needs_input_grad[0]):
        grad_xs = _narrow_input_gradient(grad, weight, ctx.groups, parts)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = channel_sums(grad).to(ctx.bias_dtype)
    return grad_xs, grad_weight, grad_bias, None


_narrow_conv.register_autograd(_backward, setup_context=_setup)


# --- other maps -------------------------------------------------------------------------------------------------------


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    if channels_last(x) and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        weight = of_weights(as_channels_last, weight)  # as cuDNN would in every prediction
        bias = None if bias is None else of_weights(Tensor.to, bias, weight.dtype)
    return CONV[x.ndim - 2](x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=groups)


def _library_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The convolution of a channels-last map, by the library that does it best."""
    if torch.is_grad_enabled() and (bias is not None or groups > 1):
        return _OwnGradients.apply(x, weight, bias, groups).movedim(-1, 1)
    return _product(x, weight, bias) if _is_product(weight, groups) else _conv(x, weight, bias, groups)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else of_weights(Tensor.to, bias, x.dtype)  # as autocast does
    return F.linear(x.movedim(1, -1), weight.flatten(1).to(x.dtype), bias).movedim(-1, 1)


def fits_linear(x: Tensor, layer: nn.Linear) -> bool:
    """Whether a layer of tokens gains by :func:`linear`: where it has a bias, for whose gradient somebody asks."""
    return layer.bias is not None and torch.is_grad_enabled() and x.is_contiguous() and x.dtype != torch.float64


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator `linear`: tokens (..., C) are voxels of a map with channels innermost, the layer is a 1x1 kernel."""
    x = x.to(compute_dtype(x))
    rows = x.view(1, 1, -1, x.shape[-1]).movedim(-1, 1)
    return _OwnGradients.apply(rows, weight[..., None, None], bias, 1).view(*x.shape[:-1], weight.shape[0])


class _OwnGradients(Function):
    """`_library_conv` with this package's gradients of a bias and of grouped weights.

    (B, C_in, *spatial) -> (B, *spatial, C_out).
    """

    # torch.compile makes the gradients of a Function contiguous, so this one returns what is contiguous.

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.has_bias = groups, bias is not None
        with torch.no_grad():
            return _library_conv(x, weight, bias, groups).movedim(1, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, grad_x = to_channels_last(grad.movedim(-1, 1)).to(x.dtype), None
        grad_weight = _weight_gradient(grad, [x], weight, ctx.groups)
        if ctx.needs_input_grad[0] and _is_product(weight, ctx.groups):
            del x  # made for this, maybe, and as large as its gradient
            grad_x = F.linear(grad.movedim(1, -1), weight.to(grad.dtype).flatten(1).T).movedim(-1, 1)
        elif ctx.needs_input_grad[0]:
            grad_x = _aten_gradient(grad, x, weight.to(grad.dtype), 0, ctx.groups)
        return grad_x, grad_weight, channel_sums(grad) if ctx.has_bias else None, None


def _weight_gradient(grad: Tensor, xs: Sequence[Tensor], weight: Tensor, groups: int) -> Tensor:
    """That of narrow maps by the kernel, else cuDNN's, which is slow for groups.

    So these are multiplied all with all, and what belongs to no pair of them is dropped.
    """
    if _is_narrow([grad, *xs], weight) and not _is_product(weight, groups):
        return _narrow_weight_gradient(grad, xs, weight, groups).to(weight.dtype)
    x = concatenate(xs)
    if _is_product(weight, groups):
        rows, inputs = (t.movedim(1, -1).flatten(0, -2) for t in (grad, x))
        return (rows.T @ inputs).view(weight.shape).to(weight.dtype)
    out_channels, channels, *kernel = weight.shape
    dense = _aten_gradient(grad, x, grad.new_empty((out_channels, channels * groups, *kernel)), 1)
    blocks = [w[:, i * channels : (i + 1) * channels] for i, w in enumerate(dense.chunk(groups))]
    return torch.cat(blocks).to(weight.dtype)


def _aten_gradient(grad: Tensor, x: Tensor, weight: Tensor, of: int, groups: int = 1) -> Tensor:
    """PyTorch's gradient of x (0) or of weight (1)."""
    kernel = weight.shape[2:]
    one, padding, zero = [1] * len(kernel), [k // 2 for k in kernel], [0] * len(kernel)
    mask = [of == 0, of == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, one, padding, one, False, zero, groups, mask)[of]
