"""The plans of the evidence: nnU-Net's, with the paper's batch and Dice in 2D, and the overrides."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from nnunet_lgms.files import atomic_write
from nnunet_lgms.planning.auto_kernels import components_of
from nnunet_lgms.planning.override import override_plans
from nnunet_lgms.planning.plans_files import read_override, read_plans

from .runs import PLANNED, PUBLISHED, RESENC, models_of
from .sets import SETS, DataSet, splits_of

PAPER_BATCH = 16  # of the paper's 2D script
PAPER_LEVELS = 5


def evidence_plans(plans: dict[str, Any], configuration: str, name: str = PLANNED) -> dict[str, Any]:
    """nnU-Net's plans under the evidence's name; in 2D with the paper's batch of 16 and its Dice per sample.

    nnU-Net would take a batch of 32 for BUSI, and one Dice over the whole batch.
    """
    new = deepcopy(plans)
    new["plans_name"] = name
    if len(new["configurations"][configuration]["patch_size"]) == 2:
        new["configurations"][configuration] |= {"batch_size": PAPER_BATCH, "batch_dice": False}
    return new


def published_levels(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The same with the five levels of the published network in place of those that nnU-Net plans."""
    new = deepcopy(plans)
    new["plans_name"] = PUBLISHED
    arguments = new["configurations"][configuration]["architecture"]["arch_kwargs"]
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        arguments[key] = arguments[key][:PAPER_LEVELS]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: PAPER_LEVELS - 1]
    arguments["n_stages"] = len(arguments["strides"])
    return new


def write_plans(preprocessed: Path, dataset: str) -> list[str]:
    """All plans that the stages need of a dataset, beside nnU-Net's own; their names."""
    row = _row(dataset)
    models, configuration = models_of(row).values(), row.configuration
    planned = evidence_plans(read_plans(dataset, "nnUNetPlans"), configuration)
    residual = evidence_plans(read_plans(dataset, "nnUNetResEncUNetMPlans"), configuration, RESENC)
    bases = {PLANNED: planned, PUBLISHED: published_levels(planned, configuration), RESENC: residual}
    written = {}
    for model in models:
        plans = bases[model.plans]
        if model.override is not None:
            override, measure = read_override(model.override), lambda plans=plans: components_of(dataset, plans)
            plans = override_plans(plans, override, model.plans_name, [configuration], measure)
        written[model.plans_name] = plans
    for name, plans in written.items():
        with atomic_write(preprocessed / dataset / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(plans, indent=4) + "\n", "utf-8")
    return list(written)


def write_splits(preprocessed: Path, dataset: str, data: Path | None) -> None:
    """The splits of `sets.py`; without the data, those that are there already."""
    file = preprocessed / dataset / "splits_final.json"
    if data is None:
        if not file.is_file():
            raise ValueError(f"There is no {file}: name the folder of the data (--data), from which it is made.")
        return
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(splits_of(_row(dataset), data), indent=1) + "\n")


def _row(dataset: str) -> DataSet:
    return next(row for row in SETS.values() if row.name == dataset)
