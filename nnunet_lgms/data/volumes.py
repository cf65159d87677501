"""Volumes (NIfTI): read, check, and copy unchanged, so that intensities and geometry stay the publisher's."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.files import atomic_write
from nnunet_lgms.nnunet_files import Reader


def inspect(case: Case, description: DatasetDescription) -> Inspection:
    """Read image and label of one case, as nnU-Net will, and say what is wrong with them."""
    reader, problems = Reader(description.file_ending, description.reader), []
    image = label = digest = None
    try:
        samples, image = reader.read_image(case.image)
        digest = hashlib.blake2b(str(samples.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(samples))
        if not np.isfinite(samples).all():
            problems.append(f"the image {case.image} has voxels that are NaN or infinite, which no network learns from")
    except ValueError as error:
        problems.append(str(error))
    if len(case.masks) != 1:
        problems.append(f"expected one label file, found {len(case.masks)}")
        return Inspection(tuple(problems), digest and digest.hexdigest())
    try:
        label = reader.read_labels(case.masks[0])
    except ValueError as error:
        problems.append(str(error))
        return Inspection(tuple(problems), digest and digest.hexdigest())
    if image and (difference := image.differences(label.grid)):
        problems.append(f"image and label {case.masks[0]} have different {difference}")
    present = np.unique(label.labels).tolist()
    if unknown := [value for value in present if value not in description.label_values]:
        problems.append(
            f"the label file {case.masks[0]} has the value(s) {', '.join(map(str, unknown))}, "
            f"allowed are {', '.join(map(str, sorted(description.label_values)))}"
        )
    return Inspection(tuple(problems), digest and digest.hexdigest(), empty=not any(present), full=0 not in present)


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
