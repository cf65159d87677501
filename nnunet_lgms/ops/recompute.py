"""Chains of operators that keep less for the backward pass than autograd would: what is cheap is computed again.

At full resolution the maps around the decoder's convolutions are most of the memory of a training step. A convolution
keeps its input for the gradient of its weight; here that input is made again from a smaller map, or from one that is
kept anyway. Only where the kernels run: elsewhere memory is not short, and the chain is its operators one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.conv import conv_gradients, conv_norm_act, same_conv
from nnunet_lgms.ops.norm_act import (
    NormSpec,
    apply_norm_act,
    kernels_fit_norm,
    norm_act,
    norm_act_forward,
    norm_act_gradients,
    update_running_statistics,
)
from nnunet_lgms.ops.upsample import kernels_fit_upsample, linear_upsample, linear_upsample_transposed

ACTIVATION = "gelu_first"


def upsample_conv(x: Tensor, scale: Sequence[int], size: Sequence[int], conv: _ConvNd) -> Tensor:
    """conv(linear_upsample(x)), which keeps x and not the upsampled map.

    Args:
        x: (B, C_in, *spatial).
        scale: whole factor per axis.
        size: voxels per axis of the result, at most ``scale`` times those of x.
        conv: stride 1, "same" padding.

    Returns:
        (B, C_out, *size).
    """
    if torch.is_grad_enabled() and kernels_fit_upsample(x, size):
        return _UpsampleConv.apply(x, conv.weight, conv.bias, tuple(scale), tuple(size)).movedim(-1, 1)
    return same_conv(linear_upsample(x, scale, size), conv.weight, conv.bias)


# torch.compile makes the gradients of a Function contiguous: a transposed copy of a channels-last map. So the Functions
# below return (B, *spatial, C), which is contiguous, and the map is a view of that.


class _UpsampleConv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, size):
        ctx.save_for_backward(x, weight, bias)
        ctx.scale, ctx.size = scale, size
        return same_conv(linear_upsample(x, scale, size), weight, bias).movedim(1, -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        upsampled = linear_upsample(x, ctx.scale, ctx.size)
        grad, grad_weight, grad_bias = conv_gradients(grad.movedim(-1, 1), upsampled, weight, bias)
        return linear_upsample_transposed(grad, ctx.scale, x.shape[2:]).to(x.dtype), grad_weight, grad_bias, None, None


def inverted_bottleneck(x: Tensor, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd) -> Tensor:
    """squeeze(norm2(gelu(expand(norm1(gelu(x)))))), which keeps x and none of the three maps in between.

    Args:
        x: (B, C, *spatial).
        norm1: norm of C channels.
        expand: convolution to the channels of norm2, stride 1, "same" padding.
        norm2: norm of the expanded channels.
        squeeze: convolution to C_out channels, stride 1, "same" padding.

    Returns:
        (B, C_out, *spatial).
    """
    if torch.is_grad_enabled() and kernels_fit_norm(x, norm1) and kernels_fit_norm(x, norm2, expand.weight.shape[0]):
        norms = norm1, norm2
        parameters = [p for m in (norm1, expand, norm2, squeeze) for p in (m.weight, m.bias)]
        out, *statistics = _InvertedBottleneck.apply(x, *parameters, *(NormSpec.of(n) for n in norms))
        for norm, mean, variance in zip(norms, statistics[::2], statistics[1::2]):
            update_running_statistics(norm, mean, variance, x)
        return out.movedim(-1, 1)
    x = conv_norm_act(norm_act(x, norm1, ACTIVATION), expand, norm2, ACTIVATION)
    return same_conv(x, squeeze.weight, squeeze.bias)


class _InvertedBottleneck(Function):
    @staticmethod
    def forward(ctx, x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, norm1, norm2):
        y, *moments1 = norm_act_forward(x, scale1, shift1, None, *norm1, ACTIVATION)
        z = same_conv(y, weight1, bias1)
        y, *moments2 = norm_act_forward(z, scale2, shift2, None, *norm2, ACTIVATION)
        ctx.save_for_backward(x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, *moments1, *moments2)
        ctx.mark_non_differentiable(*moments1, *moments2)
        ctx.norms = norm1, norm2
        return same_conv(y, weight2, bias2).movedim(1, -1), *moments1, *moments2

    @staticmethod
    def backward(ctx, grad, *_):
        x, scale1, shift1, weight1, bias1, scale2, shift2, weight2, bias2, *moments = ctx.saved_tensors
        first = (x, scale1, shift1, *moments[:2], *ctx.norms[0], ACTIVATION)
        y1 = apply_norm_act(*first)
        z = same_conv(y1, weight1.to(y1.dtype), None if bias1 is None else bias1.to(y1.dtype))
        second = (z, scale2, shift2, *moments[2:], *ctx.norms[1], ACTIVATION)
        y2 = apply_norm_act(*second)

        grad, grad_weight2, grad_bias2 = conv_gradients(grad.movedim(-1, 1), y2, weight2, bias2)
        grad, grad_scale2, grad_shift2 = norm_act_gradients(grad, *second)
        grad, grad_weight1, grad_bias1 = conv_gradients(grad, y1, weight1, bias1)
        grad, grad_scale1, grad_shift1 = norm_act_gradients(grad, *first)
        return (
            grad, grad_scale1, grad_shift1, grad_weight1, grad_bias1,
            grad_scale2, grad_shift2, grad_weight2, grad_bias2, None, None,
        )  # fmt: skip
