"""Normalisation layers of LGMSNet, usable on maps of any size.

The paper uses BatchNorm in 2D and InstanceNorm without affine parameters in 3D. PyTorch's own layers refuse a single
value per statistic in training ("Expected more than 1 value per channel"), which happens at the bottleneck of a small
patch. The layers here differ from PyTorch's in that case alone: a single value is its own mean, so the normalised
value is exactly 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SingleValueSafe:
    """Mixin: return ``bias`` (or 0) where every statistic would be taken over one value, PyTorch's result elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        over_batch = isinstance(self, _BatchNorm)
        uses_batch_statistics = self.training or not self.track_running_stats
        if uses_batch_statistics and math.prod(x.shape[2:]) * (x.shape[0] if over_batch else 1) == 1:
            normalised = x - x  # not zeros_like: NaN stays NaN, and autograd sees the zero slope
            if self.affine:
                shape = (1, -1) + (1,) * (x.ndim - 2)
                normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
            return normalised.to(x.dtype)
        return super().forward(x)


class BatchNorm2d(_SingleValueSafe, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that accepts a single value per channel."""


class BatchNorm3d(_SingleValueSafe, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that accepts a single value per channel."""


class _InstanceNorm(_SingleValueSafe):
    """Mixin: ``nn.InstanceNorm`` without running statistics, with the right gradient for a batch of one.

    PyTorch's own gradient is wrong there when the gradient of the output is channels-last (seen on the CPU in 2.13). A
    group norm with one channel per group is the same function and gets it right; under autocast it works in float32,
    so it is kept to where a gradient may be asked for.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        if x.shape[0] == 1 and math.prod(x.shape[2:]) > 1 and torch.is_grad_enabled():
            return F.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)
        return super().forward(x)


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` that accepts a map of one pixel and a batch of one."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` that accepts a map of one voxel and a batch of one."""


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with the signature of the other norms: channels first, at most ``num_groups`` groups."""

    def __init__(self, num_channels: int, num_groups: int = 8, eps: float = 1e-5, affine: bool = True):
        super().__init__(math.gcd(num_channels, num_groups), num_channels, eps, affine)


BATCH_NORM = {2: BatchNorm2d, 3: BatchNorm3d}
INSTANCE_NORM = {2: InstanceNorm2d, 3: InstanceNorm3d}


def paper_norm(dim: int) -> tuple[type[nn.Module], dict]:
    """The paper's norm for ``dim`` spatial axes as ``(norm_op, norm_op_kwargs)``."""
    return (BatchNorm2d, {}) if dim == 2 else (InstanceNorm3d, {"affine": False})
