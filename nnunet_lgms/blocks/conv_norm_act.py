"""Convolution, norm, activation: the piece that every other block is made of (`CNA` in the paper's notation)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops import conv_norm_act


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
        activation: "silu" or "relu", behind the norm.
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
        activation: str = "silu",
        bias: bool = False,
    ):
        super().__init__()
        self.conv = conv_op(in_channels, out_channels, tuple(kernel_size), padding=same_padding(kernel_size), bias=bias)
        self.norm = norm_op(out_channels, **norm_op_kwargs)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial); a ``residual`` of that shape is added last."""
        return conv_norm_act(x, self.conv, self.norm, self.activation, residual)
