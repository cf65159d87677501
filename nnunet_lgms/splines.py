"""Resampling from one grid to another, as one matrix an axis.

nnU-Net resamples by skimage's `resize` with edge values. Spline interpolation on a grid is linear and separable: along
one axis it is a matrix (new size, old size), which a matrix product applies to all lines of a volume at once. Order 3
includes scipy's prefilter, a tridiagonal system. Needs numpy alone: prediction with PyTorch and the runtime without it
resample by the same matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np

ANISOTROPY = 3  # nnU-Net's ANISO_THRESHOLD: spacings that differ by more are thick slices
EDGE = 12  # samples that scipy adds at either end before its prefilter
ORDERS = (0, 1, 3)
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


def thick_axis(force_separate_z: bool | None, current: Sequence[float], new: Sequence[float]) -> int | None:
    """The axis across thick slices that nnU-Net resamples apart, or None.

    Args:
        force_separate_z: of the plans; None: where the spacings of one of the grids differ by more than ``ANISOTROPY``.
        current: spacing (z, y, x) of the grid that there is, in mm.
        new: spacing of the grid that is wanted.
    """

    def coarsest(spacing):
        axes = [i for i, s in enumerate(spacing) if max(spacing) / s == 1]
        return axes[0] if len(axes) == 1 else None

    def thick(spacing):
        return max(spacing) / min(spacing) > ANISOTROPY

    if force_separate_z is not None:
        return coarsest(current) if force_separate_z else None
    if thick(current):
        return coarsest(current)
    return coarsest(new) if thick(new) else None


def axis_matrices(
    old: Sequence[int], new: Sequence[int], order: int, order_z: int, thick: int | None
) -> list[np.ndarray | None]:
    """One matrix (new, old) for each axis, None where nothing changes.

    Args:
        old: voxels of the grid that there is.
        new: voxels of the grid that is wanted.
        order: of the spline.
        order_z: of the spline along the axis `thick`.
        thick: what :func:`thick_axis` says.

    Raises:
        ValueError: the spline order is not one of ``ORDERS``.
    """
    orders = [order_z if axis == thick else order for axis in range(len(old))]
    return [None if o == n else spline_matrix(o, n, order) for o, n, order in zip(old, new, orders)]


@lru_cache(maxsize=16)
def spline_matrix(old: int, new: int, order: int) -> np.ndarray:
    """(new, old) weights of spline interpolation with the centres of both grids' ends aligned, edge values outside.

    Raises:
        ValueError: the spline order is not one of ``ORDERS``.
    """
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
