"""Volumes (NIfTI): read, check, and copy unchanged, so that intensities and geometry stay the publisher's."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.files import atomic_write, one_line


def inspect(case: Case, description: DatasetDescription) -> Inspection:
    """Read image and label of one case and say what is wrong with them."""
    try:
        image, samples = _read(case.image)
    except ValueError as error:
        return Inspection((str(error),))
    digest = hashlib.blake2b(str(samples.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(samples))
    if len(case.masks) != 1:
        return Inspection((f"expected one label file, found {len(case.masks)}",), digest.hexdigest())
    try:
        label, values = _read(case.masks[0])
    except ValueError as error:
        return Inspection((str(error),), digest.hexdigest())
    problems = []
    if samples.shape != values.shape:
        problems.append(f"the image has {_sizes(samples.shape)} voxels, its label has {_sizes(values.shape)}")
    elif not np.allclose(image.header.get_zooms()[:3], label.header.get_zooms()[:3], rtol=1e-3):
        spacings = (", ".join(f"{z:.4g}" for z in volume.header.get_zooms()[:3]) for volume in (image, label))
        problems.append("the image has a spacing of ({}) mm, its label of ({}) mm".format(*spacings))
    if not np.isfinite(samples).all():
        problems.append("the image has voxels that are NaN or infinite, which nnU-Net's reader would take for 0")
    present = np.unique(values)
    unknown = sorted(float(v) for v in present if v not in description.label_values)
    if unknown:
        problems.append(
            f"the label file has the value(s) {', '.join(f'{v:g}' for v in unknown)}, "
            f"allowed are {', '.join(str(v) for v in sorted(description.label_values))}"
        )
    return Inspection(tuple(problems), digest.hexdigest(), empty=not present.any())


def write(case: Case, description: DatasetDescription, image_file: Path, label_file: Path, size: int | None) -> None:
    """Copy one checked case. `size` is for flat images only.

    Raises:
        ValueError: a size is given.
    """
    if size is not None:
        raise ValueError(
            f"--size {size} is for flat images; {description.title} holds volumes, which nnU-Net resamples."
        )
    for source, path in ((case.image, image_file), (case.masks[0], label_file)):
        with atomic_write(path) as temporary:
            shutil.copyfile(source, temporary)


def _read(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """A NIfTI file and all of its samples as they are stored."""
    try:
        volume = nib.load(path)
        samples = np.asanyarray(volume.dataobj.get_unscaled())
    except Exception as error:  # damaged headers bring almost anything to light
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    if samples.ndim != 3 or not samples.size:
        raise ValueError(f"{path} has shape {samples.shape}, expected a volume of 3 axes")
    if samples.dtype.kind not in "iuf":
        raise ValueError(f"{path} has voxels of type {samples.dtype}, expected numbers")
    return volume, samples


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
