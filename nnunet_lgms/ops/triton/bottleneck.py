"""Inverted bottleneck by the Triton kernels: operators registered with `torch.library`, and their gradients.

Statistics are (B, C), or (1, C) for the batch norm, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.library import triton_op
from nnunet_lgms.ops.memory_format import HALF, channels_last, compute_dtype
from nnunet_lgms.ops.norms import NormSpec, statistics_known, unbiasing
from nnunet_lgms.ops.triton import bottleneck_kernels as kernels
from nnunet_lgms.ops.triton.bottleneck_kernels import ACTIVATION, Bottleneck
from nnunet_lgms.ops.triton.layout import to_channels_last
from nnunet_lgms.ops.triton.norm_act import fits_batch, fits_map, track
from nnunet_lgms.ops.triton.norm_act_kernels import Norm, moments

CHANNELS = (16, 32)  # of input and output, for the tensor cores
HIDDEN = (16, 32, 64)  # with more, a program holds fewer voxels than its products want


def fits(x: Tensor, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd) -> bool:
    """Whether the kernels serve a bottleneck of a map of the size of x.

    They do in half precision, for few channels and for norms that they serve; known statistics only without a gradient.
    """
    hidden, channels = expand.weight.shape[:2]
    if hidden not in HIDDEN or channels not in CHANNELS or squeeze.weight.shape[0] not in CHANNELS:
        return False
    if compute_dtype(x) not in HALF or expand.bias is None or squeeze.bias is None:
        return False
    if not (channels_last(x) and fits_map(x, hidden)):
        return False
    norms = norm1, norm2
    if all(map(statistics_known, norms)):
        return not torch.is_grad_enabled()
    return all(fits_batch(x, norm) for norm in norms)


def inverted_bottleneck(x: Tensor, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd) -> Tensor:
    """squeeze(norm2(gelu(expand(norm1(gelu(x)))))), (B, D, *spatial) -> (B, C, *spatial)."""
    x = to_channels_last(x.to(compute_dtype(x)))
    parameters = [p for m in (norm1, expand, norm2, squeeze) for p in (m.weight, m.bias)]
    if statistics_known(norm1):
        statistics = [s for n in (norm1, norm2) for s in (n.running_mean, n.running_var)]
        return _inverted_bottleneck_known(x, *statistics, *parameters, norm1.eps, norm2.eps)
    out, mean1, variance1, mean2, variance2 = _inverted_bottleneck(
        x, *parameters, *NormSpec.of(norm1), *NormSpec.of(norm2)
    )
    track(norm1, mean1, variance1, unbiasing(x))
    track(norm2, mean2, variance2, unbiasing(x))
    return out


@triton_op("nnunet_lgms::inverted_bottleneck", mutates_args=())
def _inverted_bottleneck(
    x: Tensor,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    norm_weight2: Tensor | None,
    norm_bias2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    kind1: str,
    groups1: int,
    eps1: float,
    kind2: str,
    groups2: int,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, variance1, mean2, variance2)."""
    mean1, variance1 = moments(x, kind1, groups1, ACTIVATION)
    norm1 = Norm(mean1, variance1, norm_weight1, norm_bias1, eps1)
    b = Bottleneck(norm1, expand, expand_bias, None, squeeze, squeeze_bias)
    mean2, variance2 = kernels.hidden_moments(x, b, kind2, groups2)
    b = b._replace(norm2=Norm(mean2, variance2, norm_weight2, norm_bias2, eps2))
    return kernels.forward(x, b), mean1, variance1, mean2, variance2


@triton_op("nnunet_lgms::inverted_bottleneck_known", mutates_args=())
def _inverted_bottleneck_known(
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    norm_weight2: Tensor | None,
    norm_bias2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    eps1: float,
    eps2: float,
) -> Tensor:
    """The operator with given statistics, (C,); it is for prediction and has no gradient."""
    norm1 = Norm(mean1[None], variance1[None], norm_weight1, norm_bias1, eps1)
    norm2 = Norm(mean2[None], variance2[None], norm_weight2, norm_bias2, eps2)
    return kernels.forward(x, Bottleneck(norm1, expand, expand_bias, norm2, squeeze, squeeze_bias))


@triton_op("nnunet_lgms::inverted_bottleneck_backward", mutates_args=())
def _inverted_bottleneck_backward(
    grad: Tensor,
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    norm_weight1: Tensor | None,
    norm_bias1: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    norm_weight2: Tensor | None,
    norm_bias2: Tensor | None,
    squeeze: Tensor,
    squeeze_bias: Tensor,
    kind1: str,
    groups1: int,
    eps1: float,
    kind2: str,
    groups2: int,
    eps2: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and bias of norm1, expand, norm2 and squeeze, in float32 but x's."""
    norm1 = Norm(mean1, variance1, norm_weight1, norm_bias1, eps1)
    norm2 = Norm(mean2, variance2, norm_weight2, norm_bias2, eps2)
    b = Bottleneck(norm1, expand, expand_bias, norm2, squeeze, squeeze_bias)
    return kernels.backward(grad, x, b, ((kind1, groups1), (kind2, groups2)))


def _setup(ctx, inputs, output):
    x, *parameters = inputs[:9]
    ctx.spec = inputs[9:]
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)  # see norm_act.py
    ctx.save_for_backward(x, *statistics, *parameters)


def _backward(ctx, grad, *_):
    x, *saved = ctx.saved_tensors
    parameters = saved[4:]
    grad_x, *grads = _inverted_bottleneck_backward(to_channels_last(grad), x, *saved, *ctx.spec)
    grads = [None if p is None else g.view(p.shape).to(p.dtype) for g, p in zip(grads, parameters, strict=True)]
    return grad_x, *grads, *[None] * len(ctx.spec)


_inverted_bottleneck.register_autograd(_backward, setup_context=_setup)
