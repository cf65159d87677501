"""Up block of LGMSNet's decoder: linear interpolation, convolution, norm, ReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.conv_norm_act import ConvNormAct
from nnunet_lgms.ops import linear_upsample


class UpBlock(nn.Module):
    """Upsamples by ``stride`` and crops to the size of the skip that it will meet.

    The crop drops at most ``stride - 1`` pixels at the far end of an axis, where pooling had rounded an odd size up;
    where the size divides by the stride nothing is cropped and the result is the paper's.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: scale per axis.
        kernel_size: kernel of the convolution (paper: 3 on every axis).
        norm_op: norm type.
        norm_op_kwargs: its keyword arguments.
    """

    def __init__(
        self,
        conv_op: type[_ConvNd],
        in_channels: int,
        out_channels: int,
        stride: Sequence[int],
        kernel_size: Sequence[int],
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
    ):
        super().__init__()
        self.stride = tuple(stride)
        self.conv = ConvNormAct(
            conv_op, in_channels, out_channels, kernel_size, norm_op, norm_op_kwargs, activation="relu", bias=True
        )

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, in, *spatial) -> (B, out, *size), ``size`` at most ``spatial * stride``."""
        return self.conv(linear_upsample(x, self.stride, size))
