"""What only probabilities show: calibration; and surface Dice over the distance that it forgives.

nnU-Net's `--save_probabilities` writes `CASE.npz` beside `CASE.nii.gz`: (heads, Z, Y, X), a head a label of a softmax,
or a head a region of a sigmoid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_lgms.evaluation.evaluate import Evaluation
from nnunet_lgms.evaluation.metrics import surface_dice

N_BINS = 10
LEAST = 0.01
"""Voxels of a lower probability are background that nobody asks about."""

FORGIVEN = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Times the tolerance of the evaluation's NSD."""


def probability_files(evaluation: Evaluation, model: str) -> dict[str, Path] | None:
    """Case → file of its probabilities; None unless all cases of a model have one."""
    files = {case: evaluation.models[model] / f"{case}.npz" for case in evaluation.cases}
    return files if all(file.is_file() for file in files.values()) else None


def calibration(evaluation: Evaluation, model: str) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Label → (mean predicted probability, share of voxels that are the label), in bins of the former.

    None if a model's files have other heads than its labels.
    """
    regions = evaluation.labels.regions
    sums = {name: np.zeros((3, N_BINS)) for name in regions}  # voxels, probabilities, voxels of the label
    for case, file in (probability_files(evaluation, model) or {}).items():
        _, reference = evaluation.read_pair(model, case)
        with np.load(file) as content:
            heads = content["probabilities"]
        heads = heads.reshape(len(heads), *reference.labels.shape) if heads[0].size == reference.labels.size else None
        if heads is None:
            return None
        counted = np.ones(reference.labels.shape, bool)
        if evaluation.labels.ignore is not None:
            counted = reference.labels != evaluation.labels.ignore
        for i, (name, values) in enumerate(regions.items()):
            probability = _of_region(heads, values, i, len(regions), max(evaluation.labels.values))
            if probability is None:
                return None
            asked = counted & (probability >= LEAST)
            bins = np.minimum((probability[asked] * N_BINS).astype(int), N_BINS - 1)
            hits = np.isin(reference.labels[asked], values)
            for row, weights in enumerate((None, probability[asked], hits)):
                sums[name][row] += np.bincount(bins, weights, N_BINS)
    with np.errstate(invalid="ignore"):
        return {name: (p / n, hits / n) for name, (n, p, hits) in sums.items()}


def _of_region(heads: np.ndarray, values: tuple[int, ...], i: int, n_regions: int, top: int) -> np.ndarray | None:
    if len(heads) > top:  # softmax: a head a label, background first
        return heads[list(values)].sum(axis=0)
    return heads[i] if len(heads) == n_regions else None


def surface_dice_curve(evaluation: Evaluation, model: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label → (tolerances, mean NSD over cases)."""
    unit = evaluation.tolerance or 1.0
    tolerances = [factor * unit for factor in FORGIVEN]
    found: dict[str, list[list[float]]] = {name: [] for name in evaluation.labels.regions}
    for case in evaluation.cases:
        prediction, reference = evaluation.read_pair(model, case)
        for name, values in evaluation.labels.regions.items():
            pair = np.isin(prediction.labels, values), np.isin(reference.labels, values)
            if pair[0].any() and pair[1].any():
                found[name].append(surface_dice(*pair, prediction.spacing, tolerances))
            elif pair[0].any() or pair[1].any():
                found[name].append([0.0] * len(tolerances))
    return {name: (np.array(tolerances), np.mean(rows, axis=0)) for name, rows in found.items() if rows}
