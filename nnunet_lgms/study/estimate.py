"""GPU hours of a study, from the measured steps of its profiles."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nnunet_lgms.study.graph import Graph, Model
from nnunet_lgms.study.results import LGMSNET, Results, network_profile

ITERATIONS, VALIDATION_ITERATIONS = 250, 50
"""Steps of an epoch, nnU-Net's and ours."""


@dataclass(frozen=True)
class Estimate:
    """Hours of the trainings that are still to be done.

    Args:
        hours: of those that could be estimated.
        known: how many these are.
        unknown: variants and data sets that could not be, with their number of trainings.
    """

    hours: float
    known: int
    unknown: dict[str, int]


def estimate_hours(graph: Graph) -> Estimate:
    """Sums up the trainings that are not finished, half-trained ones as if they were not begun."""
    results = Results(graph)
    hours, known, unknown = 0.0, 0, {}
    for model in results.models():
        left = sum(
            not results.path(graph.trained(run, model.dataset, model.name, fold)).is_file()
            for run, fold in results.folds(model)
        )
        if not left:
            continue
        alone = hours_of(results, model)
        if alone is None:
            key = f"{model.variant} on {model.dataset} {model.configuration}"
            unknown[key] = unknown.get(key, 0) + left
        else:
            hours, known = hours + left * alone, known + left
    return Estimate(hours, known, unknown)


def hours_of(results: Results, model: Model) -> float | None:
    """One training: its epochs' steps forward and backward, and its validation steps forward.

    Waiting for data, compiling and the prediction of the validation cases at the end come on top. None where there is
    no profile with measured steps, or the epochs are not known.
    """
    network = network_profile(results.path(results.graph.profile(model)), model.trainer)
    epochs = epochs_of(model.trainer, results.graph.study.variants[model.variant].epochs)
    steps = (network or {}).get("steps", {})
    if epochs is None or any("ms" not in steps.get(kind, {}) for kind in ("training", "inference")):
        return None
    validation = VALIDATION_ITERATIONS * network["batch_size"] * steps["inference"]["ms"]
    return epochs * (ITERATIONS * steps["training"]["ms"] + validation) / 3.6e6


def epochs_of(trainer: str, given: int | None) -> int | None:
    """What the study says, or the trainer's name; nnU-Net's own have 1000 and the paper's recipe 500."""
    if given:
        return given
    if named := re.search(r"_(\d+)epochs?\b", trainer):
        return int(named[1])
    if trainer in ("nnUNetTrainer", "nnUNetTrainerLGMSNet", "nnUNetTrainerLGMSNet_nnUNetDA"):
        return 500 if LGMSNET in trainer else 1000
    return None
