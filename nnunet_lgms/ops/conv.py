"""Dense "same" convolution for maps with many voxels and few channels.

At full resolution LGMSNet has 4 to 64 channels where cuDNN's kernels are made for hundreds: on an H100 its input
gradients there take up to six times as long as a product that reads every voxel once (4 to 16 channels, 128^3), and
grouped convolutions twice as long as dense ones. Channels-last maps of that kind go to an implicit matrix product in
Triton (`conv_triton.py`), forward and input gradient; weight gradients are cuDNN's. Everything else, and everything
when the environment variable NNUNET_LGMS_KERNELS is `off`, is `F.conv2d` / `F.conv3d`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import triton_op
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops import conv_cpu
from nnunet_lgms.ops.backend import HALF, channels_last, compute_dtype, use_kernels
from nnunet_lgms.ops.channels import join_channels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.norm_act import norm_act, statistics_known

CONV = {2: F.conv2d, 3: F.conv3d}
MAX_CHANNELS = {1: 64, 3: 32}  # of a group, by kernel along x: what fits shared memory
MIN_VOXELS = 1 << 20  # with fewer, cuDNN's kernels are as good


def same_conv(x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Stride-1 convolution with zero padding that keeps the size.

    Args:
        x: (B, C_in, H, W) or (B, C_in, D, H, W); or one such map for each group, of C_in / groups channels.
        weight: (C_out, C_in / groups, *k), odd k.
        bias: (C_out,) or None.
        groups: groups of channels that are convolved apart.

    Returns:
        (B, C_out, *spatial) in the dtype of x, or of autocast where that is on.
    """
    xs = [x] if isinstance(x, Tensor) else list(x)
    if kernels_fit_conv(xs, weight):
        dtype = compute_dtype(xs[0])
        return _convolve([x.to(dtype) for x in xs], weight, bias, groups)
    if xs[0].device.type == "cpu":
        return conv_cpu.same_conv(xs, weight, bias, groups)
    x = join_channels(xs)
    return CONV[x.ndim - 2](x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=groups)


def conv_norm_act(x: Tensor, conv: _ConvNd, norm: nn.Module, activation: str, residual: Tensor | None = None) -> Tensor:
    """:func:`same_conv` and :func:`norm_act`; one pass over memory where the norm's statistics are known before.

    Args:
        x: (B, C_in, *spatial).
        conv: stride 1, "same" padding.
        norm: norm of its output channels.
        activation: as in :func:`norm_act`.
        residual: added last, (B, C_out, *spatial).

    Returns:
        (B, C_out, *spatial).
    """
    if statistics_known(norm) and not torch.is_grad_enabled() and kernels_fit_conv([x], conv.weight):
        return _convolve_finished(
            x.to(compute_dtype(x)), conv.weight, conv.bias, conv.groups, norm.running_mean, norm.running_var,
            norm.weight, norm.bias, norm.eps, activation, None if residual is None else to_channels_last(residual),
        )  # fmt: skip
    return norm_act(same_conv(x, conv.weight, conv.bias, conv.groups), norm, activation, residual)


def kernels_fit_conv(xs: Sequence[Tensor], weight: Tensor) -> bool:
    """Few channels, many voxels, channels innermost, half precision, kernels 1 or 3, offsets that fit 32 bits."""
    x = xs[0]
    voxels = x.numel() // x.shape[1]
    return (
        use_kernels(x)
        and compute_dtype(x) in HALF
        and all(channels_last(x) for x in xs)
        and all(k in (1, 3) for k in weight.shape[2:])
        and max(weight.shape[:2]) <= MAX_CHANNELS[weight.shape[-1]]
        and voxels >= MIN_VOXELS
        and voxels * max(weight.shape[0], *(x.shape[1] for x in xs)) < 2**31
    )


@triton_op("nnunet_lgms::same_conv", mutates_args=())
def _convolve(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    from nnunet_lgms.ops import conv_triton

    return conv_triton.convolve(xs, weight, bias, groups)


@triton_op("nnunet_lgms::same_conv_input_grad", mutates_args=())
def _convolve_transposed(grad: Tensor, weight: Tensor, groups: int, parts: int) -> list[Tensor]:
    from nnunet_lgms.ops import conv_triton

    return conv_triton.convolve_transposed(grad, weight, groups, parts)


@triton_op("nnunet_lgms::same_conv_norm_act", mutates_args=())
def _convolve_finished(
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
    """Convolution, norm of given statistics and activation; for prediction, it has no gradient."""
    from nnunet_lgms.ops import conv_triton

    finish = conv_triton.Finish(mean, variance, norm_weight, norm_bias, eps, activation, residual)
    return conv_triton.convolve([x], weight, bias, groups, finish)


def _setup(ctx, inputs, output):
    xs, weight, bias, ctx.groups = inputs
    ctx.save_for_backward(weight, *xs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    weight, *xs = ctx.saved_tensors
    grad = to_channels_last(grad)
    grad_xs = [None] * len(xs)
    grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[0]):
        grad_xs = _convolve_transposed(grad, weight, ctx.groups, len(xs))
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(grad, join_channels(xs), weight, ctx.groups)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = _bias_gradient(grad).to(ctx.bias_dtype)
    return grad_xs, grad_weight, grad_bias, None


_convolve.register_autograd(_backward, setup_context=_setup)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias of :func:`same_conv` (one group), from that of its result, channels-last.

    For the backward pass of an operator that contains a convolution; ``x`` in the dtype that it was convolved in.
    """
    grad = grad.to(x.dtype)
    if kernels_fit_conv([grad], weight):
        (grad_x,) = _convolve_transposed(grad, weight, 1, 1)
    else:
        grad_x = _aten_gradient(grad, x, weight.to(x.dtype), 0)
    grad_weight = _weight_gradient(grad, x, weight, 1)
    return grad_x, grad_weight, None if bias is None else _bias_gradient(grad).to(bias.dtype)


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.ndim)], dtype=torch.float32)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """cuDNN's: the one of a convolution's three products that it does well on narrow maps, unless it is grouped.

    So groups are multiplied all with all, and what belongs to no pair of them is dropped.
    """
    out_channels, channels, *kernel = weight.shape
    dense = _aten_gradient(grad, x, grad.new_empty((out_channels, channels * groups, *kernel)), 1)
    blocks = [w[:, i * channels : (i + 1) * channels] for i, w in enumerate(dense.chunk(groups))]
    return torch.cat(blocks).to(weight.dtype)


def _aten_gradient(grad: Tensor, x: Tensor, weight: Tensor, of: int) -> Tensor:
    """PyTorch's gradient of x (0) or of weight (1)."""
    kernel = weight.shape[2:]
    one, padding, zero = [1] * len(kernel), [k // 2 for k in kernel], [0] * len(kernel)
    mask = [of == 0, of == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, one, padding, one, False, zero, 1, mask)[of]
