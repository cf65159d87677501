"""Reading images and writing labels as nnU-Net's readers do, through SimpleITK alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_lgms.files import atomic_write, check_gzip, nifti_is_finite, one_line
from nnunet_lgms.runtime.description import Description

FLAT_SPACING = 999.0  # nnU-Net's spacing across a flat image, of no meaning


@dataclass
class Case:
    """Samples (C, Z, Y, X) in float32, their spacing (z, y, x) in mm, and where they lie in space."""

    samples: np.ndarray
    spacing: tuple[float, ...]
    flat: bool
    geometry: tuple | None = None


def read_case(files: Sequence[Path], description: Description) -> Case:
    """One image, a file a channel (or one file of several channels).

    Raises:
        ValueError: a file is missing or unreadable, or channels or sizes are not what the model expects.
    """
    parts, geometries = [], []
    for file in files:
        part, spacing, geometry = _read(Path(file), description)
        parts.append(part)
        geometries.append((part.shape[1:], spacing, geometry))
    for file, part, (shape, spacing, _) in zip(files, parts, geometries):
        if shape != geometries[0][0] or spacing != geometries[0][1]:
            raise ValueError(
                f"The channels of a case differ: {files[0]} has {geometries[0][0]} voxels of {geometries[0][1]} mm, "
                f"{file} has {shape} of {spacing}."
            )
        if not (all(np.isfinite(plane).all() for plane in part) and nifti_is_finite(Path(file))):
            raise ValueError(f"The image {file} holds NaN or infinity: correct it before it is predicted.")
    samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
    _, spacing, geometry = geometries[0]
    check_channels(len(samples), description, str(files[0]))
    flat = geometry is None or len(geometry[0]) == 2
    return Case(samples, spacing, flat, geometry)


def check_channels(found: int, description: Description, what: str) -> None:
    """Raises ValueError if an image has another number of channels than the model."""
    names = description.channel_names
    if found != len(names):
        raise ValueError(
            f"{what} gives {found} channel(s), the model expects {len(names)}: {', '.join(names)}; give one file for "
            "each, in this order."
        )


def _read(file: Path, description: Description) -> tuple[np.ndarray, tuple[float, ...], tuple | None]:
    if not file.is_file():
        raise ValueError(f"The image {file} does not exist.")
    check_gzip(file)
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise ValueError(f"The image {file} cannot be read ({one_line(error)}).") from error
    samples = sitk.GetArrayFromImage(image)
    geometry = (image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    colours = image.GetNumberOfComponentsPerPixel() > 1
    del image  # two copies of a large volume are enough
    samples = samples.astype(np.float32)
    if description.reader == "NaturalImage2DIO":
        if samples.ndim != (3 if colours else 2):
            raise ValueError(f"The image {file} has {samples.ndim} axes, the model takes flat images.")
        return (np.moveaxis(samples, -1, 0) if colours else samples[None])[:, None], (FLAT_SPACING, 1.0, 1.0), None
    if colours:
        raise ValueError(f"The image {file} has several values a voxel: give one file for each channel.")
    spacing = tuple(abs(s) for s in geometry[0][::-1])
    if samples.ndim == 2:
        return samples[None, None], (max(spacing) * FLAT_SPACING, *spacing), geometry
    if samples.ndim == 4:  # several channels in one file
        return samples, spacing[1:], geometry
    if samples.ndim != 3:
        raise ValueError(f"The image {file} has {samples.ndim} axes, expected are 2 to 4.")
    return samples[None], spacing, geometry


def write_labels(labels: np.ndarray, case: Case, path: Path) -> None:
    """Write (Z, Y, X) or (Y, X) labels on the grid of the case, whole or not at all.

    Raises:
        OSError: they cannot be written.
    """
    image = sitk.GetImageFromArray(labels)
    if case.geometry is not None:
        spacing, origin, direction = case.geometry
        if len(spacing) == 4:  # channels in one file: the first three axes are space
            spacing, origin = spacing[:3], origin[:3]
            direction = tuple(np.reshape(direction, (4, 4))[:3, :3].ravel())
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(direction)
    with atomic_write(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written ({one_line(error)}).") from error
