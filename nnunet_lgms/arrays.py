"""Images as arrays, checked before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

FLAT_SPACING = 999.0  # nnU-Net's spacing across a flat image, of no meaning
LARGEST = 1e18  # nnU-Net's variance of larger values is infinite, and makes every voxel 0


def checked_image(samples: np.ndarray, spacing: Sequence[float] | None) -> tuple[np.ndarray, tuple[float, ...], bool]:
    """An image as networks are given it.

    Args:
        samples: (C, Y, X) or (C, Z, Y, X), whole or real numbers.
        spacing: of the axes, (y, x) or (z, y, x) in mm; may be left out for (C, Y, X).

    Returns:
        samples (C, Z, Y, X) in float32, spacing (z, y, x), and whether the image is flat.

    Raises:
        ValueError: the array or its spacing is something else; one sentence.
    """
    if isinstance(samples, np.ma.MaskedArray):
        raise ValueError("The image is a masked array, and its mask would be ignored: give image.filled(VALUE).")
    if samples.dtype.kind not in "biuf":
        raise ValueError(f"The image holds {samples.dtype} values: give whole or real numbers.")
    if samples.ndim not in (3, 4) or not samples.size:
        raise ValueError(f"The image has shape {samples.shape}, expected (C, Y, X) or (C, Z, Y, X).")
    if samples.ndim == 4 and spacing is None:
        raise ValueError("A volume needs its spacing, (z, y, x) in mm.")
    spacing = _checked_spacing((1.0, 1.0) if spacing is None else spacing, samples.ndim - 1)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
        samples = samples.astype(np.float32)
    check_values(samples, "The image", not_finite="NaN, infinity or more than float32 can hold")
    if flat := samples.ndim == 3:
        samples, spacing = samples[:, None], (FLAT_SPACING, *spacing)
    return samples, spacing, flat


def check_values(samples: np.ndarray, name: str, not_finite: str = "NaN or infinity") -> None:
    """Raises ValueError if an image (C, ...) holds what would make every label background.

    Args:
        samples: real numbers.
        name: the subject of the sentence.
        not_finite: what it may hold that is not finite here.
    """
    if all(-LARGEST < channel.min() and channel.max() < LARGEST for channel in samples):  # NaN lies between nothing
        return
    if not all(np.isfinite(channel).all() for channel in samples):
        raise ValueError(f"{name} holds {not_finite}, which would make every label background: clean it first.")
    raise ValueError(
        f"{name} holds values beyond {LARGEST:g}, which would make every label background: replace them; "
        "they stand for padding, maybe."
    )


def is_flat(properties: Mapping[str, Any]) -> bool:
    """Whether nnU-Net's reader gave the image its first axis: pictures, and medical images of two axes."""
    if "sitk_stuff" in properties:
        return len(properties["sitk_stuff"]["spacing"]) == 2
    return "nibabel_stuff" not in properties and properties["spacing"][0] == FLAT_SPACING


def _checked_spacing(given: Sequence[float], axes: int) -> tuple[float, ...]:
    try:
        spacing = tuple(map(float, given))
    except (TypeError, ValueError):
        raise ValueError(f"The spacing {given!r} is no list of {axes} numbers of mm.") from None
    if len(spacing) != axes:
        raise ValueError(f"The spacing {spacing} has {len(spacing)} axes, the image has {axes}.")
    if not all(isfinite(mm) and mm > 0 for mm in spacing):
        raise ValueError(f"The spacing {spacing} must be of positive numbers of mm.")
    return spacing
