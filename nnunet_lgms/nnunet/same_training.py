"""Whether plans are those that a model's weights were trained with, before they are written over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lgms.config import KEY, LGMSSettings
from nnunet_lgms.files import read_json, shown

#: of a configuration, what weights depend on; batch and names of folders are not among them
CONFIGURATION = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
CONFIGURATION += ("architecture", "previous_stage")
RESAMPLING = tuple(f"resampling_fn_{what}{kwargs}" for what in ("data", "seg") for kwargs in ("", "_kwargs"))
PLANS = ("image_reader_writer", "transpose_forward", "transpose_backward")
DATASET = ("labels", "regions_class_order", "channel_names", "modality", "file_ending")
#: of the data set's intensities, what CTNormalization takes
INTENSITIES = ("percentile_00_5", "percentile_99_5", "mean", "std")


def check_same_training(
    model_folder: Path, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], configuration: str
) -> None:
    """What a model folder says of its weights is what plans and description say, in all that weights depend on.

    Args:
        model_folder: with the ``plans.json`` and ``dataset.json`` that its weights were trained with; without them
            there is nothing to compare.
        plans: nnU-Net's plans.
        dataset_json: nnU-Net's description of the data set.
        configuration: the one that is trained.

    Raises:
        ValueError: they differ; the message names the first difference.
    """
    for file, now, of in (
        ("plans.json", plans, lambda content: _of_plans(content, configuration)),
        ("dataset.json", dataset_json, _of_dataset),
    ):
        path = model_folder / file
        if not path.is_file():
            continue
        then = read_json(path)
        try:
            before, after = of(then), of(now)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be compared with the plans of this training ({error!r}): move {model_folder} away, or "
                "put back the plans that it was trained with."
            ) from None
        for name in {**before, **after}:
            if not _same(before.get(name), after.get(name)):
                raise ValueError(
                    f"{model_folder} was trained with {name} {shown(before.get(name))}, and it is "
                    f"{shown(after.get(name))} now: put back what it was trained with ({path}), or train under another "
                    "name of plans or trainer."
                )


def _of_plans(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Name → value of what weights depend on."""
    resolved = PlansManager(deepcopy(dict(plans))).get_configuration(name).configuration
    found = {key: resolved.get(key) for key in (*CONFIGURATION, *RESAMPLING)}
    found |= {key: plans.get(key) for key in PLANS}
    settings = LGMSSettings.from_plan(resolved.get(KEY) or {})
    settings = settings.model_dump(mode="json", exclude={"requires"}, warnings=False)
    found |= {f"{KEY}.{key}": value for key, value in settings.items()}
    properties = plans.get("foreground_intensity_properties_per_channel") or {}
    for channel, scheme in enumerate(resolved.get("normalization_schemes") or ()):
        if scheme == "CTNormalization":
            own = properties.get(str(channel)) or {}
            found |= {f"{key} of channel {channel}": own.get(key) for key in INTENSITIES}
    return json.loads(json.dumps(found))


def _of_dataset(description: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({key: description.get(key) for key in DATASET}))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
