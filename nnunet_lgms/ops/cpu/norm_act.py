"""Norms on a CPU, where PyTorch's own are slow.

Its instance norm copies channels-last maps to another layout, and its group norm of single channels is vectorised in
contiguous maps only. The batch norm of one sample is the same function, and its loops run over channels-last maps as
they are. They run over the channels: where those do not fill a register, a copy of the map is faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_lgms.ops.cpu.layout import to_channels_first, to_channels_last
from nnunet_lgms.ops.memory_format import channels_last, wants_channels_last
from nnunet_lgms.ops.norms import bias_where_constant, normalise, variance_above_rounding

NARROW = 8  # channels below which a map is copied


def norm_act(x: Tensor, norm: nn.Module, activation: str, residual: Tensor | None) -> Tensor:
    """:func:`nnunet_lgms.ops.norm_act.norm_act` where :func:`fits` says so, and the activation is behind the norm.

    What can be written over the norm's result is: memory that is new to the process costs as much as the arithmetic.
    """
    out = _normalise(x, norm)
    if activation == "relu":
        out = F.relu(out, inplace=True)
    elif activation == "silu":
        out = F.silu(out, inplace=not torch.is_grad_enabled())
    elif activation == "gelu":
        out = F.gelu(out)
    if residual is None:
        return out
    # The gradient of ReLU needs its result, those of the others do not.
    return out + residual if activation == "relu" or residual.dtype != out.dtype else out.add_(residual)


def fits(x: Tensor, norm: nn.Module) -> bool:
    """A norm of PyTorch's, the gradient of which does not need its result."""
    return (
        wants_channels_last(x)
        and isinstance(norm, (_BatchNorm, _InstanceNorm, nn.GroupNorm))
        and not isinstance(norm, nn.SyncBatchNorm)
    )


def _normalise(x: Tensor, norm: nn.Module) -> Tensor:
    if x.shape[1] < NARROW and channels_last(x):
        return to_channels_last(_normalise(to_channels_first(x), norm))
    if isinstance(norm, _InstanceNorm) and not norm.track_running_stats and x[0, 0].numel() > 1:
        if channels_last(x) and x.dtype in (torch.float32, torch.float64):
            return instance_norm(x, norm.weight, norm.bias, norm.eps)
        if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):  # which group norms ignore
            out = F.group_norm(x, x.shape[1], norm.weight, norm.bias, norm.eps)
            return bias_where_constant(out, x, norm)
    return normalise(x, norm)


def instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`F.instance_norm` of a channels-last map.

    Args:
        x: (B, C, *spatial) with more than one voxel, float32 or float64.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.

    Returns:
        (B, C, *spatial), channels-last.
    """
    return _InstanceNormFunction.apply(x, weight, bias, eps)


def _composed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of plain operators, for derivatives of its gradient."""
    axes = tuple(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0)
    variance = variance_above_rounding(mean, variance, lambda: (x.amin(axes), x.amax(axes)))
    by_channel = (-1, *(1,) * (x.ndim - 2))
    by_sample = (len(x), *by_channel)
    out = (x - mean.view(by_sample)) * torch.rsqrt(variance + eps).view(by_sample)
    out = out if weight is None else out * weight.view(by_channel)
    return out if bias is None else out + bias.view(by_channel)


class _InstanceNormFunction(Function):
    """The batch norm of each sample, written to its place in one map."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out = torch.empty_like(x)
        statistics = []
        for sample, result in zip(x.split(1), out.split(1), strict=True):
            mean, variance = torch.ops.aten.batch_norm_update_stats(sample, None, None, 0.0)
            rows = sample.movedim(1, -1).flatten(0, -2)
            variance = variance_above_rounding(mean, variance, lambda rows=rows: (rows.amin(0), rows.amax(0)))
            unused = x.new_empty(0), x.new_empty(0)
            torch.native_batch_norm(sample, weight, bias, mean, variance, False, 0.0, eps, out=(result, *unused))
            statistics += [mean, torch.rsqrt(variance + eps)]
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, *statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # a second derivative is wanted
            out = _composed(x, weight, bias, ctx.eps)
            inputs = [t for t, needed in zip((x, weight, bias), needs, strict=True) if needed]
            grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return *(next(grads) if needed else None for needed in needs), None
        samples = zip(to_channels_last(grad).split(1), x.split(1), statistics[::2], statistics[1::2], strict=True)
        grads = [
            torch.ops.aten.native_batch_norm_backward(g, s, weight, None, None, *moments, True, ctx.eps, list(needs))
            for g, s, *moments in samples
        ]
        grad_x, grad_weight, grad_bias = zip(*grads, strict=True)
        return (
            torch.cat(grad_x) if needs[0] else None,
            sum(grad_weight) if needs[1] else None,
            sum(grad_bias) if needs[2] else None,
            None,
        )
