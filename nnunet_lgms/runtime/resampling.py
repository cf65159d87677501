"""nnU-Net's resampling as matrix products in numpy (see :mod:`nnunet_lgms.splines`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_lgms import splines
from nnunet_lgms.runtime.description import Resampling
from nnunet_lgms.splines import thick_axis

CHUNK = 1 << 22  # numbers that one matrix product writes


def axis_matrices(
    resampling: Resampling,
    old: Sequence[int],
    new: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> list[np.ndarray | None]:
    """:func:`nnunet_lgms.splines.axis_matrices` as a model's description has it."""
    if resampling.function == "no_resampling_hack" or tuple(old) == tuple(new):
        return [None] * len(old)
    thick = thick_axis(resampling.force_separate_z, current_spacing, new_spacing)
    return splines.axis_matrices(old, new, resampling.order, resampling.order_z, thick)


def resample(volume: np.ndarray, matrices: Sequence[np.ndarray | None], clip_axis: int | None = None) -> np.ndarray:
    """Apply one matrix an axis to one channel.

    Args:
        volume: (Z, Y, X) float32; may be changed.
        matrices: from :func:`axis_matrices`.
        clip_axis: skimage clips to the range of what it is given: the volume, or, with thick slices, each slice along
            this axis.

    Returns:
        (Z', Y', X') float32.
    """
    if all(matrix is None for matrix in matrices):
        return volume
    others = tuple(axis for axis in range(3) if axis != clip_axis) if clip_axis is not None else None
    low, high = volume.min(axis=others, keepdims=True), volume.max(axis=others, keepdims=True)
    # In the plane first; across thick slices last, after clipping, as nnU-Net does.
    order = [axis for axis in (0, 1, 2) if axis != clip_axis]
    for axis in order:
        if (matrix := matrices[axis]) is not None:
            volume = along_axis(volume, matrix, axis)
    np.clip(volume, low, high, out=volume)
    if clip_axis is not None and (matrix := matrices[clip_axis]) is not None:
        volume = along_axis(volume, matrix, clip_axis)
    return volume


def along_axis(volume: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """`matrix` (new, old) times every line of `volume` along `axis`; float32, computed in slabs of bounded size."""
    shape = list(volume.shape)
    shape[axis] = len(matrix)
    out = np.empty(shape, np.float32)
    slab_axis = 0 if axis != 0 else 1
    voxels = max(1, int(np.prod(shape)) // shape[slab_axis], volume.size // volume.shape[slab_axis])
    step = max(1, CHUNK // voxels)
    for start in range(0, shape[slab_axis], step):
        slab = (slice(None),) * slab_axis + (slice(start, start + step),)
        lines = np.moveaxis(volume[slab], axis, 0)
        product = matrix @ lines.reshape(len(lines), -1).astype(np.float64)
        out[slab] = np.moveaxis(product.reshape(len(matrix), *lines.shape[1:]), 0, axis)
    return out
