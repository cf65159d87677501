"""Fusion block of LGMSNet's decoder (arXiv 2508.15476, section 3.4; the skip-fusion of CMUNeXt)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_lgms.blocks.conv_norm_act import same_padding
from nnunet_lgms.blocks.dimension import conv_for, norm_for, per_axis
from nnunet_lgms.ops import conv_bottleneck, norm_act

EXPANSION = 4


class FusionBlock(nn.Module):
    """Fuses a skip with the upsampled map below it.

    The two halves of the input (skip, upsampled) are convolved apart, in two groups, then mixed by an inverted
    bottleneck. Activation comes before the norm, three times.

    Args:
        in_channels: channels of the input (D), even.
        out_channels: channels of the output (C); half of the input's if None.
        kernel_size: kernel of the grouped convolution, one number or one per axis (paper: 3).
        dim: spatial axes, 2 or 3.
        norm_op: norm type; the paper's for ``dim`` if None.
        norm_op_kwargs: its keyword arguments.

    Raises:
        ValueError: ``in_channels`` is odd, or a kernel is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        *,
        dim: int = 2,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
    ):
        super().__init__()
        conv_op, (norm_op, norm_op_kwargs) = conv_for(dim), norm_for(dim, norm_op, norm_op_kwargs)
        kernel_size = per_axis(kernel_size, dim, "kernel_size", odd=True)
        out_channels = in_channels // 2 if out_channels is None else out_channels
        if in_channels % 2:
            raise ValueError(
                f"A Fusion block works in 2 groups and cannot take {in_channels} channels: give an even number."
            )
        expanded = EXPANSION * out_channels
        self.grouped = conv_op(in_channels, in_channels, kernel_size, padding=same_padding(kernel_size), groups=2)
        self.norm1 = norm_op(in_channels, **norm_op_kwargs)
        self.expand = conv_op(in_channels, expanded, 1)
        self.norm2 = norm_op(expanded, **norm_op_kwargs)
        self.squeeze = conv_op(expanded, out_channels, 1)
        self.norm3 = norm_op(out_channels, **norm_op_kwargs)

    def forward(self, x: Tensor, upsampled: Tensor | None = None) -> Tensor:
        """(B, D, *spatial), or its two halves apart, which need not be concatenated then -> (B, C, *spatial)."""
        maps = x if upsampled is None else [x, upsampled]
        x = conv_bottleneck(maps, self.grouped, self.norm1, self.expand, self.norm2, self.squeeze)
        return norm_act(x, self.norm3, "gelu_first")
