"""What operators need to know of a norm: over what its statistics are taken, and what becomes of them.

An instance or group norm of a constant map is 0, or its bias. Computed as published it is not: the mean of equal
numbers is rounded, what is left is divided by the root of eps, which multiplies it by 316, the zero padding of the next
convolution gives it a border, and some norms later rounding has become a picture, with foreground in it. So a variance
that is no more than rounding of the mean is none here: :func:`variance_above_rounding` where a form has moments,
:func:`normalise` where it has not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

FLAT = 1e-5
"""Deviations that are rounding, as a share of the largest mean of all channels: some eighty float32 roundings. What the
channels share is how large the products were that made them; a mean of its own may be small by cancellation."""
NEAR = 0.02
"""A share that sums of equal numbers, one after the other, may make of a constant."""


class NormSpec(NamedTuple):
    """The kind of a norm ("batch", "instance" or "group"), its groups, and what it adds to variances."""

    kind: str
    groups: int
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> NormSpec:
        if isinstance(norm, nn.GroupNorm):
            return cls("group", norm.num_groups, norm.eps)
        return cls("batch" if isinstance(norm, _BatchNorm) else "instance", 1, norm.eps)


def statistics_known(norm: nn.Module) -> bool:
    """Whether the statistics are known before the map is: those of a batch norm in prediction are."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.track_running_stats


def statistics_of_batch(norm: nn.Module) -> bool:
    """Whether a norm takes the statistics of the very batch that it norms, in this process alone."""
    if isinstance(norm, nn.SyncBatchNorm):
        return False
    if isinstance(norm, (_BatchNorm, _InstanceNorm)):
        return not norm.track_running_stats or (isinstance(norm, _BatchNorm) and norm.training)
    return isinstance(norm, nn.GroupNorm)


def bias_cancels(kind: str, activation: str) -> bool:
    """Whether a number that is added to a whole channel makes no difference: the norm subtracts the channel's mean."""
    return kind != "group" and activation != "gelu_first"


def tracks_statistics(norm: nn.Module) -> bool:
    """Whether a norm keeps a running mean and variance."""
    return isinstance(norm, _BatchNorm) and norm.track_running_stats


def unbiasing(x: Tensor) -> float:
    """The factor that makes the variance of the channels of x (B, C, *spatial) the unbiased one."""
    count = x.numel() // x.shape[1]
    return count / max(count - 1, 1)


def is_constant(low: Tensor, high: Tensor) -> Tensor:
    """Whether the smallest and the largest value of a channel differ by no more than rounding.

    Args:
        low: smallest value of each channel of a sample, (..., C).
        high: largest value, (..., C).
    """
    largest = torch.maximum(high.abs(), low.abs()).amax(-1, keepdim=True)
    return (high - low).float() <= FLAT * largest.float()


def variance_above_rounding(mean: Tensor, variance: Tensor, bounds: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """The variance, and infinity where a map is constant: the reciprocal deviation is 0 then, and with it the gradient.

    Args:
        mean: of each channel of a sample, (..., C).
        variance: of each channel, (..., C).
        bounds: gives the smallest and the largest value of each channel; asked where the moments do not tell.
    """
    if not (variance <= (NEAR * mean.abs().amax(-1, keepdim=True)) ** 2).any():
        return variance
    return torch.where(is_constant(*bounds()), torch.inf, variance)


def normalise(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x), (B, C, *spatial), for any norm; an instance or group norm gives its bias for what is constant."""
    return bias_where_constant(norm(x), x, norm)


def bias_where_constant(out: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
    """What an instance or group norm made of x, and its bias where x is constant; what another made as it is."""
    if not (isinstance(norm, (_InstanceNorm, nn.GroupNorm)) and statistics_of_batch(norm)):
        return out
    sets = x.flatten(2) if isinstance(norm, _InstanceNorm) else x.reshape(x.shape[0], norm.num_groups, -1)
    flat = is_constant(sets.amin(2), sets.amax(2))
    by_channel = (1,) * (x.ndim - 2)
    if isinstance(norm, nn.GroupNorm):
        flat = flat.repeat_interleave(x.shape[1] // norm.num_groups, 1)
    flat = flat.view(x.shape[0], -1, *by_channel)
    bias = out.new_zeros(()) if norm.bias is None else norm.bias.to(out.dtype).view(-1, *by_channel)
    return torch.where(flat, bias, out)


def update_running_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, unbiased: float) -> None:
    """Does to the buffers of a batch norm what PyTorch's does in training, and nothing to other norms.

    Args:
        norm: of C channels.
        mean: of the batch, (1, C).
        variance: of the batch, (1, C).
        unbiased: factor of the variance; see :func:`unbiasing`.
    """
    if not tracks_statistics(norm):
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean[0].to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(variance[0].to(norm.running_var.dtype) * unbiased, momentum)
