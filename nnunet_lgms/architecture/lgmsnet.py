"""LGMSNet (arXiv 2508.15476, ECAI 2025), written from the paper for nnU-Net's planned topologies.

Differences from the published network, none of which changes a result where the published one runs:

- any spatial size works: pooling rounds up, upsampling is cropped to the skip, attention is masked where it pads;
- any number of stages, anisotropic strides and kernels, as nnU-Net plans them;
- heads for deep supervision exist at every decoder level (``auxiliary_heads``), as nnU-Net expects.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.architecture.decoder import LGMSDecoder
from nnunet_lgms.architecture.encoder import LGMSEncoder
from nnunet_lgms.architecture.topology import (
    PAPER_GMS_RATIO,
    PAPER_LMS_KERNELS,
    PAPER_WIDTHS,
    dimension,
    resolve_levels,
)
from nnunet_lgms.blocks.dimension import conv_for, is_int, per_axis
from nnunet_lgms.blocks.norm import paper_norm
from nnunet_lgms.files import one_line, shown
from nnunet_lgms.ops import keeping_little, to_fastest_layout


class LGMSNet(nn.Module):
    """Encoder-decoder with Local (LMS) and Global (GMS) MultiScale blocks.

    The first arguments are nnU-Net's: a plan's ``architecture.arch_kwargs`` can name them. "Per level" options take
    one value for all levels or a list with one entry per level, full resolution first.

    Args:
        input_channels: channels of the image.
        num_classes: channels of the output.
        n_stages: resolution levels, at least 2.
        features_per_stage: width per level; divisible by 4 where a block is LMS; where it is GMS, a ``gms_ratio`` of
            t:c must give Transformer and Conv whole channels, width * t / (t + c).
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        kernel_sizes: planned kernel per level and axis. An axis with 1 (thick slices) gets kernel 1 in every
            convolution of that level, LMS kernels included; any other value gives the paper's kernels.
        strides: downsampling per level and axis; 1 at the first level.
        encoder_blocks: "LMS", "GMS" or "Conv" per level. Default: LMS at levels 1 to 3, GMS below.
        decoder_blocks: list of "Fusion", "GMS", "Conv" per level but the lowest. Default: Fusion at levels 1 and 2,
            Fusion and GMS at level 3, GMS below.
        lms_kernels: odd kernels, one per channel group; a flat list for all levels, or one list per level whose
            entries are numbers or one number per axis.
        lms_group_channels: channels of each LMS group, per level; as equal as they can be if None.
        gms_ratio: Transformer:Conv, a pair or one per level.
        decoder_gms_ratio: the same for the decoder; ``gms_ratio`` if None.
        gms_patch: attention patch in pixels, one number or one per axis.
        n_heads: attention heads.
        head_dim: channels of a head.
        mlp_ratio: hidden channels of the feed-forward part over the width, per level.
        decoder_mlp_ratio: the same for the decoder; ``mlp_ratio`` if None.
        n_blocks_per_stage: repetitions of the encoder's block, per level.
        norm_op: norm type; the paper's for the dimension if None (BatchNorm in 2D, InstanceNorm without affine in 3D).
        norm_op_kwargs: its keyword arguments.
        deep_supervision: return the logits of all levels, not only those of full resolution.
        auxiliary_heads: build the heads below full resolution (see :class:`LGMSDecoder`).

    Raises:
        ValueError: an argument cannot be built; the message names its value, what is allowed and the way out.

    Example:
        >>> import torch
        >>> net = LGMSNet.paper(input_channels=3, num_classes=1, dim=2)
        >>> net(torch.zeros(1, 3, 64, 50)).shape
        torch.Size([1, 1, 64, 50])
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: type[_ConvNd],
        kernel_sizes: int | Sequence[int | Sequence[int]],
        strides: Sequence[int | Sequence[int]],
        *,
        encoder_blocks: Sequence[str] | None = None,
        decoder_blocks: Sequence[Sequence[str]] | None = None,
        lms_kernels: Sequence[Any] = PAPER_LMS_KERNELS,
        lms_group_channels: Sequence[Sequence[int] | None] | None = None,
        gms_ratio: Sequence[Any] = PAPER_GMS_RATIO,
        decoder_gms_ratio: Sequence[Any] | None = None,
        gms_patch: int | Sequence[int] = 2,
        n_heads: int = 4,
        head_dim: int = 8,
        mlp_ratio: Real | Sequence[Real] = 2,
        decoder_mlp_ratio: Real | Sequence[Real] | None = None,
        n_blocks_per_stage: int | Sequence[int] = 1,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
        deep_supervision: bool = False,
        auxiliary_heads: bool = True,
    ):
        super().__init__()
        for name, value in {
            "input_channels": input_channels,
            "num_classes": num_classes,
            "n_heads": n_heads,
            "head_dim": head_dim,
        }.items():
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} is {shown(value)}: LGMSNet needs a whole number of at least 1.")
        self.dim = dimension(conv_op)
        self.input_channels = input_channels
        levels = resolve_levels(
            dim=self.dim,
            n_stages=n_stages,
            features_per_stage=features_per_stage,
            kernel_sizes=kernel_sizes,
            strides=strides,
            encoder_blocks=encoder_blocks,
            decoder_blocks=decoder_blocks,
            lms_kernels=lms_kernels,
            lms_group_channels=lms_group_channels,
            gms_ratio=gms_ratio,
            decoder_gms_ratio=decoder_gms_ratio,
            mlp_ratio=mlp_ratio,
            decoder_mlp_ratio=decoder_mlp_ratio,
            n_blocks_per_stage=n_blocks_per_stage,
        )
        if norm_op is None and norm_op_kwargs:
            raise ValueError(
                f"norm_op_kwargs is {shown(norm_op_kwargs)}, but norm_op is None: name the norm that they belong to."
            )
        if norm_op is None:
            norm_op, norm_op_kwargs = paper_norm(self.dim)
        norm_op_kwargs = norm_op_kwargs or {}
        _check_norm(norm_op, norm_op_kwargs, self.dim)
        gms_kwargs = {
            "patch": per_axis(gms_patch, self.dim, "gms_patch"),
            "n_heads": n_heads,
            "head_dim": head_dim,
        }
        self.encoder = LGMSEncoder(input_channels, conv_op, levels, norm_op, norm_op_kwargs, gms_kwargs)
        self.decoder = LGMSDecoder(self.encoder, levels, num_classes, gms_kwargs, deep_supervision, auxiliary_heads)

    @classmethod
    def paper(cls, input_channels: int, num_classes: int, dim: int, **options: Any) -> LGMSNet:
        """The published network: five levels, stride 2, without heads for deep supervision.

        ``paper(3, 1, dim=2)`` has 2,321,393 parameters, ``paper(1, 14, dim=3)`` has 6,193,742.

        Args:
            input_channels: channels of the image.
            num_classes: channels of the output.
            dim: spatial axes, 2 or 3.
            options: what is to differ from the published network, as in ``LGMSNet(...)``: ``deep_supervision=True``
                brings the heads that it needs.

        Raises:
            ValueError: ``dim`` is neither 2 nor 3, a number of channels is below 1, or an option is not valid.
        """
        n_stages = len(PAPER_WIDTHS)
        published = {
            "n_stages": n_stages,
            "features_per_stage": PAPER_WIDTHS,
            "conv_op": conv_for(dim),
            "kernel_sizes": [3] * n_stages,
            "strides": [1] + [2] * (n_stages - 1),
            "auxiliary_heads": bool(options.get("deep_supervision")),
        }
        return cls(input_channels, num_classes, **{**published, **options})

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(B, input_channels, *spatial) of any size -> (B, num_classes, *spatial); a list with deep supervision.

        Raises:
            ValueError: the input has the wrong number of axes or channels, an axis without voxels, or whole numbers.
            RuntimeError: ``torch.jit.trace`` calls it, which cannot follow operators that choose by size and device.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "LGMSNet cannot be recorded by torch.jit.trace: use torch.export.export(network, (image,)), or "
                "nnunet_lgms export for an ONNX file."
            )
        if x.ndim != self.dim + 2:
            axes = "(B, C, H, W)" if self.dim == 2 else "(B, C, D, H, W)"
            raise ValueError(f"This LGMSNet is {self.dim}D and takes {axes}, not a tensor of shape {tuple(x.shape)}.")
        if x.shape[1] != self.input_channels:
            raise ValueError(
                f"This LGMSNet was built for {self.input_channels} input channel(s), not for {x.shape[1]}: the data "
                "must have the channels of the training data."
            )
        if 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"LGMSNet takes floating-point maps of at least one sample and one voxel per axis, not {x.dtype} of "
                f"shape {tuple(x.shape)}: convert or crop the data before."
            )
        return keeping_little(lambda x: self.decoder(self.encoder(x)), to_fastest_layout(x))


def _check_norm(norm_op: type[nn.Module], norm_op_kwargs: dict, dim: int) -> None:
    """Tries a norm on a small map: one for another number of axes would only fail in the first forward pass."""
    try:
        with torch.device("cpu"), torch.no_grad():
            norm_op(8, **norm_op_kwargs)(torch.zeros(2, 8, *(2,) * dim))
    except Exception as error:  # a norm of the user's own may raise anything
        reason = one_line(error)
        raise ValueError(
            f"norm_op {shown(norm_op)} with {shown(norm_op_kwargs)} does not take {dim}D maps ({reason}): choose one "
            f"that is called as norm_op(channels, **norm_op_kwargs), such as torch.nn.InstanceNorm{dim}d."
        ) from error
