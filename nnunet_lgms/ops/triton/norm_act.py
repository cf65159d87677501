"""Norm and activation by the Triton kernels: operators registered with `torch.library`, and their gradients.

Statistics are (B, C), or (1, C) for the batch norm, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable

from nnunet_lgms.ops import exchange
from nnunet_lgms.ops.library import triton_op
from nnunet_lgms.ops.memory_format import HALF, channels_last
from nnunet_lgms.ops.norms import (
    NormSpec,
    bias_cancels,
    statistics_known,
    statistics_of_batch,
    tracks_statistics,
    unbiasing,
    update_running_statistics,
)
from nnunet_lgms.ops.recompute import can_be_made_again
from nnunet_lgms.ops.triton import norm_act_kernels as kernels
from nnunet_lgms.ops.triton.layout import to_channels_last
from nnunet_lgms.ops.triton.norm_act_kernels import Norm
from nnunet_lgms.ops.triton.sums import sum_of_voxels


def fits_map(x: Tensor, channels: int | None = None) -> bool:
    """Whether the kernels serve x, with ``channels`` in place of its own: not too many, and offsets of 32 bits."""
    channels = channels or x.shape[1]
    return (
        x.dtype in (*HALF, torch.float32)
        and (channels_last(x) or x.is_contiguous())
        and channels <= kernels.MAX_CHANNELS
        and x.numel() // x.shape[1] * channels < 2**31
    )


def fits(x: Tensor, norm: nn.Module) -> bool:
    """Whether the kernels serve this norm of x: of this very batch, of all processes', or of known statistics.

    In prediction alone the latter, as that operator has no gradient.
    """
    if statistics_known(norm):
        return not torch.is_grad_enabled() and fits_map(x)
    return (fits_batch(x, norm) or exchange.spans_processes(norm)) and fits_map(x)


def fits_batch(x: Tensor, norm: nn.Module) -> bool:
    """Whether the kernels take the statistics of this norm from x itself, which has more than one voxel."""
    return statistics_of_batch(norm) and x[0, 0].numel() > 1


def takes_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes the statistics of batches: of this process's or of all."""
    return statistics_of_batch(norm) or exchange.spans_processes(norm)


def ignores_bias(norm: nn.Module, activation: str) -> bool:
    """Whether a bias of the convolution in front makes no difference to the result of :func:`norm_act`."""
    return takes_statistics(norm) and bias_cancels(NormSpec.of(norm).kind, activation)


def norm_act(x: Tensor, norm: nn.Module, activation: str, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """activation(norm(x + bias)) + residual where :func:`fits` says so; see the operator."""
    residual = None if residual is None else residual.to(x.dtype)
    if statistics_known(norm):
        known = norm.running_mean[None], norm.running_var[None]
        return _norm_act_known(x, bias, *known, norm.weight, norm.bias, residual, "batch", norm.eps, activation)
    spec = NormSpec.of(norm)
    cancels = bias_cancels(spec.kind, activation)
    if exchange.spans_processes(norm):
        out, mean, variance, unbiased = _Synced.apply(
            x, bias, norm.weight, norm.bias, residual, norm.process_group, norm.eps, activation
        )
        track(norm, mean, unbiased, 1.0, bias if cancels else None)
    else:
        out, mean, variance = _norm_act(x, bias, norm.weight, norm.bias, residual, *spec, activation)
        track(norm, mean, variance, unbiasing(x), bias if cancels else None)
    return can_be_made_again(
        out, _norm_act_known, x, None if cancels else bias, mean, variance, norm.weight, norm.bias, residual,
        spec.kind, spec.eps, activation,
    )  # fmt: skip


def track(norm: nn.Module, mean: Tensor, variance: Tensor, unbiased: float, bias: Tensor | None = None) -> None:
    """Updates the running statistics of a batch norm: by one launch in place of five, which a compiler fuses itself.

    Args:
        norm: of C channels; nothing is done to norms without running statistics.
        mean: of what was normed less ``bias``, (1, C).
        variance: (1, C).
        unbiased: factor of the variance.
        bias: (C,) or None.
    """
    if not tracks_statistics(norm):
        return
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    one_launch = norm.momentum is not None and all(b.dtype == torch.float32 for b in buffers[:2])
    with torch.no_grad():
        if one_launch and not torch.compiler.is_compiling():
            _track(mean, variance, bias, *buffers, float(norm.momentum), unbiased)
        else:
            update_running_statistics(norm, mean if bias is None else mean + bias, variance, unbiased)


def channel_sums(x: Tensor) -> Tensor:
    """Sum of every channel, (B, C, *spatial) -> (C,) in float32."""
    if fits_map(x):
        return _channel_sums(x)
    return x.sum([0, *range(2, x.ndim)], dtype=torch.float32)


@triton_op("nnunet_lgms::channel_sums", mutates_args=())
def _channel_sums(x: Tensor) -> Tensor:
    return sum_of_voxels(x)


@triton_op(
    "nnunet_lgms::update_running_statistics", mutates_args=("running_mean", "running_variance", "batches_tracked")
)
def _track(
    mean: Tensor,
    variance: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    unbiased: float,
) -> None:
    kernels.update_running_statistics(
        mean, variance, bias, running_mean, running_variance, batches_tracked, momentum, unbiased
    )


@triton_op("nnunet_lgms::norm_act", mutates_args=())
def _norm_act(
    x: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, variance): statistics of x where the bias makes no difference to the result, else of x + bias."""
    bias = None if bias_cancels(kind, activation) else bias
    mean, variance = kernels.moments(x, kind, groups, activation, bias)
    norm = Norm(mean, variance, norm_weight, norm_bias, eps)
    return kernels.forward(x, norm, residual, kind, groups, activation, bias), mean, variance


@triton_op("nnunet_lgms::norm_act_known", mutates_args=())
def _norm_act_known(
    x: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    eps: float,
    activation: str,
) -> Tensor:
    """The operator with given statistics, of x + bias; it is for prediction, or to make a result again."""
    norm = Norm(mean, variance, norm_weight, norm_bias, eps)
    return kernels.forward(x, norm, residual, kind, 1, activation, bias)


@triton_op("nnunet_lgms::norm_act_backward", mutates_args=())
def _norm_act_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of the norm's weight and bias in float32."""
    norm = Norm(mean, variance, norm_weight, norm_bias, eps)
    return kernels.backward(grad, x, norm, kind, groups, activation, bias)


def _setup(ctx, inputs, output):
    x, bias, norm_weight, norm_bias, residual, *ctx.spec = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)  # or a kernel each makes zeros of what has no gradient
    kind, *_, activation = ctx.spec
    ctx.has_residual, ctx.cancels = residual is not None, bias_cancels(kind, activation)
    ctx.save_for_backward(x, bias, norm_weight, norm_bias, mean, variance)


def _backward(ctx, grad, _grad_mean, _grad_variance):
    x, bias, norm_weight, norm_bias, mean, variance = ctx.saved_tensors
    gradients = _norm_act_backward(
        to_channels_last(grad), x, None if ctx.cancels else bias, norm_weight, norm_bias, mean, variance, *ctx.spec
    )
    return *_gradients(ctx, (bias, norm_weight, norm_bias), grad, *gradients), *[None] * len(ctx.spec)


def _gradients(
    ctx, parameters: tuple[Tensor | None, ...], grad: Tensor, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of x, of the bias in front, of the norm's weight and bias, and of the residual; None of what is not.

    ``parameters`` are those in between; asking for them again would make x again, if it was not kept.
    """
    bias, norm_weight, norm_bias = parameters
    grad_in_front = None
    if bias is not None and ctx.needs_input_grad[1]:
        grad_in_front = torch.zeros_like(bias) if ctx.cancels else channel_sums(grad_x).to(bias.dtype)
    grad_weight = None if norm_weight is None else grad_weight.to(norm_weight.dtype)
    grad_bias = None if norm_bias is None else grad_bias.to(norm_bias.dtype)
    return grad_x, grad_in_front, grad_weight, grad_bias, grad if ctx.has_residual else None


_norm_act.register_autograd(_backward, setup_context=_setup)

# Kernels as they are, which triton_op does for those inside it: what a compiler would see of them takes 1 ms a launch.
_not_traced = set_wrap_triton_enabled(False)


class _Synced(torch.autograd.Function):
    """Norm and activation where the statistics of a batch norm span all processes, which exchange their sums.

    PyTorch's own SyncBatchNorm leaves activations and layouts to passes of their own. The result comes with mean,
    variance and unbiased variance, (1, C). Every process calls it at the same time, and again in the backward pass.
    """

    @staticmethod
    @_not_traced
    def forward(ctx, x, bias, norm_weight, norm_bias, residual, group, eps, activation):
        ctx.cancels = bias_cancels("batch", activation)
        added = None if ctx.cancels else bias
        moments = kernels.moments(x, "batch", 1, activation, added)
        everyones = exchange.gather_moments(*moments, x.numel() // x.shape[1], group)
        mean, variance, unbiased, share = kernels.merge_processes(everyones, dist.get_rank(group))
        out = kernels.forward(
            x, Norm(mean, variance, norm_weight, norm_bias, eps), residual, "batch", 1, activation, added
        )
        ctx.save_for_backward(x, bias, norm_weight, norm_bias, mean, variance, share)
        ctx.group, ctx.eps, ctx.activation, ctx.has_residual = group, eps, activation, residual is not None
        ctx.mark_non_differentiable(mean, variance, unbiased)
        ctx.set_materialize_grads(False)  # see above
        return out, mean, variance, unbiased

    @staticmethod
    @once_differentiable
    @_not_traced
    def backward(ctx, grad, *_):
        x, bias, norm_weight, norm_bias, mean, variance, share = ctx.saved_tensors

        def average(means: Tensor) -> None:
            exchange.add_up(means.mul_(share), ctx.group)

        gradients = kernels.backward(
            to_channels_last(grad), x, Norm(mean, variance, norm_weight, norm_bias, ctx.eps), "batch", 1,
            ctx.activation, None if ctx.cancels else bias, average,
        )  # fmt: skip
        return *_gradients(ctx, (bias, norm_weight, norm_bias), grad, *gradients), None, None, None
