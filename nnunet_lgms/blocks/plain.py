"""Two plain convolutions: the block of a U-Net, for ablations against LMS, GMS and Fusion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.conv_norm_act import ConvNormAct


class PlainConvBlock(nn.Sequential):
    """Two :class:`ConvNormAct`; (B, in, *spatial) -> (B, out, *spatial).

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: kernel of both convolutions.
        norm_op: norm type.
        norm_op_kwargs: its keyword arguments.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
    ):
        super().__init__(
            ConvNormAct(conv_op, in_channels, out_channels, kernel_size, norm_op, norm_op_kwargs),
            ConvNormAct(conv_op, out_channels, out_channels, kernel_size, norm_op, norm_op_kwargs),
        )
