"""What an override may change of nnU-Net's own planning: levels, patch, batch and the kind of Dice.

nnU-Net reads these from its own keys of a configuration, so they stand there and not under ``"lgmsnet"``, and stock
nnU-Net trains its own network of the same plans. What decides the preprocessed data is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from nnunet_lgms.complaints import allowed_in, described, first_complaint
from nnunet_lgms.config.resolve import MAX_AXIS, MAX_STAGES, Topology
from nnunet_lgms.config.settings import KEY
from nnunet_lgms.files import shown
from nnunet_lgms.nearest import did_you_mean

MAX_BATCH = 4096
#: nnU-Net's rule: the map of the lowest level has at least so many voxels along each axis that was halved
SMALLEST_MAP = 4
#: nnU-Net's caps on the channels of its own networks
MOST_FEATURES = {2: 512, 3: 320}
#: arguments of nnU-Net's networks with one entry for each level, and with one for each level but the lowest
OF_EACH_LEVEL = ("features_per_stage", "n_conv_per_stage", "n_blocks_per_stage")
OF_EACH_UPPER_LEVEL = ("n_conv_per_stage_decoder",)

Value = TypeVar("Value")
ByDimension = Value | Annotated[dict[Literal["2d", "3d"], Value], Field(min_length=1)]
Axis = Annotated[int, Field(strict=True, ge=1, le=MAX_AXIS)]


def _key(allowed: str, description: str) -> Any:
    return described(None, allowed + ', or a table of these for "2d" and "3d"', description)


class Planned(BaseModel):
    """Keys of an override beside ``"lgmsnet"``; None leaves what nnU-Net planned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: ByDimension[Annotated[int, Field(strict=True, ge=2, le=MAX_STAGES)]] | None = _key(
        f"a whole number from 2 to {MAX_STAGES}", "resolution levels of the network"
    )
    patch_size: ByDimension[Annotated[list[Axis], Field(min_length=2, max_length=3)]] | None = _key(
        f"a list with a whole number from 1 to {MAX_AXIS} for each axis", "voxels of a patch per axis"
    )
    batch_size: ByDimension[Annotated[int, Field(strict=True, ge=1, le=MAX_BATCH)]] | None = _key(
        f"a whole number from 1 to {MAX_BATCH}", "patches of a batch"
    )
    batch_dice: ByDimension[StrictBool] | None = _key(
        "true or false", "one Dice over the whole batch, or one for each sample, then the mean"
    )

    @classmethod
    def from_override(cls, override: Mapping[str, Any]) -> Planned:
        """The keys of an override beside ``"lgmsnet"``.

        Raises:
            ValueError: one is unknown or holds what is not allowed; one sentence names it.
        """
        given = {key: value for key, value in override.items() if key != KEY}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            complaint = first_complaint(error, cls, given)
        key = complaint.path[0]
        if complaint.kind == "unknown":
            known = [KEY, *complaint.known]
            hint = did_you_mean(key, known) or f"known are {', '.join(known)}."
            raise ValueError(f"An override has no key {shown(key)}; {hint}")
        raise ValueError(f"{key} is {shown(given[key])}: allowed is {complaint.allowed}; see docs/reference/plans.md.")

    def of_dimension(self, dim: int) -> dict[str, Any]:
        """What is given for configurations of ``dim`` axes."""
        values = {}
        for key, value in self.model_dump(exclude_none=True).items():
            value = value.get(f"{dim}d") if isinstance(value, dict) else value
            if value is not None:
                values[key] = value
        return values


def replanned(configuration: Mapping[str, Any], planned: Planned) -> dict[str, Any]:
    """The keys of a resolved configuration that change, with their new values.

    Another patch, or more levels than were planned, is divided into levels by nnU-Net's own rule for its spacing; fewer
    levels are the first of the planned ones.

    Raises:
        ValueError: patch and levels do not fit each other or the configuration's axes.
    """
    topology = Topology.of(configuration)
    given = planned.of_dimension(topology.dim)
    changes = {key: given[key] for key in ("batch_size", "batch_dice") if key in given}
    if not {"patch_size", "levels"} & set(given):
        return changes
    patch = tuple(given.get("patch_size", topology.patch_size))
    if len(patch) != topology.dim:
        raise ValueError(
            f"patch_size is {list(patch)}, but the configuration has {topology.dim} axes: give one number for each, or "
            'a table such as {"2d": [256, 256], "3d": [96, 96, 96]}.'
        )
    strides, kernels = topology.strides, topology.kernel_sizes
    if patch != topology.patch_size or given.get("levels", 0) > topology.n_levels:
        strides, kernels = nnunet_levels(topology.spacing or (1.0,) * topology.dim, patch)
    levels = given.get("levels", min(topology.n_levels, len(strides)))
    if not 2 <= levels <= len(strides):
        allowed = f"2 to {len(strides)} levels" if len(strides) > 1 else "no levels"
        raise ValueError(
            f"levels is {levels}, but a patch of {_x(patch)} voxels leaves room for {allowed}, of which the lowest has "
            f"maps of at least {SMALLEST_MAP} voxels per axis: choose another number, or a larger patch_size."
        )
    divisor = np.prod(strides[:levels], axis=0)
    if (np.array(patch) % divisor).any():
        nearest = np.maximum(1, np.round(np.array(patch) / divisor).astype(int)) * divisor
        raise ValueError(
            f"patch_size is {list(patch)}, which {levels} levels cannot halve without rest: give multiples of "
            f"{_x(divisor)}, such as {nearest.tolist()}, or fewer levels."
        )
    changes["patch_size"] = list(patch)
    changes["architecture"] = _with_levels(configuration["architecture"], strides[:levels], kernels[:levels])
    return changes


def nnunet_levels(spacing: tuple[float, ...], patch: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Strides and kernels of as many levels as nnU-Net's planner gives a patch."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, _, _ = get_pool_and_conv_props(spacing, patch, SMALLEST_MAP, 999999)
    return strides, kernels


def _with_levels(architecture: Mapping[str, Any], strides: tuple, kernels: tuple) -> dict[str, Any]:
    """nnU-Net's own network with these levels; what it has for each of them is cut, or goes on as at the lowest."""
    changed = deepcopy(dict(architecture))
    arguments, levels = changed["arch_kwargs"], len(strides)
    arguments |= {
        "n_stages": levels,
        "strides": [list(stride) for stride in strides],
        "kernel_sizes": [list(kernel) for kernel in kernels],
    }
    for names, n in ((OF_EACH_LEVEL, levels), (OF_EACH_UPPER_LEVEL, levels - 1)):
        for name in names:
            values = arguments.get(name)
            if not isinstance(values, list) or not values:
                continue
            while len(values) < n:
                last = values[-1]
                doubled = min(2 * last, max(last, MOST_FEATURES[len(strides[0])]))
                values.append(doubled if name == "features_per_stage" else last)
            arguments[name] = values[:n]
    return changed


def _x(sizes: Any) -> str:
    return "x".join(str(int(n)) for n in sizes)


def planned_table() -> str:
    """The table of ``docs/reference/plans.md``, in Markdown."""
    lines = ["| key | default | allowed | what it does |", "|---|---|---|---|"]
    for name, field in Planned.model_fields.items():
        allowed = allowed_in(field)
        lines.append(f"| `{name}` | `{json.dumps(field.default)}` | {allowed} | {field.description} |")
    return "\n".join(lines)
