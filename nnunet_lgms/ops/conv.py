"""Dense "same" convolution for maps with many voxels and few channels.

At full resolution LGMSNet has 4 to 64 channels where cuDNN's kernels are made for hundreds: on an H100 its input
gradients there take up to six times as long as a product that reads every voxel once (4 to 16 channels, 128^3), and
grouped convolutions twice as long as dense ones. Channels-last maps of that kind go to an implicit matrix product in
Triton (`triton/conv.py`), forward and input gradient; weight gradients are cuDNN's. Other channels-last maps go to the
libraries, 1x1 convolutions as the matrix products that they are there, with the gradient of a bias as the sum of a few
parallel slices. Everything else, and everything when the environment variable NNUNET_LGMS_KERNELS is `off`, is
`F.conv2d` / `F.conv3d`, on the CPU in the layouts of `cpu/conv.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.library import triton_op
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.channels import join_channels
from nnunet_lgms.ops.cpu import conv as conv_cpu
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, channels_last, compute_dtype
from nnunet_lgms.ops.norm_act import channel_sums, moments_wanted, norm_act, shift_cancels, statistics_known

CONV = {2: F.conv2d, 3: F.conv3d}
MAX_CHANNELS = {1: 64, 3: 32}  # of a group, by kernel along x: what fits shared memory
MIN_VOXELS = 1 << 20  # with fewer, cuDNN's kernels are as good
MIN_VOXELS_FINISHED = 1 << 16  # but not where norm and activation cost them a pass over the map


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
    if use_kernels(x) and channels_last(x) and x.dtype != torch.float64:
        return _library_conv(x.to(compute_dtype(x)), weight, bias, groups)
    return _conv(x, weight, bias, groups)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return CONV[x.ndim - 2](x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=groups)


def _is_product(weight: Tensor, groups: int) -> bool:
    """Whether a convolution is a matrix product over channels."""
    return groups == 1 and all(k == 1 for k in weight.shape[2:])


def _library_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The convolution of a channels-last map, by the library that does it best."""
    if torch.is_grad_enabled() and (bias is not None or groups > 1):
        return _OwnGradients.apply(x, weight, bias, groups).movedim(-1, 1)
    if _is_product(weight, groups):
        return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return _conv(x, weight, bias, groups)


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
        gradients = conv_gradients(
            grad.movedim(-1, 1), *ctx.saved_tensors, ctx.groups, of_x=ctx.needs_input_grad[0], of_bias=ctx.has_bias
        )
        return *gradients, None


def same_conv_moments(
    x: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int, wanted: tuple[str, int, str] | None
) -> tuple[Tensor, list[Tensor]]:
    """:func:`same_conv`, and what :func:`norm_act` wants to know of its result, taken before that goes to memory.

    Args:
        x, weight, bias, groups: as in :func:`same_conv`.
        wanted: by the norm of the result; see :func:`nnunet_lgms.ops.norm_act.moments_wanted`.

    Returns:
        The result, and its moments by slices (`PartialMoments` in `triton/norm_act.py`), none where they come at a
        cost.
    """
    xs = [x] if isinstance(x, Tensor) else list(x)
    if wanted is None or not kernels_fit_conv(xs, weight):
        return same_conv(x, weight, bias, groups), []
    dtype = compute_dtype(xs[0])
    out, *partial = _convolve_moments([x.to(dtype) for x in xs], weight, bias, groups, *wanted)
    return out, partial


def conv_norm_act(
    x: Tensor,
    conv: _ConvNd,
    norm: nn.Module,
    activation: str,
    residual: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """:func:`same_conv` and :func:`norm_act`; one pass over memory where the norm's statistics are known before.

    Args:
        x: (B, C_in, *spatial).
        conv: stride 1, "same" padding.
        norm: norm of its output channels.
        activation: as in :func:`norm_act`.
        residual: added last, (B, C_out, *spatial).
        beside: another map, (B, R, *spatial), to join the result with.

    Returns:
        (B, C_out + R, *spatial).
    """
    if (
        statistics_known(norm)
        and not torch.is_grad_enabled()
        and kernels_fit_conv([x], conv.weight, MIN_VOXELS_FINISHED)
    ):
        out = _convolve_finished(
            x.to(compute_dtype(x)), conv.weight, conv.bias, conv.groups, norm.running_mean, norm.running_var,
            norm.weight, norm.bias, norm.eps, activation, None if residual is None else to_channels_last(residual),
        )  # fmt: skip
        return out if beside is None else join_channels([out, beside])
    wanted = moments_wanted(norm, activation)
    bias, left = split_bias([x], conv, norm, activation)
    out, partial = same_conv_moments(x, conv.weight, bias, conv.groups, wanted)
    return norm_act(out, norm, activation, residual, partial, left, beside)


def split_bias(
    xs: Sequence[Tensor], conv: _ConvNd, norm: nn.Module, activation: str
) -> tuple[Tensor | None, Tensor | None]:
    """The bias that a convolution of xs is to add, and the one left to the norm behind it, its ``shift``."""
    return (None, conv.bias) if _bias_is_left(xs, conv, norm, activation) else (conv.bias, None)


def _bias_is_left(xs: Sequence[Tensor], conv: _ConvNd, norm: nn.Module, activation: str) -> bool:
    """Whether the norm behind a convolution is the better place to add its bias.

    PyTorch adds the bias of cuDNN's convolutions in a pass of its own; products and this package's convolutions have it
    for nothing, but not its gradient, which is zero where the norm subtracts the mean of each channel.
    """
    x = xs[0]
    if conv.bias is None or not use_kernels(x) or x.dtype == torch.float64 or not all(map(channels_last, xs)):
        return False
    if shift_cancels(norm, activation):
        return True
    served = moments_wanted(norm, activation) is not None or (statistics_known(norm) and not torch.is_grad_enabled())
    return served and not kernels_fit_conv(xs, conv.weight) and not _is_product(conv.weight, conv.groups)


def kernels_fit_conv(xs: Sequence[Tensor], weight: Tensor, min_voxels: int | None = None) -> bool:
    """Few channels, many voxels, channels innermost, half precision, kernels 1 or 3, offsets that fit 32 bits."""
    x = xs[0]
    voxels = x.numel() // x.shape[1]
    return (
        use_kernels(x)
        and compute_dtype(x) in HALF
        and all(channels_last(x) for x in xs)
        and all(k in (1, 3) for k in weight.shape[2:])
        and max(weight.shape[:2]) <= MAX_CHANNELS[weight.shape[-1]]
        and voxels >= (MIN_VOXELS if min_voxels is None else min_voxels)
        and voxels * max(weight.shape[0], *(x.shape[1] for x in xs)) < 2**31
    )


@triton_op("nnunet_lgms::same_conv", mutates_args=())
def _convolve(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    from nnunet_lgms.ops.triton import conv as conv_triton

    return conv_triton.convolve(xs, weight, bias, groups)


@triton_op("nnunet_lgms::same_conv_moments", mutates_args=())
def _convolve_moments(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    kind: str,
    norm_groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, mean, second moment, voxels), the latter by slices, for a norm of this kind."""
    from nnunet_lgms.ops.triton import conv as conv_triton

    out, partial = conv_triton.convolve_moments(xs, weight, bias, groups, kind, norm_groups, activation)
    return out, *partial


@triton_op("nnunet_lgms::same_conv_input_grad", mutates_args=())
def _convolve_transposed(grad: Tensor, weight: Tensor, groups: int, parts: int) -> list[Tensor]:
    from nnunet_lgms.ops.triton import conv as conv_triton

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
    from nnunet_lgms.ops.triton import conv as conv_triton

    finish = conv_triton.Finish(mean, variance, norm_weight, norm_bias, eps, activation, residual)
    return conv_triton.convolve([x], weight, bias, groups, finish)


def _setup(ctx, inputs, output):
    xs, weight, bias, ctx.groups = inputs[:4]
    ctx.n_inputs = len(inputs)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # see norm_act.py
    ctx.save_for_backward(weight, *xs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad, *_):
    weight, *xs = ctx.saved_tensors
    grad = to_channels_last(grad)
    grad_xs = [None] * len(xs)
    grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[0]):
        grad_xs = _convolve_transposed(grad, weight, ctx.groups, len(xs))
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(grad, join_channels(xs), weight, ctx.groups)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = channel_sums(grad).to(ctx.bias_dtype)
    return grad_xs, grad_weight, grad_bias, *[None] * (ctx.n_inputs - 3)


_convolve.register_autograd(_backward, setup_context=_setup)
_convolve_moments.register_autograd(_backward, setup_context=_setup)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int = 1, of_x: bool = True, of_bias: bool = True
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of x, weight and bias (float32) of :func:`same_conv`, from that of its result, channels-last.

    For the backward pass of an operator that contains a convolution; ``x`` in the dtype that it was convolved in.
    """
    grad, grad_x = to_channels_last(grad).to(x.dtype), None
    if of_x and kernels_fit_conv([grad], weight):
        (grad_x,) = _convolve_transposed(grad, weight, groups, 1)
    elif of_x and _is_product(weight, groups):
        grad_x = F.linear(grad.movedim(1, -1), weight.to(x.dtype).flatten(1).T).movedim(-1, 1)
    elif of_x:
        grad_x = _aten_gradient(grad, x, weight.to(x.dtype), 0, groups)
    return grad_x, _weight_gradient(grad, x, weight, groups), channel_sums(grad) if of_bias else None


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """cuDNN's: the one of a convolution's three products that it does well on narrow maps, unless it is grouped.

    So groups are multiplied all with all, and what belongs to no pair of them is dropped.
    """
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
