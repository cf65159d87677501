"""The decoder of LGMSNet: Up, the skip, Fusion and GMS blocks, one segmentation head per level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_lgms.architecture.encoder import LGMSEncoder, make_gms_block
from nnunet_lgms.architecture.topology import Level
from nnunet_lgms.blocks import FusionBlock, PlainConvBlock, UpBlock
from nnunet_lgms.ops import concatenate, logits


class LGMSDecoder(nn.Module):
    """Goes from the lowest level back to full resolution; stages and heads are in order of computation.

    Args:
        encoder: the encoder whose skips it takes; only read while building, not kept.
        levels: one description per resolution level, full resolution first.
        num_classes: channels of the output.
        gms_kwargs: ``patch``, ``n_heads`` and ``head_dim`` of the GMS blocks.
        deep_supervision: whether ``forward`` returns the heads of all levels.
        auxiliary_heads: whether heads below full resolution exist at all. nnU-Net needs them, also where they are not
            used: a network trained with deep supervision is predicted with one built without it, and weights load
                strictly.
    """

    def __init__(
        self,
        encoder: LGMSEncoder,
        levels: Sequence[Level],
        num_classes: int,
        gms_kwargs: dict,
        deep_supervision: bool = False,
        auxiliary_heads: bool = True,
    ):
        super().__init__()
        norm = {"norm_op": encoder.norm_op, "norm_op_kwargs": encoder.norm_op_kwargs}
        self.ups = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        for below, level in zip(reversed(levels[1:]), reversed(levels[:-1]), strict=True):
            width = level.features
            self.ups.append(UpBlock(encoder.conv_op, below.features, width, below.stride, level.kernel_size, **norm))
            stage = nn.Sequential()
            in_channels = 2 * width
            for name in level.decoder_blocks:
                if name == "Fusion":
                    stage.append(FusionBlock(in_channels, width, level.kernel_size, dim=len(level.stride), **norm))
                elif name == "GMS":
                    stage.append(make_gms_block(encoder, level, in_channels, width, level.decoder_gms, gms_kwargs))
                else:
                    stage.append(PlainConvBlock(encoder.conv_op, in_channels, width, level.kernel_size, **norm))
                in_channels = width
            self.stages.append(stage)
            if auxiliary_heads or level is levels[0]:
                self.seg_layers.append(encoder.conv_op(width, num_classes, 1))
        self.deep_supervision = deep_supervision

    @property
    def deep_supervision(self) -> bool:
        """Whether ``forward`` returns one output per level; nnU-Net switches it between training and validation."""
        return self._deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        if enabled and len(self.seg_layers) != len(self.stages):
            raise ValueError("Deep supervision needs the auxiliary heads: build the network with auxiliary_heads=True.")
        self._deep_supervision = bool(enabled)
        # Heads that take no part in the loss must not ask for gradients, or DDP waits for them forever.
        self.seg_layers[:-1].requires_grad_(self._deep_supervision)

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Maps of all levels, full resolution first -> logits (B, num_classes, *spatial).

        With deep supervision a list of logits, one per level but the lowest, full resolution first.
        """
        x = skips[-1]
        features = []
        for up, stage, skip in zip(self.ups, self.stages, reversed(skips[:-1]), strict=True):
            x = up(x, skip.shape[2:])
            first, *rest = stage
            x = first(skip, x) if isinstance(first, FusionBlock) else first(concatenate([skip, x]))
            for block in rest:
                x = block(x)
            features.append(x)
        if not self._deep_supervision:
            return logits(x, self.seg_layers[-1])
        return [logits(feature, head) for head, feature in zip(self.seg_layers, features, strict=True)][::-1]
