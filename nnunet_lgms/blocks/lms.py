"""LMS, Local MultiScale block (LGMSNet, arXiv 2508.15476, section 3.2).

Four channel groups see four receptive fields: depthwise kernels 3, 5, 7 and 9. A cheap bottleneck then mixes the
groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.conv_norm_act import ConvNormAct, same_padding
from nnunet_lgms.blocks.dimension import conv_for, norm_for, per_axis
from nnunet_lgms.ops import multi_kernel_depthwise, norm_act

NORM_GROUPS = 4
BOTTLENECK = 4


class MultiKernelDepthwise(nn.ModuleList):
    """Depthwise "same" convolutions with one kernel per channel group and a residual, run as one operator.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        group_channels: channels of each group, in order.
        kernel_sizes: odd kernel per axis of each group.
    """

    def __init__(self, conv_op: type[_ConvNd], group_channels: Sequence[int], kernel_sizes: Sequence[Sequence[int]]):
        super().__init__(
            conv_op(channels, channels, tuple(kernel), padding=same_padding(kernel), groups=channels)
            for channels, kernel in zip(group_channels, kernel_sizes, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> x plus its convolutions, (B, C, *spatial); C is the sum of ``group_channels``."""
        return multi_kernel_depthwise(x, [conv.weight for conv in self], [conv.bias for conv in self], residual=True)


class LMSBlock(nn.Module):
    """Depthwise kernels per channel group, residual, GroupNorm, GELU, bottleneck of 1/4, residual.

    Args:
        channels: channels of input and output; divisible by 4.
        depthwise_kernel_sizes: odd kernel of each channel group (paper: 3, 5, 7, 9), one number or one per axis.
        kernel_size: kernel of the bottleneck's second convolution, likewise (paper: 3).
        dim: spatial axes, 2 or 3.
        norm_op: norm type of the two bottleneck convolutions; the paper's for ``dim`` if None.
        norm_op_kwargs: its keyword arguments.
        group_channels: channels of each group; groups as equal as they can be if None.

    Raises:
        ValueError: ``channels`` does not divide by 4, the groups do not fill ``channels``, or a kernel is even.

    Example:
        >>> LMSBlock(32)(torch.zeros(1, 32, 40, 50)).shape
        torch.Size([1, 32, 40, 50])
    """

    def __init__(
        self,
        channels: int,
        depthwise_kernel_sizes: Sequence[int | Sequence[int]] = (3, 5, 7, 9),
        kernel_size: int | Sequence[int] = 3,
        *,
        dim: int = 2,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
        group_channels: Sequence[int] | None = None,
    ):
        super().__init__()
        conv_op, (norm_op, norm_op_kwargs) = conv_for(dim), norm_for(dim, norm_op, norm_op_kwargs)
        kernel_size = per_axis(kernel_size, dim, "kernel_size", odd=True)
        depthwise_kernel_sizes = [per_axis(k, dim, "depthwise_kernel_sizes", odd=True) for k in depthwise_kernel_sizes]
        check_lms_width(channels)
        group_channels = lms_groups(channels, len(depthwise_kernel_sizes), group_channels)
        self.depthwise = MultiKernelDepthwise(conv_op, group_channels, depthwise_kernel_sizes)
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        point = (1,) * len(kernel_size)
        squeezed = channels // BOTTLENECK
        self.squeeze = ConvNormAct(conv_op, channels, squeezed, point, norm_op, norm_op_kwargs)
        self.expand = ConvNormAct(conv_op, squeezed, channels, kernel_size, norm_op, norm_op_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        multi_scale = norm_act(self.depthwise(x), self.norm, "gelu")
        return self.expand(self.squeeze(multi_scale), residual=x)


def check_lms_width(channels: int) -> None:
    """Checks the channels of an LMS block.

    Raises:
        ValueError: ``channels`` does not divide by 4.
    """
    if channels % BOTTLENECK:
        raise ValueError(
            f"An LMS block cannot have {channels} channels: allowed are multiples of 4 (bottleneck of 1/4 and "
            f"GroupNorm of 4 groups); choose {channels + -channels % BOTTLENECK} instead."
        )


def lms_groups(channels: int, n_kernels: int, given: Sequence[int] | None = None) -> list[int]:
    """Channels of each group of an LMS block: as equal as they can be unless ``given``.

    Raises:
        ValueError: there is no group of at least one channel for each kernel, or they do not sum to ``channels``.
    """
    groups = [channels // n_kernels + (i < channels % n_kernels) for i in range(n_kernels)] if given is None else given
    if len(groups) != n_kernels or sum(groups) != channels or min(groups) < 1:
        raise ValueError(
            f"LMS groups of {list(groups)} channels do not fit {n_kernels} kernels and {channels} channels: give one "
            f"positive number of channels per kernel that sum to {channels}."
        )
    return list(groups)
