"""Inverted bottleneck of the Fusion block as one operator (LGMSNet, arXiv 2508.15476, section 3.4).

Its wide map has four times the channels of the block's result, at full resolution: read and written ten times in a
training step, it was the largest part of the step's memory. Where the kernels run (`triton/bottleneck.py`) it is never
stored: every pass computes it again from the narrow input, in registers. On the CPU it goes piece by piece through
the cache (`cpu/bottleneck.py`). Everywhere else, and on CUDA when the environment variable NNUNET_LGMS_KERNELS is
`off`, the operator is its convolutions and norms one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.library import triton_op
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.conv import conv_norm_act, same_conv_moments
from nnunet_lgms.ops.cpu import bottleneck as bottleneck_cpu
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, compute_dtype
from nnunet_lgms.ops.norm_act import (
    NormSpec,
    batch_moments,
    kernels_fit_map,
    kernels_fit_norm,
    moments_wanted,
    norm_act,
    statistics_known,
    update_running_statistics,
)

ACTIVATION = "gelu_first"
CHANNELS = (16, 32)  # of input and output, for the tensor cores
HIDDEN = (16, 32, 64)  # with more, a program holds fewer voxels than its products want


def inverted_bottleneck(
    x: Tensor,
    norm1: nn.Module,
    expand: _ConvNd,
    norm2: nn.Module,
    squeeze: _ConvNd,
    norm3: nn.Module,
    partial: Sequence[Tensor] = (),
    shift: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """squeeze(norm2(gelu(expand(norm1(gelu(x + shift)))))), and moments of its GELU by slices for the norm behind it.

    Args:
        x: (B, D, *spatial).
        norm1: norm of D channels.
        expand: 1x1 convolution to H channels, with bias.
        norm2: norm of H channels.
        squeeze: 1x1 convolution to C channels, with bias.
        norm3: the norm of the GELU of the result.
        partial: moments of gelu(x) by slices, where known; see :func:`nnunet_lgms.ops.conv.same_conv_moments`.
        shift: a number for each channel, (D,), only where :func:`kernels_fit_bottleneck` does not hold.

    Returns:
        (B, C, *spatial), and the moments that norm3 needs, or none where they come at a cost.
    """
    if bottleneck_cpu.fits(x, norm1, norm2):
        return bottleneck_cpu.inverted_bottleneck(x, norm1, expand, norm2, squeeze), []
    if not kernels_fit_bottleneck(x, norm1, expand, norm2, squeeze):
        x = conv_norm_act(norm_act(x, norm1, ACTIVATION, partial=partial, shift=shift), expand, norm2, ACTIVATION)
        return same_conv_moments(x, squeeze.weight, squeeze.bias, 1, moments_wanted(norm3, ACTIVATION))
    x = x.to(compute_dtype(x))
    parameters = [p for m in (norm1, expand, norm2, squeeze) for p in (m.weight, m.bias)]
    if statistics_known(norm1):
        statistics = [s for n in (norm1, norm2) for s in (n.running_mean, n.running_var)]
        return _inverted_bottleneck_known(x, *statistics, *parameters, norm1.eps, norm2.eps), []
    kind3, groups3, _ = NormSpec.of(norm3)
    out, mean1, variance1, mean2, variance2, *behind = _inverted_bottleneck(
        x, list(partial), *parameters, *NormSpec.of(norm1), *NormSpec.of(norm2), kind3, groups3
    )
    update_running_statistics(norm1, mean1, variance1, x)
    update_running_statistics(norm2, mean2, variance2, x)
    return out, behind


def kernels_fit_bottleneck(x: Tensor, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd) -> bool:
    """Half precision, few channels, norms that the kernels serve; known statistics only without a gradient."""
    hidden, channels = expand.weight.shape[:2]
    if hidden not in HIDDEN or channels not in CHANNELS or squeeze.weight.shape[0] not in CHANNELS:
        return False
    if compute_dtype(x) not in HALF or expand.bias is None or squeeze.bias is None:
        return False
    norms = norm1, norm2
    if all(map(statistics_known, norms)):
        return not torch.is_grad_enabled() and kernels_fit_map(x)
    return all(kernels_fit_norm(x, norm, expand.weight.shape[0]) for norm in norms)


def _kernels() -> ModuleType:
    from nnunet_lgms.ops.triton import bottleneck as bottleneck_triton

    return bottleneck_triton


@triton_op("nnunet_lgms::inverted_bottleneck", mutates_args=())
def _inverted_bottleneck(
    x: Tensor,
    partial: Sequence[Tensor],
    scale1: Tensor | None,
    shift1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    kind1: str,
    groups1: int,
    eps1: float,
    kind2: str,
    groups2: int,
    eps2: float,
    kind3: str,
    groups3: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, variance1, mean2, variance2) and the moments of gelu(out) by slices, for the norm behind.

    Statistics are (B, C), or (1, C) for the batch norm, in float32.
    """
    kernels = _kernels()
    mean1, variance1 = batch_moments(x, partial, kind1, groups1, ACTIVATION)
    norm1 = kernels.Norm(mean1, variance1, scale1, shift1, eps1)
    b = kernels.Bottleneck(norm1, expand, expand_bias, None, squeeze, squeeze_bias)
    mean2, variance2 = kernels.second_norm(x, b, kind2, groups2)
    b = b._replace(norm2=kernels.Norm(mean2, variance2, scale2, shift2, eps2))
    out, behind = kernels.forward(x, b, (kind3, groups3))
    return out, mean1, variance1, mean2, variance2, *behind


@triton_op("nnunet_lgms::inverted_bottleneck_known", mutates_args=())
def _inverted_bottleneck_known(
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    scale1: Tensor | None,
    shift1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    eps1: float,
    eps2: float,
) -> Tensor:
    """With given statistics, (C,); for prediction, it has no gradient."""
    kernels = _kernels()
    norm1 = kernels.Norm(mean1[None], variance1[None], scale1, shift1, eps1)
    norm2 = kernels.Norm(mean2[None], variance2[None], scale2, shift2, eps2)
    out, _ = kernels.forward(x, kernels.Bottleneck(norm1, expand, expand_bias, norm2, squeeze, squeeze_bias))
    return out


@triton_op("nnunet_lgms::inverted_bottleneck_backward", mutates_args=())
def _inverted_bottleneck_backward(
    grad: Tensor,
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    scale1: Tensor | None,
    shift1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    kind1: str,
    groups1: int,
    eps1: float,
    kind2: str,
    groups2: int,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale1, shift1, expand and its bias, scale2, shift2, squeeze and its bias, in float32 but x's."""
    kernels = _kernels()
    norm1 = kernels.Norm(mean1, variance1, scale1, shift1, eps1)
    norm2 = kernels.Norm(mean2, variance2, scale2, shift2, eps2)
    b = kernels.Bottleneck(norm1, expand, expand_bias, norm2, squeeze, squeeze_bias)
    return kernels.backward(grad, x, b, ((kind1, groups1), (kind2, groups2)))


def _setup(ctx, inputs, output):
    x, partial, *parameters = inputs[:10]
    ctx.spec, ctx.n_partial, ctx.n_constants = inputs[10:16], len(partial), len(inputs) - 10
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)  # see norm_act.py
    ctx.save_for_backward(x, *statistics[:4], *parameters)


def _backward(ctx, grad, *_):
    x, *saved = ctx.saved_tensors
    parameters = saved[4:]
    grad_x, *grads = _inverted_bottleneck_backward(to_channels_last(grad), x, *saved, *ctx.spec)
    grads = [None if p is None else g.view(p.shape).to(p.dtype) for g, p in zip(grads, parameters, strict=True)]
    return grad_x, [None] * ctx.n_partial, *grads, *[None] * ctx.n_constants


_inverted_bottleneck.register_autograd(_backward, setup_context=_setup)
