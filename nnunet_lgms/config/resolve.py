"""Settings and a planned topology -> arguments of :class:`nnunet_lgms.LGMSNet`.

What can be told from the values alone is the schema's (``settings.py``); what depends on the plan is decided here: how
many levels there are, which widths meet which ratio, how large the maps are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite, prod
from numbers import Number, Real
from typing import Any

import numpy as np

from nnunet_lgms.architecture.topology import (
    PAPER_LMS_KERNELS,
    hidden_channels,
    paper_decoder_blocks,
    paper_encoder_block,
    paper_features,
    transformer_channels,
)
from nnunet_lgms.blocks.dimension import is_int, per_axis
from nnunet_lgms.blocks.lms import check_lms_width, lms_groups
from nnunet_lgms.blocks.norm import BATCH_NORM, INSTANCE_NORM, GroupNorm, paper_norm
from nnunet_lgms.config.levels import key_for, spread
from nnunet_lgms.config.settings import AUTO, LGMSSettings
from nnunet_lgms.files import shown

PLANNED = ("n_stages", "strides", "kernel_sizes")
# More than any card holds; with limits here, nothing further on can overflow.
MAX_AXIS, MAX_VOXELS, MAX_STAGES = 2**16, 2**28, 32


@dataclass(frozen=True)
class Topology:
    """What nnU-Net planned and a setting cannot change.

    Attributes:
        patch_size: voxels per axis.
        strides: downsampling per level and axis; 1 at the first level.
        kernel_sizes: kernel per level and axis; 1 on an axis stands for thick slices.
        spacing: mm per axis; None where unknown.
    """

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    spacing: tuple[float, ...] | None = None

    @classmethod
    def of(cls, configuration: Mapping[str, Any]) -> Topology:
        """Reads a resolved configuration of an nnU-Net plan.

        Raises:
            ValueError: the plan's network is no convolutional encoder with stages, its stages contradict each other, or
                a size or spacing cannot be one.
        """
        try:
            return cls._read(configuration)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The plan's configuration cannot be read ({type(error).__name__}: {error}): it needs patch_size, "
                "spacing and an architecture with n_stages, strides and kernel_sizes, as nnU-Net plans them; plan "
                "again."
            ) from error

    @classmethod
    def _read(cls, configuration: Mapping[str, Any]) -> Topology:
        planned = configuration["architecture"]["arch_kwargs"]
        missing = [key for key in PLANNED if key not in planned]
        if missing:
            name = configuration["architecture"]["network_class_name"]
            raise ValueError(
                f"The plan's network {shown(name)} has no {', '.join(missing)}: LGMSNet needs the plan of a "
                f"convolutional U-Net; plan with nnU-Net's default or ResEnc planners."
            )
        if not is_int(planned["n_stages"]) or not 1 <= planned["n_stages"] <= MAX_STAGES:
            raise ValueError(
                f"The plan has n_stages {shown(planned['n_stages'])}: allowed are 1 to {MAX_STAGES}; plan again."
            )
        for key in ("strides", "kernel_sizes"):
            if len(planned[key]) != planned["n_stages"]:
                raise ValueError(
                    f"The plan has n_stages {planned['n_stages']} but {key} {shown(planned[key])}: give one entry for "
                    "each stage, or plan again."
                )
        patch_size = _sizes(configuration["patch_size"], None, "patch_size")
        if len(patch_size) not in (2, 3) or prod(patch_size) > MAX_VOXELS:
            raise ValueError(
                f"The plan has patch_size {list(patch_size)}: allowed are 2 or 3 axes and {MAX_VOXELS} voxels in all; "
                "plan again."
            )
        return cls(
            patch_size,
            tuple(_sizes(s, len(patch_size), "strides") for s in planned["strides"]),
            tuple(_sizes(k, len(patch_size), "kernel_sizes") for k in planned["kernel_sizes"]),
            _spacing(configuration.get("spacing"), len(patch_size)),
        )

    @property
    def dim(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    @property
    def n_levels(self) -> int:
        """Resolution levels."""
        return len(self.strides)

    def downsampling(self, level: int) -> tuple[int, ...]:
        """Cumulative stride per axis at ``level`` (1 at full resolution)."""
        return tuple(int(n) for n in np.prod(self.strides[:level], axis=0))

    def map_size(self, level: int) -> tuple[int, ...]:
        """Voxels per axis of a patch's map at ``level``; pooling rounds up."""
        return tuple(ceil(size / step) for size, step in zip(self.patch_size, self.downsampling(level), strict=True))

    def largest_kernel(self, level: int) -> tuple[int, ...]:
        """Largest kernel per axis at ``level``: one that reaches as far to either side as the map is long.

        What lies farther out is padding for every voxel of the map. On axes where the plan's kernel is 1, LMS kernels
        are 1 as well, whatever the setting.
        """
        return tuple(2 * size + 1 for size in self.map_size(level))


def _sizes(given: Any, dim: int | None, name: str) -> tuple[int, ...]:
    """One positive whole number per axis; a single number holds for all axes, where their number is known."""
    values = (given,) * dim if dim is not None and is_int(given) else tuple(given)
    if len(values) != (dim or len(values)) or not all(is_int(v) and 1 <= v <= MAX_AXIS for v in values):
        axes = "" if dim is None else f", one for each of the {dim} axes of the patch"
        raise ValueError(
            f"The plan has {name} {shown(given)}: allowed are whole numbers from 1 to {MAX_AXIS}{axes}; plan again."
        )
    return tuple(int(v) for v in values)


def _spacing(given: Any, dim: int) -> tuple[float, ...] | None:
    """mm per axis; None where the plan has none."""
    if given is None:
        return None
    values = tuple(given)
    if len(values) != dim or not all(isinstance(v, Real) and isfinite(v) and v > 0 for v in values):
        raise ValueError(
            f"The plan has spacing {shown(given)}: allowed are positive numbers of mm, one for each of the {dim} axes "
            "of the patch; plan again."
        )
    return tuple(float(v) for v in values)


def network_kwargs(settings: LGMSSettings, topology: Topology) -> dict[str, Any]:
    """The keyword arguments of ``LGMSNet`` that a plan and its settings decide.

    Channels of image and classes, ``conv_op`` and ``deep_supervision`` are the caller's.

    Raises:
        ValueError: the settings do not fit the plan; the message names setting, value and range.
    """
    n = topology.n_levels
    widths = spread(settings.widths, n, lambda level: paper_features(n)[level - 1], "widths", _is_number)
    encoder_blocks = _encoder_blocks(settings, topology)
    decoder_blocks = spread(
        settings.block_by_level.decoder,
        n - 1,
        lambda level: "+".join(paper_decoder_blocks(level)),
        "block_by_level.decoder",
        lambda v: isinstance(v, str),
    )
    kernels = lms_kernels_by_level(settings, topology)
    groups = spread(settings.lms_group_channels, n, lambda level: None, "lms_group_channels", _is_flat)
    ratios = spread(settings.gms_ratio, n, lambda level: [3, 1], "gms_ratio", _is_flat)
    mlp_ratios = spread(settings.mlp_ratio, n, lambda level: 2, "mlp_ratio", _is_number)

    entering = [widths[0], *widths[:-1]]  # an LMS block works on the channels that the level above hands down
    for i in range(n):
        level, uses_gms = i + 1, encoder_blocks[i] == "GMS" or (i < n - 1 and "GMS" in decoder_blocks[i])
        if encoder_blocks[i] == "LMS":
            with _in_setting(f"widths at level {level}"):
                check_lms_width(entering[i])
            name = "lms_kernels" if groups[i] is None else "lms_group_channels"
            with _in_setting(f"{name} at level {level}"):
                groups[i] = lms_groups(entering[i], len(kernels[i]), groups[i])
        if uses_gms:
            with _in_setting("gms_ratio"):
                transformer_channels(widths[i], ratios[i], level)
            with _in_setting("mlp_ratio"):
                hidden_channels(widths[i], mlp_ratios[i], level)
    _check_patch(settings, topology, encoder_blocks, decoder_blocks)

    norm_op, norm_op_kwargs = _norm(settings.norm, topology.dim)
    return {
        "n_stages": n,
        "features_per_stage": widths,
        "kernel_sizes": [list(k) for k in topology.kernel_sizes],
        "strides": [list(s) for s in topology.strides],
        "encoder_blocks": encoder_blocks,
        "decoder_blocks": [tuple(names.split("+")) for names in decoder_blocks],
        "lms_kernels": kernels,
        "lms_group_channels": groups,
        "gms_ratio": ratios,
        "gms_patch": settings.gms_patch,
        "n_heads": settings.heads,
        "head_dim": settings.head_dim,
        "mlp_ratio": mlp_ratios,
        "n_blocks_per_stage": spread(settings.depths, n, lambda level: 1, "depths", _is_number),
        "norm_op": norm_op,
        "norm_op_kwargs": norm_op_kwargs,
    }


def without_effect(settings: LGMSSettings, topology: Topology, given: Collection[str]) -> list[str]:
    """Remarks on settings that are valid and change nothing, as no block of the plan reads them.

    Args:
        settings: all settings of the configuration, which fit it.
        topology: of its plan.
        given: names of the settings to look at.
    """
    resolved = network_kwargs(settings, topology)
    encoder, decoder, ratios = (resolved[key] for key in ("encoder_blocks", "decoder_blocks", "gms_ratio"))
    levels = range(1, topology.n_levels + 1)
    lms = {level for level in levels if encoder[level - 1] == "LMS"}
    gms = {n for n in levels if encoder[n - 1] == "GMS" or (n < len(encoder) and "GMS" in decoder[n - 1])}
    attention = {level for level in gms if ratios[level - 1][0]}
    readers = {"lms_kernels": ("LMS blocks", lms), "lms_group_channels": ("LMS blocks", lms)}
    readers |= {"gms_ratio": ("GMS blocks", gms)}
    readers |= dict.fromkeys(("gms_patch", "heads", "head_dim", "mlp_ratio"), ("GMS blocks with attention", attention))
    remarks = []
    for name, (block, reading) in readers.items():
        value = getattr(settings, name)
        if name not in given or value is None:
            continue
        if not reading:
            remarks.append(f"lgmsnet.{name} changes nothing, as the plan has no {block}.")
        elif isinstance(value, Mapping):
            for key in value:  # "5+" in a plan of four levels is meant for other plans
                named = {level for level in levels if key_for(value, level) == key}
                if named and not named & reading:
                    there = ", ".join(map(str, sorted(reading)))
                    remarks.append(
                        f'lgmsnet.{name} changes nothing at "{key}": the plan has {block} at level(s) {there} only.'
                    )
    return remarks


def lms_levels(settings: LGMSSettings, topology: Topology) -> list[int]:
    """Numbers of the levels whose encoder block is LMS."""
    return [level for level, block in enumerate(_encoder_blocks(settings, topology), start=1) if block == "LMS"]


def _encoder_blocks(settings: LGMSSettings, topology: Topology) -> list[str]:
    name, given = "block_by_level.encoder", settings.block_by_level.encoder
    return spread(given, topology.n_levels, paper_encoder_block, name, lambda value: isinstance(value, str))


def lms_kernels_by_level(settings: LGMSSettings, topology: Topology) -> list[list[tuple[int, ...]]]:
    """Kernel per axis of each LMS group, per level.

    Raises:
        ValueError: they are still "auto", do not have the plan's axes, or are larger than the padded map.
    """
    if settings.lms_kernels == AUTO:
        raise ValueError(
            'lgmsnet.lms_kernels is still "auto": kernels are taken from the dataset when plans are written; write '
            "them with `nnunet_lgms override`, not by hand."
        )
    per_level = spread(
        settings.lms_kernels, topology.n_levels, lambda level: list(PAPER_LMS_KERNELS), "lms_kernels", _is_flat
    )
    resolved = []
    for kernels in per_level:
        resolved.append([per_axis(kernel, topology.dim, "lgmsnet.lms_kernels") for kernel in kernels])
    if "lms_kernels" in settings.model_fields_set:
        for level in lms_levels(settings, topology):
            _check_kernels(resolved[level - 1], topology, level)
    return resolved


def _check_kernels(kernels: Sequence[tuple[int, ...]], topology: Topology, level: int) -> None:
    largest = topology.largest_kernel(level)
    planned = topology.kernel_sizes[level - 1]
    for kernel in kernels:
        for k, limit, axis_kernel in zip(kernel, largest, planned, strict=True):
            if axis_kernel != 1 and k > limit:
                raise ValueError(
                    f"lgmsnet.lms_kernels holds {_one_or_axes(kernel)} at level {level}, where a patch's map is "
                    f"{'x'.join(map(str, topology.map_size(level)))} voxels: allowed are odd kernels from 1 to "
                    f"{_one_or_axes(largest)}; choose smaller kernels there or plan a larger patch."
                )


@contextmanager
def _in_setting(name: str) -> Iterator[None]:
    """Inside, what the network refuses is said of the setting that it comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"lgmsnet.{name}: {error}") from error


def _check_patch(settings: LGMSSettings, topology: Topology, encoder: Sequence[str], decoder: Sequence[str]) -> None:
    patch = per_axis(settings.gms_patch, topology.dim, "lgmsnet.gms_patch")
    if "gms_patch" not in settings.model_fields_set:
        return
    for i, block in enumerate(encoder):
        size = tuple(max(2, s) for s in topology.map_size(i + 1))  # the paper's patch of 2 is fine on a single slice
        uses_gms = block == "GMS" or (i < len(decoder) and "GMS" in decoder[i])
        if uses_gms and any(p > s for p, s in zip(patch, size, strict=True)):
            raise ValueError(
                f"lgmsnet.gms_patch is {settings.gms_patch}, larger than the map at level {i + 1}, which is "
                f"{'x'.join(map(str, size))} voxels: allowed are 1 to {_one_or_axes(size)}."
            )


def _norm(name: str, dim: int) -> tuple[type, dict]:
    if name == "paper":
        return paper_norm(dim)
    if name == "batch":
        return BATCH_NORM[dim], {}
    if name == "instance":
        return INSTANCE_NORM[dim], {"affine": False}
    return GroupNorm, {}


def _one_or_axes(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, Number)


def _is_flat(value: Any) -> bool:
    return all(_is_number(v) for v in value)
