"""What operators need to know of a norm: over what its statistics are taken, and what becomes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


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
