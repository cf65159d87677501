"""The encoder of LGMSNet: stem, then LMS blocks at high and GMS blocks at low resolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.architecture.topology import GMSSplit, Level
from nnunet_lgms.blocks import ConvNormAct, GMSBlock, LMSBlock, PlainConvBlock
from nnunet_lgms.ops import max_pool


class MaxPool(nn.Module):
    """Max pooling with kernel = stride that rounds sizes up.

    Args:
        stride: per axis.
    """

    def __init__(self, stride: Sequence[int]):
        super().__init__()
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *ceil(spatial / stride))."""
        return max_pool(x, self.stride)


class LGMSEncoder(nn.Module):
    """Stem and one stage per level.

    A stage pools by its stride, then runs its blocks. Pooling rounds sizes up, so any size of input can be taken;
    where a size divides by the stride this is the paper's pooling.

    Args:
        input_channels: channels of the image.
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        levels: one description per resolution level.
        norm_op: norm type.
        norm_op_kwargs: its keyword arguments.
        gms_kwargs: ``patch``, ``n_heads`` and ``head_dim`` of the GMS blocks.
    """

    def __init__(
        self,
        input_channels: int,
        conv_op: type[_ConvNd],
        levels: Sequence[Level],
        norm_op: type[nn.Module],
        norm_op_kwargs: dict,
        gms_kwargs: dict,
    ):
        super().__init__()
        self.conv_op = conv_op
        self.norm_op = norm_op
        self.norm_op_kwargs = norm_op_kwargs
        self.output_channels = [level.features for level in levels]
        self.strides = [level.stride for level in levels]
        self.kernel_sizes = [level.kernel_size for level in levels]

        channels = levels[0].features
        self.stem = ConvNormAct(
            conv_op,
            input_channels,
            channels,
            levels[0].kernel_size,
            norm_op,
            norm_op_kwargs,
            activation="relu",
            bias=True,
        )
        self.stages = nn.ModuleList()
        for level in levels:
            stage = nn.Sequential()
            if any(s > 1 for s in level.stride):
                stage.append(MaxPool(level.stride))
            stage.extend(self._blocks(level, channels, gms_kwargs))
            self.stages.append(stage)
            channels = level.features

    def _blocks(self, level: Level, in_channels: int, gms_kwargs: dict) -> list[nn.Module]:
        norm = {"norm_op": self.norm_op, "norm_op_kwargs": self.norm_op_kwargs}
        if level.encoder_block == "LMS":
            lms = [
                LMSBlock(
                    in_channels,
                    level.lms_kernel_sizes,
                    level.kernel_size,
                    dim=len(level.stride),
                    group_channels=level.lms_group_channels,
                    **norm,
                )
                for _ in range(level.n_blocks)
            ]
            point = (1,) * len(level.stride)
            return [*lms, ConvNormAct(self.conv_op, in_channels, level.features, point, **norm)]

        widths = [in_channels] + [level.features] * level.n_blocks
        if level.encoder_block == "GMS":
            return [
                make_gms_block(self, level, a, b, level.encoder_gms, gms_kwargs)
                for a, b in zip(widths[:-1], widths[1:], strict=True)
            ]
        return [
            PlainConvBlock(self.conv_op, a, b, level.kernel_size, **norm)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, input_channels, *spatial) -> one map per level, full resolution first."""
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


def make_gms_block(
    encoder: LGMSEncoder, level: Level, in_channels: int, out_channels: int, split: GMSSplit, gms_kwargs: dict
) -> GMSBlock:
    """A GMS block with the encoder's kinds of convolution and norm."""
    return GMSBlock(
        in_channels,
        out_channels,
        split.transformer_channels,
        split.mlp_channels,
        level.kernel_size,
        dim=len(level.stride),
        norm_op=encoder.norm_op,
        norm_op_kwargs=encoder.norm_op_kwargs,
        **gms_kwargs,
    )
