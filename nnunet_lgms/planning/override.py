"""New plans from old: the same data, another LGMSNet, and another patch, batch or number of levels if asked for."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.config import KEY, LGMSSettings, merge
from nnunet_lgms.config.planned import Planned, replanned
from nnunet_lgms.config.resolve import Topology, lms_levels, network_kwargs, without_effect
from nnunet_lgms.config.settings import AUTO, READABLE_SINCE
from nnunet_lgms.files import shown
from nnunet_lgms.planning.auto_kernels import Components, choose_kernels

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def override_plans(
    plans: dict[str, Any],
    override: Mapping[str, Any],
    plans_name: str,
    configurations: Sequence[str] | None,
    measure: Callable[[], Components],
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """A copy of ``plans``, named ``plans_name``, with ``override`` in its configurations.

    ``data_identifier`` stays, so the preprocessed data is shared.

    Args:
        plans: nnU-Net's plans.
        override: as in its file: settings under the key ``"lgmsnet"``, and the keys of :class:`Planned`.
        plans_name: name of the new plans.
        configurations: those to change; None for all that do not inherit from another one (those inherit the change).
        measure: gives the components of the dataset; called at most once, if kernels are "auto".
        say: takes a line of text for the user.

    Raises:
        ValueError: the override is invalid or does not fit one of the configurations, which the message names.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    given, planned = override.get(KEY, {}), Planned.from_override(override)
    LGMSSettings.from_plan(given)
    manager = PlansManager(deepcopy(plans))
    new = deepcopy(plans)
    new["plans_name"] = plans_name
    measure = cache(measure)

    def changed(name: str, say: Callable[[str], None]) -> dict[str, Any]:
        return _changed(resolved(manager, name), given, planned, measure, name, say)

    def fits(name: str) -> bool:
        try:
            changed(name, say=lambda line: None)
        except ValueError:
            return False
        return True

    for name in _targets(plans, configurations):
        try:
            changes = changed(name, say)
        except ValueError as error:
            others = [] if configurations else [c for c in _targets(plans, None) if c != name and fits(c)]
            hint = f" To leave {name} as it is, add -c {shlex.join(others)}." if others else ""
            raise ValueError(f"{name}: {error}{hint}") from None
        new["configurations"][name] |= changes
    return new


def _changed(
    configuration: Mapping[str, Any],
    given: Mapping[str, Any],
    planned: Planned,
    measure: Callable[[], Components],
    name: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The keys of a configuration that an override changes, with values that a network can be built from."""
    changes = replanned(configuration, planned)
    topology = Topology.of({**configuration, **changes})
    try:
        base = LGMSSettings.from_plan(configuration.get(KEY, {})).explicit()
    except ValueError as error:
        raise ValueError(f"in the plans to start from, {error}") from None
    settings = LGMSSettings.from_plan(merge(base, given))
    if settings.lms_kernels == AUTO:
        components = measure()
        say(f"{name}: kernels from {len(components.edges)} objects in {components.n_cases} cases")
        settings = with_auto_kernels(settings, topology, components, say)
    build_on_meta(settings, topology)
    for remark in [*without_effect(settings, topology, given), *_beyond_images(configuration, changes)]:
        say(f"{name}: {remark}")
    return {**changes, KEY: stored(settings)} if given or base else changes


def _beyond_images(configuration: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """A remark on a new patch that is larger than the median image, which nnU-Net would not plan."""
    patch = changes.get("patch_size", [])
    image = [round(n) for n in configuration.get("median_image_size_in_voxels", [])][-len(patch) :]
    if not patch or not any(p > n for p, n in zip(patch, image, strict=False)):
        return []
    sizes = ("x".join(map(str, size)) for size in (patch, image))
    return ["the patch of {} is larger than the median image, {}: what lies beyond is filled up.".format(*sizes)]


def with_auto_kernels(
    settings: LGMSSettings, topology: Topology, components: Components, say: Callable[[str], None]
) -> LGMSSettings:
    """``settings`` with "auto" replaced by what the dataset's objects suggest, told line by line."""
    chosen = choose_kernels(components, topology, lms_levels(settings, topology))
    for level in chosen:
        say(f"  {level}")
    kernels = {str(level.level): [list(k) for k in level.kernels] for level in chosen}
    # without an LMS level there is nothing to choose
    return LGMSSettings.from_plan({**settings.explicit(), "lms_kernels": kernels or [3, 5, 7, 9]})


def build_on_meta(settings: LGMSSettings, topology: Topology, input_channels: int = 1, num_classes: int = 2) -> LGMSNet:
    """The network without its weights: to see whether it can be built, and what it costs."""
    conv_op = nn.Conv2d if topology.dim == 2 else nn.Conv3d
    with torch.device("meta"):
        return LGMSNet(
            input_channels,
            num_classes,
            conv_op=conv_op,
            deep_supervision=settings.deep_supervision,
            **network_kwargs(settings, topology),
        )


def stored(settings: LGMSSettings) -> dict[str, Any]:
    """The settings as they go into a plans file, with the version that can read them."""
    return {**settings.explicit(), "requires": READABLE_SINCE}


def resolved(manager: PlansManager, name: str) -> dict[str, Any]:
    """A configuration with what it inherits; plans of nnU-Net's first releases get today's names.

    Raises:
        ValueError: nnU-Net cannot read it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net's, that the plans are old
            return manager.get_configuration(name).configuration
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"nnU-Net cannot read the configuration ({reason}): plan again.") from None


def _targets(plans: dict[str, Any], configurations: Sequence[str] | None) -> list[str]:
    there = plans["configurations"]
    if configurations:
        unknown = [name for name in configurations if name not in there]
        if unknown:
            raise ValueError(f"The plans have no configuration {shown(unknown[0])}: there are {', '.join(there)}.")
        return list(configurations)
    return [name for name, content in there.items() if "inherits_from" not in content or KEY in content]
