"""Slices of a case as pictures: grey image, coloured labels, pixels as large as their spacing says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: colour of each label, again from the start after the last (Okabe and Ito's palette, told apart by most eyes)
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
PICTURE = 640  # pixels of the longer side
AXES = {"axial": 0, "coronal": 1, "sagittal": 2}


@dataclass(frozen=True)
class Segmented:
    """A case with its labels.

    Attributes:
        image: first channel, or three colours, (C, Z, Y, X) in 0 to 255.
        labels: (Z, Y, X).
        spacing: (z, y, x) in mm.
        flat: whether there is one slice only.
    """

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, ...]
    flat: bool


def to_grey(samples: np.ndarray) -> np.ndarray:
    """(C, Z, Y, X) -> (1 or 3, Z, Y, X) in uint8: three channels are colours, else the first, from its 0.5 to its 99.5
    percentile."""
    if len(samples) == 3 and samples.min() >= 0 and samples.max() <= 255:
        return samples.astype(np.uint8)
    low, high = np.percentile(samples[0], (0.5, 99.5))
    return (np.clip((samples[:1] - low) / max(high - low, 1e-8), 0, 1) * 255).astype(np.uint8)


def fullest_slice(labels: np.ndarray, axis: int) -> int:
    """The slice along `axis` with most labelled voxels; the middle one without any."""
    counts = np.count_nonzero(labels, axis=tuple(a for a in range(3) if a != axis))
    return int(counts.argmax()) if counts.any() else labels.shape[axis] // 2


def draw(case: Segmented, axis: int, index: int, opacity: float) -> np.ndarray:
    """One slice as (height, width, 3) in uint8, labels over it."""
    index = min(max(int(index), 0), case.labels.shape[axis] - 1)
    image, labels = case.image.take(index, axis=axis + 1), case.labels.take(index, axis=axis)
    picture = np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1).astype(np.float32)
    for value in np.unique(labels[labels > 0]):
        mask = labels == value
        picture[mask] = (1 - opacity) * picture[mask] + opacity * np.float32(colour_of(value))
    if axis != 0:  # z goes from foot to head, pictures from top to bottom
        picture = picture[::-1]
    spacing = [s for a, s in enumerate(case.spacing) if a != axis]
    return _enlarge(picture.astype(np.uint8), spacing)


def colour_of(label: int) -> tuple[int, int, int]:
    return COLOURS[(int(label) - 1) % len(COLOURS)]


def _enlarge(picture: np.ndarray, spacing: list[float]) -> np.ndarray:
    """Nearest pixels, so that every voxel can be seen."""
    extent = [n * s for n, s in zip(picture.shape, spacing)]
    size = [max(1, round(PICTURE * e / max(extent))) for e in extent]
    rows, columns = (np.arange(n) * old // n for n, old in zip(size, picture.shape))
    return picture[rows][:, columns]
