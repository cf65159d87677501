"""Cases: what is read of one image, compared over its channels, and labels written on its grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nnunet_lgms.arrays import check_values
from nnunet_lgms.channel_files import check_listed_channels
from nnunet_lgms.files import one_line
from nnunet_lgms.image_files import check_image_file, check_orientation
from nnunet_lgms.runtime.description import Description
from nnunet_lgms.runtime.readers import READERS, Reader


@dataclass
class Case:
    """Samples (C, Z, Y, X) in float32, their spacing (z, y, x) in mm, and where they lie in space, as `reader` says."""

    samples: np.ndarray
    spacing: tuple[float, ...]
    flat: bool
    reader: str = ""
    geometry: Any = None


def read_case(files: Sequence[Path], description: Description) -> Case:
    """One image, a file a channel (or one file of several channels).

    Raises:
        ValueError: a file is missing or unreadable, or channels, their numbers, sizes or places are not what the model
            expects.
    """
    files = [Path(file) for file in files]
    check_listed_channels(files)
    parts, spacings, geometries = zip(*(_read(file, description) for file in files))
    reader = READERS[description.reader]
    for file, part, spacing, geometry in zip(files, parts, spacings, geometries):
        if part.shape != parts[0].shape or not np.allclose(spacing, spacings[0]):
            raise ValueError(
                f"The channels of a case differ: {files[0]} has {parts[0].shape[1:]} voxels of {spacings[0]} mm, "
                f"{file} has {part.shape[1:]} of {spacing}."
            )
        if (distance := _farthest(reader, geometries[0], geometry, part.shape[1:])) > min(spacing) / 2:
            raise ValueError(
                f"The channels of a case lie in different places: voxels of {file} are up to {distance:.4g} mm from "
                f"those of {files[0]}; resample one to the grid of the other."
            )
    samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
    check_channels(len(samples), description, str(files[0]))
    return Case(samples, spacings[0], reader.is_flat(geometries[0]), description.reader, geometries[0])


def check_channels(found: int, description: Description, what: str) -> None:
    """Raises ValueError if an image has another number of channels than the model."""
    names = description.channel_names
    if found != len(names):
        raise ValueError(
            f"{what} gives {found} channel(s), the model expects {len(names)}: {', '.join(names)}; give one file for "
            "each, in this order."
        )


def _read(file: Path, description: Description) -> tuple[np.ndarray, tuple[float, ...], Any]:
    """Samples (C, Z, Y, X), spacing and geometry of one file that is whole and finite."""
    if not file.is_file():
        raise ValueError(f"The image {file} does not exist.")
    check_image_file(file)
    try:
        samples, spacing, geometry = READERS[description.reader].read(file)
    except Exception as error:  # libraries raise whatever they like
        raise ValueError(f"The image {file} cannot be read: {_reason(error)}.") from error
    if not samples.size:
        raise ValueError(f"The image {file} has no voxels: its shape is {samples.shape[1:]}.")
    if not all(0 < mm < np.inf for mm in spacing):
        raise ValueError(f"The image {file} has a spacing of {spacing} mm (z, y, x): correct its header.")
    check_values(samples, f"The image {file}")
    if description.reader == "NaturalImage2DIO":
        check_orientation(file)
    return samples, spacing, geometry


def _reason(error: Exception) -> str:
    """What a library said, on one line, without the places in its source that ITK puts before it."""
    return one_line(str(error).rpartition("ERROR: ")[2].strip() or type(error).__name__).rstrip(".!")


def _farthest(reader: Reader, one: Any, other: Any, shape: tuple[int, ...]) -> float:
    """The largest distance between the corners of two grids of (Z, Y, X) voxels, in mm; 0 without a place in space."""
    affine = reader.affine(one)
    if affine is None:
        return 0.0
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape[::-1]))])
    return float(np.linalg.norm(corners @ (affine - reader.affine(other)).T, axis=1).max())


def write_labels(labels: np.ndarray, case: Case, path: Path) -> None:
    """Write (Z, Y, X) or (Y, X) labels on the grid of the case, whole or not at all.

    Formats of two files, such as `.tif` with its spacing in a JSON file, are written beside their place and moved.

    Raises:
        OSError: they cannot be written.
    """
    labels = labels.astype(np.uint8 if labels.max() < 255 else np.uint16, copy=False)
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            READERS[case.reader].write(labels, case.geometry, Path(folder, path.name))
            for made in sorted(Path(folder).iterdir()):
                os.replace(made, path.with_name(made.name))
    except Exception as error:  # libraries raise whatever they like
        raise OSError(f"{path} cannot be written: {_reason(error)}.") from error
