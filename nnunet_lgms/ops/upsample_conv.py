"""Linear upsampling and the convolution behind it, which keep the small map for the backward pass.

A convolution keeps its input for the gradient of its weight; here that is the upsampled map, at full resolution one of
the largest of a training step. It is made again instead, from the map below it. Only where the kernels run: elsewhere
memory is not short, and the chain is its operators one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from nnunet_lgms.ops.conv import conv_gradients, same_conv_moments
from nnunet_lgms.ops.upsample import kernels_fit_upsample, linear_upsample, linear_upsample_transposed


def upsample_conv(
    x: Tensor,
    scale: Sequence[int],
    size: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    wanted: tuple[str, int, str] | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """same_conv(linear_upsample(x)), which keeps x and not the upsampled map.

    Args:
        x: (B, C_in, *spatial).
        scale: whole factor per axis.
        size: voxels per axis of the result, at most ``scale`` times those of x.
        weight: (C_out, C_in, *k), odd k.
        bias: (C_out,) or None.
        wanted: by the norm of the result; see :func:`nnunet_lgms.ops.norm_act.moments_wanted`.

    Returns:
        (B, C_out, *size), and its moments as from :func:`nnunet_lgms.ops.conv.same_conv_moments`.
    """
    if torch.is_grad_enabled() and kernels_fit_upsample(x, size):
        out, *partial = _UpsampleConv.apply(x, weight, bias, tuple(scale), tuple(size), wanted)
        return out.movedim(-1, 1), partial
    return same_conv_moments(linear_upsample(x, scale, size), weight, bias, 1, wanted)


# torch.compile makes the gradients of a Function contiguous: a transposed copy of a channels-last map. So this one
# returns (B, *spatial, C), which is contiguous, and the map is a view of that.


class _UpsampleConv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, size, wanted):
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.size, ctx.has_bias = scale, size, bias is not None
        out, partial = same_conv_moments(linear_upsample(x, scale, size), weight, bias, 1, wanted)
        ctx.mark_non_differentiable(*partial)
        ctx.set_materialize_grads(False)  # see norm_act.py
        return out.movedim(1, -1), *partial

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight = ctx.saved_tensors
        upsampled = linear_upsample(x, ctx.scale, ctx.size)
        grad, grad_weight, grad_bias = conv_gradients(grad.movedim(-1, 1), upsampled, weight, of_bias=ctx.has_bias)
        grad_x = linear_upsample_transposed(grad, ctx.scale, x.shape[2:]).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None
