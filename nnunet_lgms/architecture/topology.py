"""What stands at which resolution level: a plan's stages and our options resolved into one description per level.

Levels are counted from 1 at full resolution, as in the paper's figure and table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.dimension import is_int, per_axis, plain
from nnunet_lgms.files import shown

ENCODER_BLOCKS = ("LMS", "GMS", "Conv")
DECODER_BLOCKS = ("Fusion", "GMS", "Conv")

PAPER_WIDTHS = (16, 32, 64, 128, 128)
PAPER_LMS_KERNELS = (3, 5, 7, 9)
PAPER_GMS_RATIO = (3, 1)
PAPER_KERNEL = 3

DIMENSIONS = {nn.Conv2d: 2, nn.Conv3d: 3}


def paper_features(n_stages: int) -> list[int]:
    """Widths 16, 32, 64, 128, 128, then 128 for every further stage."""
    return [PAPER_WIDTHS[min(i, len(PAPER_WIDTHS) - 1)] for i in range(n_stages)]


def paper_encoder_block(level: int) -> str:
    """LMS at levels 1 to 3, where the map is large; GMS below."""
    return "LMS" if level <= 3 else "GMS"


def paper_decoder_blocks(level: int) -> tuple[str, ...]:
    """Fusion at levels 1 and 2, Fusion then GMS at level 3, GMS below."""
    if level <= 2:
        return ("Fusion",)
    return ("Fusion", "GMS") if level == 3 else ("GMS",)


class GMSSplit(NamedTuple):
    """Channels of a GMS block's branches: through attention, and hidden in its feed-forward part."""

    transformer_channels: int
    mlp_channels: int


@dataclass(frozen=True)
class Level:
    """One resolution level.

    Attributes:
        number: 1 at full resolution.
        features: width.
        stride: downsampling per axis from the level above; 1 on every axis at level 1.
        kernel_size: kernel per axis of the dense convolutions: 3, or 1 where the plan says 1 (thick slices).
        lms_kernel_sizes: kernel per axis of each LMS channel group, likewise 1 where the plan says 1.
        lms_group_channels: channels of each LMS group; groups as equal as they can be if None.
        encoder_block: one of ``ENCODER_BLOCKS``.
        n_blocks: how often it is repeated.
        decoder_blocks: some of ``DECODER_BLOCKS``, in order of use; empty at the lowest level.
        encoder_gms: split of the encoder's GMS block.
        decoder_gms: split of the decoder's.
    """

    number: int
    features: int
    stride: tuple[int, ...]
    kernel_size: tuple[int, ...]
    lms_kernel_sizes: tuple[tuple[int, ...], ...]
    lms_group_channels: tuple[int, ...] | None
    encoder_block: str
    n_blocks: int
    decoder_blocks: tuple[str, ...]
    encoder_gms: GMSSplit
    decoder_gms: GMSSplit


def dimension(conv_op: type[_ConvNd]) -> int:
    """Spatial axes of ``conv_op``.

    Raises:
        ValueError: it is neither ``nn.Conv2d`` nor ``nn.Conv3d``.
    """
    for known, dim in DIMENSIONS.items():
        if conv_op is known:
            return dim
    raise ValueError(
        f"LGMSNet cannot be built from {shown(conv_op)}: conv_op must be torch.nn.Conv2d or torch.nn.Conv3d."
    )


def resolve_levels(
    *,
    dim: int,
    n_stages: int,
    features_per_stage: Sequence[int],
    kernel_sizes: Sequence[Any],
    strides: Sequence[Any],
    encoder_blocks: Sequence[str] | None,
    decoder_blocks: Sequence[Sequence[str]] | None,
    lms_kernels: Sequence[Any],
    lms_group_channels: Sequence[Sequence[int] | None] | None,
    gms_ratio: Sequence[Any],
    decoder_gms_ratio: Sequence[Any] | None,
    mlp_ratio: Real | Sequence[Real],
    decoder_mlp_ratio: Real | Sequence[Real] | None,
    n_blocks_per_stage: int | Sequence[int],
) -> list[Level]:
    """Resolves the arguments of :class:`LGMSNet` (see there) to one :class:`Level` per stage.

    Raises:
        ValueError: an option cannot be built; the message names it, its value, what is allowed and the way out.
    """
    if not is_int(n_stages) or n_stages < 2:
        raise ValueError(
            f"LGMSNet cannot have {shown(n_stages)} stages: a plan needs at least 2; use a larger patch size."
        )

    features = _per_level(features_per_stage, n_stages, "features_per_stage")
    for width in features:
        if not is_int(width) or width < 1:
            raise ValueError(f"features_per_stage holds {shown(width)}: every width must be a positive whole number.")
    kernels = [per_axis(k, dim, "kernel_sizes") for k in _per_level(kernel_sizes, n_stages, "kernel_sizes")]
    strides = [per_axis(s, dim, "strides") for s in _per_level(strides, n_stages, "strides")]
    if any(s != 1 for s in strides[0]):
        raise ValueError(
            f"strides[0] is {list(strides[0])}: the first stage must keep the resolution; set it to {[1] * dim} and "
            "put the stride into the second stage."
        )
    if encoder_blocks is None:
        encoder_blocks = [paper_encoder_block(i + 1) for i in range(n_stages)]
    encoder_blocks = _per_level(encoder_blocks, n_stages, "encoder_blocks")
    if decoder_blocks is None:
        decoder_blocks = [paper_decoder_blocks(i + 1) for i in range(n_stages - 1)]
    decoder_blocks = [*_per_level(decoder_blocks, n_stages - 1, "decoder_blocks"), ()]
    lms_kernels = _lms_kernels_per_level(lms_kernels, n_stages)
    groups = [None] * n_stages if lms_group_channels is None else lms_group_channels
    groups = [_group_channels(g) for g in _per_level(groups, n_stages, "lms_group_channels")]
    ratios = _ratio_per_level(gms_ratio, n_stages, "gms_ratio")
    decoder_ratios = (
        ratios if decoder_gms_ratio is None else _ratio_per_level(decoder_gms_ratio, n_stages, "decoder_gms_ratio")
    )
    mlp = _per_level(mlp_ratio, n_stages, "mlp_ratio")
    decoder_mlp = mlp if decoder_mlp_ratio is None else _per_level(decoder_mlp_ratio, n_stages, "decoder_mlp_ratio")
    n_blocks = _per_level(n_blocks_per_stage, n_stages, "n_blocks_per_stage")

    levels = []
    for i in range(n_stages):
        number = i + 1
        _check_blocks([encoder_blocks[i]], ENCODER_BLOCKS, f"encoder level {number}")
        _check_blocks(decoder_blocks[i], DECODER_BLOCKS, f"decoder level {number}")
        if number < n_stages and not decoder_blocks[i]:
            raise ValueError(f"decoder level {number} has no block: name at least one of {', '.join(DECODER_BLOCKS)}.")
        if not is_int(n_blocks[i]) or n_blocks[i] < 1:
            raise ValueError(f"n_blocks_per_stage holds {shown(n_blocks[i])}: every stage needs at least 1 block.")
        # One rule for thick slices: an axis on which the plan has kernel 1 gets kernel 1 everywhere at that level.
        thick = [k == 1 for k in kernels[i]]
        uses_gms = encoder_blocks[i] == "GMS", "GMS" in decoder_blocks[i]
        levels.append(
            Level(
                number=number,
                features=features[i],
                stride=strides[i],
                kernel_size=tuple(1 if t else PAPER_KERNEL for t in thick),
                lms_kernel_sizes=tuple(
                    tuple(
                        1 if t else k
                        for t, k in zip(thick, per_axis(kernel, dim, "lms_kernels", odd=True), strict=True)
                    )
                    for kernel in lms_kernels[i]
                ),
                lms_group_channels=groups[i],
                encoder_block=encoder_blocks[i],
                n_blocks=n_blocks[i],
                decoder_blocks=tuple(decoder_blocks[i]),
                encoder_gms=_gms_split(features[i], ratios[i], mlp[i], number, uses_gms[0]),
                decoder_gms=_gms_split(features[i], decoder_ratios[i], decoder_mlp[i], number, uses_gms[1]),
            )
        )
    return levels


def _per_level(value: Any, n: int, name: str) -> list:
    """One entry per level: a number is repeated, a sequence must have ``n`` entries."""
    value = plain(value)
    if isinstance(value, Real):
        return [value] * n
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != n:
        raise ValueError(f"{name} is {shown(value)}: give one entry for each of the {n} levels that it covers.")
    return list(value)


def _lms_kernels_per_level(kernels: Any, n: int) -> list[Sequence[Any]]:
    """A flat list of whole numbers holds at every level; otherwise one list of kernels per level."""
    kernels = plain(kernels)
    if not isinstance(kernels, Sequence) or isinstance(kernels, str) or not kernels:
        raise ValueError(
            f"lms_kernels is {shown(kernels)}: give a list of odd kernels such as [3, 5, 7, 9], or one list per level."
        )
    if all(is_int(k) for k in kernels):
        return [kernels] * n
    per_level = _per_level(kernels, n, "lms_kernels")
    for entry in per_level:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or not entry:
            raise ValueError(
                f"lms_kernels holds {shown(entry)} for a level: give a list of odd kernels such as [3, 5, 7, 9]."
            )
    return per_level


def _ratio_per_level(ratio: Any, n: int, name: str) -> list[tuple[int, int]]:
    """A pair Transformer:Conv holds at every level; otherwise one pair per level."""
    ratio = plain(ratio)
    is_pair = isinstance(ratio, Sequence) and len(ratio) == 2 and all(is_int(r) for r in ratio)
    pairs = [ratio] * n if is_pair else _per_level(ratio, n, name)
    for pair in pairs:
        valid = (
            isinstance(pair, Sequence) and len(pair) == 2 and all(is_int(r) and r >= 0 for r in pair) and sum(pair) > 0
        )
        if not valid:
            raise ValueError(
                f"{name} holds {shown(pair)}: a ratio Transformer:Conv is two whole numbers such as [3, 1], not both 0."
            )
    return [tuple(pair) for pair in pairs]


def _group_channels(given: Any) -> tuple[int, ...] | None:
    """Channels of a level's LMS groups; whether they fill the level is the block's matter."""
    if given is None:
        return None
    if not isinstance(given, Sequence) or isinstance(given, str) or not given or not all(is_int(g) for g in given):
        raise ValueError(
            f"lms_group_channels holds {shown(given)}: give a list of whole numbers, one per kernel, or None."
        )
    return tuple(given)


def _gms_split(features: int, ratio: tuple[int, int], mlp_ratio: Real, level: int, used: bool) -> GMSSplit:
    """Channels of a GMS block's branches; a level without one is not held to divide."""
    if not isinstance(mlp_ratio, Real) or isinstance(mlp_ratio, bool) or not isfinite(mlp_ratio) or mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio is {shown(mlp_ratio)} at level {level}: give a positive number such as 2.")
    if not used:
        return GMSSplit(0, 0)
    return GMSSplit(transformer_channels(features, ratio, level), hidden_channels(features, mlp_ratio, level))


def transformer_channels(features: int, ratio: Sequence[int], level: int) -> int:
    """Channels of a GMS block of ``features`` that go through attention, for a ratio Transformer:Conv.

    Raises:
        ValueError: the ratio does not make a whole number of them.
    """
    channels = Fraction(features * ratio[0], sum(ratio))
    if channels.denominator != 1:
        raise ValueError(
            f"{features} channels at level {level} cannot be split {ratio[0]}:{ratio[1]} between Transformer and "
            f"Conv: choose a width divisible by {sum(ratio)} or another gms_ratio."
        )
    return int(channels)


def hidden_channels(features: int, mlp_ratio: Real, level: int) -> int:
    """Hidden channels of the feed-forward part of a GMS block of ``features``.

    Raises:
        ValueError: the ratio does not make a whole number of at least one.
    """
    channels = Fraction(mlp_ratio).limit_denominator(10**6) * features
    if channels.denominator != 1 or channels < 1:
        raise ValueError(
            f"mlp_ratio {mlp_ratio!r} of {features} channels at level {level} is not a positive whole number of "
            f"channels."
        )
    return int(channels)


def _check_blocks(names: Sequence[str], allowed: Sequence[str], where: str) -> None:
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise ValueError(f"{where} has {shown(names)}: give a list of blocks out of {', '.join(allowed)}.")
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"{where} names the block {shown(unknown)}: allowed are {', '.join(allowed)}.")
