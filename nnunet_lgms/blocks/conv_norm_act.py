"""Convolution, norm, activation: the piece that every other block is made of (`CNA` in the paper's notation)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.conv import same_conv


def same_padding(kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Zero padding that keeps the size of a map under a stride-1 convolution with odd ``kernel_size``."""
    return tuple(k // 2 for k in kernel_size)


class ConvNormAct(nn.Module):
    """Stride-1 convolution with "same" padding, norm and activation; (B, in, *spatial) -> (B, out, *spatial).

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd kernel per axis.
        norm_op: norm type, called as ``norm_op(out_channels, **norm_op_kwargs)``.
        norm_op_kwargs: its keyword arguments.
        act: activation type.
        bias: whether the convolution has one.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
        act: type[nn.Module] = nn.SiLU,
        bias: bool = False,
    ):
        super().__init__()
        self.conv = conv_op(in_channels, out_channels, tuple(kernel_size), padding=same_padding(kernel_size), bias=bias)
        self.norm = norm_op(out_channels, **norm_op_kwargs)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial)."""
        return self.act(self.norm(same_conv(x, self.conv.weight, self.conv.bias)))
