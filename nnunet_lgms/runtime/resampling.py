"""nnU-Net's resampling (skimage's `resize` and scipy's `map_coordinates` with edge values) as matrix products.

Spline interpolation on a grid is linear and separable: along one axis it is a matrix (new size, old size), which a
matrix product applies to all lines of a volume at once. Order 3 includes scipy's prefilter, a tridiagonal system.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np

from nnunet_lgms.runtime.description import Resampling

ANISOTROPY = 3  # nnU-Net's ANISO_THRESHOLD: spacings that differ by more are thick slices
EDGE = 12  # samples that scipy adds at either end before its prefilter
CHUNK = 1 << 22  # numbers that one matrix product writes
LARGEST_AXIS, LARGEST_VOLUME = 1 << 13, 1 << 31  # voxels that resampling may make of an image


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels per axis after resampling from `spacing` to `target` (mm).

    Raises:
        ValueError: an axis would vanish, or become larger than anybody can mean; an image may keep its own size.
    """
    exact = [i / j * k for i, j, k in zip(spacing, target, shape)]
    # after rounding half to even, as nnU-Net does, at least one voxel; NaN is refused as well
    fits = all(0.5 < size <= max(old, LARGEST_AXIS) for size, old in zip(exact, shape))
    if not fits or prod(exact) > max(prod(shape), LARGEST_VOLUME):
        raise ValueError(
            f"The image of {_by(shape)} voxels has a spacing of {_by(spacing)} mm and would have "
            f"{_by(exact)} voxels at the model's {_by(target)} mm: allowed are 1 to {LARGEST_AXIS} an axis and "
            f"{LARGEST_VOLUME:.1e} in all; correct the spacing in the image's header."
        )
    return tuple(int(round(size)) for size in exact)


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def thick_axis(resampling: Resampling, current: Sequence[float], new: Sequence[float]) -> int | None:
    """The axis across thick slices that nnU-Net resamples apart, or None."""

    def coarsest(spacing):
        axes = [i for i, s in enumerate(spacing) if max(spacing) / s == 1]
        return axes[0] if len(axes) == 1 else None

    def thick(spacing):
        return max(spacing) / min(spacing) > ANISOTROPY

    if resampling.force_separate_z is not None:
        return coarsest(current) if resampling.force_separate_z else None
    if thick(current):
        return coarsest(current)
    return coarsest(new) if thick(new) else None


def axis_matrices(
    resampling: Resampling,
    old: Sequence[int],
    new: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
) -> list[np.ndarray | None]:
    """One matrix (new, old) for each axis, None where nothing changes.

    Raises:
        ValueError: the spline order is not 0, 1 or 3.
    """
    if resampling.function == "no_resampling_hack" or tuple(old) == tuple(new):
        return [None] * len(old)
    thick = thick_axis(resampling, current_spacing, new_spacing)
    orders = [resampling.order_z if axis == thick else resampling.order for axis in range(len(old))]
    return [None if o == n else _matrix(o, n, order) for o, n, order in zip(old, new, orders)]


@lru_cache(maxsize=8)
def _matrix(old: int, new: int, order: int) -> np.ndarray:
    """(new, old) weights of spline interpolation with the centres of both grids' ends aligned, edge values outside."""
    positions = old / new * (np.arange(new) + 0.5) - 0.5
    rows = np.arange(new)
    matrix = np.zeros((new, old))
    if order == 0:
        matrix[rows, np.clip(np.floor(positions + 0.5).astype(int), 0, old - 1)] = 1
    elif order == 1:
        positions = np.clip(positions, 0, old - 1)
        low = np.minimum(np.floor(positions).astype(int), max(old - 2, 0))
        high = np.minimum(low + 1, old - 1)
        np.add.at(matrix, (rows, low), 1 - (positions - low))
        np.add.at(matrix, (rows, high), positions - low)
    elif order == 3:
        matrix = _cubic(positions + EDGE, old)
    else:
        raise ValueError(f"Resampling of order {order} is not there: plans may have order 0, 1 or 3.")
    return matrix


def _cubic(positions: np.ndarray, old: int) -> np.ndarray:
    """Cubic B-spline through the samples, which are continued by their edges; `positions` count from the first edge."""
    padded = old + 2 * EDGE
    # Coefficients c with (c[i-1] + 4 c[i] + c[i+1]) / 6 = sample i, mirrored about both ends.
    system = np.diag(np.full(padded, 4 / 6)) + np.diag(np.full(padded - 1, 1 / 6), 1)
    system += np.diag(np.full(padded - 1, 1 / 6), -1)
    system[0, 1] = system[-1, -2] = 2 / 6
    start = np.floor(positions).astype(int) - 1
    t = positions - np.floor(positions)
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    basis = np.zeros((len(positions), padded))
    for tap, weight in enumerate(weights):
        basis[np.arange(len(positions)), start + tap] += weight
    on_padded = np.linalg.solve(system.T, basis.T).T
    matrix = on_padded[:, EDGE : EDGE + old].copy()
    matrix[:, 0] += on_padded[:, :EDGE].sum(1)
    matrix[:, -1] += on_padded[:, EDGE + old :].sum(1)
    return matrix


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
        if matrices[axis] is not None:
            volume = along_axis(volume, matrices[axis], axis)
    np.clip(volume, low, high, out=volume)
    if clip_axis is not None and matrices[clip_axis] is not None:
        volume = along_axis(volume, matrices[clip_axis], clip_axis)
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
