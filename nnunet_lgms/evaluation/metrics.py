"""Overlap and surface metrics of two binary masks.

Distances come from MONAI: HD95 is its `compute_hausdorff_distance(percentile=95)`, NSD its
`compute_surface_dice(use_subvoxels=True)`, which follows Nikolov et al. (arXiv 1809.04430).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

METRICS = ("Dice", "IoU", "HD95", "NSD", "Precision", "Recall")
LOWER_IS_BETTER = frozenset({"HD95"})

CONVENTION = (
    "If reference and prediction are both empty, there was nothing to find: all metrics are undefined (as nnU-Net's "
    "Dice) and the case does not enter their means. If only one of them is empty, Dice, IoU and NSD are 0 and HD95 is "
    "the diagonal of the image. Precision is undefined for an empty prediction, recall for an empty reference."
)


def compute_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """All metrics of one region in one case; undefined ones are NaN, see `CONVENTION`.

    Args:
        prediction: bool, (Y, X) or (Z, Y, X).
        reference: bool, the same shape.
        spacing: distance of neighbouring samples along each axis, in mm (pixels where a format knows no mm).
        tolerance: surface distance that NSD forgives, in the same unit.
    """
    tp = int(np.count_nonzero(prediction & reference))
    n_pred, n_ref = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    metrics = dict.fromkeys(METRICS, float("nan"))
    if n_pred:
        metrics["Precision"] = tp / n_pred
    if n_ref:
        metrics["Recall"] = tp / n_ref
    if n_pred or n_ref:
        metrics["Dice"] = 2 * tp / (n_pred + n_ref)
        metrics["IoU"] = tp / (n_pred + n_ref - tp)
        metrics["HD95"], metrics["NSD"] = _surface_metrics(prediction, reference, spacing, tolerance)
    return metrics


def _surface_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    if not prediction.any() or not reference.any():
        return float(np.linalg.norm(np.multiply(prediction.shape, spacing))), 0.0
    from nnunet_lgms.evaluation.requirement import monai_metrics

    compute_hausdorff_distance, compute_surface_dice = monai_metrics()
    pair = _cut_out(prediction, reference)
    spacing = [float(s) for s in spacing]
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(
        *pair, class_thresholds=[tolerance], include_background=True, spacing=spacing, use_subvoxels=True
    )
    return float(hd95), float(nsd)


def surface_dice(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerances: Sequence[float]
) -> list[float]:
    """NSD of two masks, neither of them empty, for several distances that it forgives."""
    from nnunet_lgms.evaluation.requirement import monai_metrics

    pair = [mask.expand(-1, len(tolerances), *mask.shape[2:]) for mask in _cut_out(prediction, reference)]
    nsd = monai_metrics()[1](
        *pair,
        class_thresholds=list(tolerances),
        include_background=True,
        spacing=[float(s) for s in spacing],
        use_subvoxels=True,
    )
    return [float(value) for value in nsd[0]]


def _cut_out(prediction: np.ndarray, reference: np.ndarray) -> list:
    """Both masks within what they cover, (1, 1, …) as tensors."""
    import torch

    box = _bounding_box(prediction | reference)
    # one empty voxel around: a mask that touches the border of the image ends there
    return [torch.from_numpy(np.pad(mask[box], 1))[None, None] for mask in (prediction, reference)]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(occupied[0], occupied[-1] + 1))
    return tuple(box)
