"""Whether predictions in a folder are of the model that is to go on with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lgms.dataset_json import read_dataset_json
from nnunet_lgms.files import atomic_write, read_json, shown

#: nnU-Net's file of what a call was given, which does not say of what model; that stands in it under our name
ARGUMENTS, KEY = "predict_from_raw_data_args.json", "nnunet_lgms"
DATASET = ("labels", "regions_class_order", "channel_names", "modality", "file_ending")


def write_model(folder: Path, model: Mapping[str, Any]) -> None:
    """Adds trainer, configuration, folds and checkpoint to what nnU-Net's predictor writes into its output folder."""
    with atomic_write(folder / ARGUMENTS) as temporary:
        temporary.write_text(json.dumps((_table(folder / ARGUMENTS) or {}) | {KEY: model}, indent=4))


def check_same_model(
    folder: Path, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], model: Mapping[str, Any] | None
) -> None:
    """What a folder of predictions says of their model is true of this one.

    Beside the predictions, nnU-Net writes plans and description of the data set, and this package the rest. What is not
    there, or being written by another part of the same call, is not compared.

    Args:
        folder: of the predictions.
        plans: of the model.
        dataset_json: of the model.
        model: its trainer, configuration, folds and checkpoint; None if nobody knows them.

    Raises:
        ValueError: they differ; one sentence with the first difference.
    """
    name = model and model["configuration"]
    then = {
        "plans.json": _of_plans(_table(folder / "plans.json"), name),
        "dataset.json": _of_dataset(_dataset(folder / "dataset.json")),
        ARGUMENTS: (_table(folder / ARGUMENTS) or {}).get(KEY),
    }
    now = {"plans.json": _of_plans(plans, name), "dataset.json": _of_dataset(dataset_json), ARGUMENTS: model}
    for file, before in then.items():
        after = now[file]
        if not isinstance(before, dict) or after is None:
            continue
        for entry in {**before, **after}:
            if _text(before.get(entry)) != _text(after.get(entry)):
                raise ValueError(
                    f"{folder} holds predictions of another model: its {file} has {entry} "
                    f"{shown(before.get(entry))}, and this model has {shown(after.get(entry))}; name another folder, "
                    "or predict all anew without --continue_prediction (in Python: with overwrite=True)."
                )


def _of_plans(plans: Mapping[str, Any] | None, configuration: str | None) -> dict[str, Any] | None:
    """Name → value: of all configurations only the one that predicts, as others may be added later."""
    if plans is None:
        return None
    found = {key: value for key, value in plans.items() if key != "configurations"}
    if configuration is not None:
        try:
            own = PlansManager(deepcopy(dict(plans))).get_configuration(configuration).configuration
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError):
            return found  # there is none of this name
        found |= {"configuration": configuration, **own}
    return found


def _of_dataset(description: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return description and {key: description.get(key) for key in DATASET}


def _dataset(path: Path) -> dict[str, Any] | None:
    try:
        return read_dataset_json(path)
    except ValueError:
        return None


def _table(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _text(value: Any) -> str:
    """By which NaN is the same as NaN, and a tuple the same as the list that JSON makes of it."""
    return json.dumps(value, sort_keys=True)
