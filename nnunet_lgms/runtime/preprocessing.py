"""Crop, normalise, resample: nnU-Net's DefaultPreprocessor for images without a segmentation.

Everything that can be is done in place: a volume exists twice, as source and as result of one resampling step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_lgms.runtime.description import Description
from nnunet_lgms.runtime.images import Case
from nnunet_lgms.runtime.resampling import axis_matrices, resample
from nnunet_lgms.splines import new_shape, thick_axis

EPSILON = 1e-8


@dataclass
class Prepared:
    """What the network sees, and the way back.

    Attributes:
        data: (C, Z, Y, X) float32, axes as after `transpose_forward`.
        shape: voxels of the transposed image before cropping.
        box: slices of the transposed image that were kept.
        back: one matrix an axis, from the network's grid to the cropped image's; None where nothing changes.
    """

    data: np.ndarray
    shape: tuple[int, ...]
    box: tuple[slice, ...]
    back: list[np.ndarray | None]


def preprocess(case: Case, description: Description) -> Prepared:
    """Prepare a case for the network; its samples are changed in place."""
    forward = description.transpose_forward
    data = case.samples.transpose(0, *(axis + 1 for axis in forward))
    spacing = [case.spacing[axis] for axis in forward]
    shape = data.shape[1:]

    nonzero = (data != 0).any(axis=0)
    box = bounding_box(nonzero)
    data = data[(slice(None), *box)]
    inside = fill_holes(nonzero[box]) if any(description.use_mask_for_norm) else None
    del nonzero
    for channel, scheme in enumerate(description.normalization_schemes):
        masked = inside if description.use_mask_for_norm[channel] else None
        normalise(data[channel], scheme, description.intensity_properties[channel], masked)
    del inside

    target = list(description.spacing)
    if len(target) < 3:  # flat configurations leave the slices as they are
        target = [spacing[0], *target]
    cropped = data.shape[1:]
    size = new_shape(cropped, spacing, target)
    matrices = axis_matrices(description.resampling_data, cropped, size, spacing, target)
    thick = thick_axis(description.resampling_data.force_separate_z, spacing, target)
    channels = list(data)
    del data
    case.samples = None  # type: ignore[assignment]  # nothing but `channels` holds them: a channel is freed when it has been resampled
    done = []
    while channels:
        done.append(resample(channels.pop(0), matrices, thick))
    data = done[0][None] if len(done) == 1 else np.stack(done)
    back = axis_matrices(description.resampling_probabilities, size, cropped, target, spacing)
    return Prepared(data, shape, box, back)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask; all of it if the mask is empty."""
    box = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, mask.shape[axis]))
    return tuple(box)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """A (Z, Y, X) mask with its enclosed background; voxels touch by their faces, as in scipy's binary_fill_holes."""
    # Outside of the array is background; ITK needs to see it.
    bordered = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    filled = sitk.GetArrayFromImage(sitk.BinaryFillhole(bordered, fullyConnected=False))
    return filled[1:-1, 1:-1, 1:-1] > 0


def normalise(image: np.ndarray, scheme: str, properties: dict, mask: np.ndarray | None) -> None:
    """One channel (Z, Y, X) by nnU-Net's scheme of that name, in place.

    Raises:
        ValueError: RGBTo01Normalization for values outside 0 to 255, or an unknown scheme.
    """
    if scheme == "ZScoreNormalization":
        mean, deviation = _moments(image, mask)
        if mask is None:
            image -= mean
            image /= max(deviation, EPSILON)
        else:
            image[mask] = (image[mask] - mean) / max(deviation, EPSILON)
    elif scheme == "CTNormalization":
        np.clip(image, properties["percentile_00_5"], properties["percentile_99_5"], out=image)
        image -= properties["mean"]
        image /= max(properties["std"], EPSILON)
    elif scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= max(image.max(), EPSILON)
    elif scheme == "RGBTo01Normalization":
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"The image has values from {image.min():g} to {image.max():g}, the model was trained on colours "
                "from 0 to 255."
            )
        image /= 255
    elif scheme != "NoNormalization":
        raise ValueError(f"The normalisation {scheme!r} is not there; export refuses models that use it.")


def _moments(image: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """Mean and standard deviation, slice by slice in float64, without a copy of the volume."""
    count = total = 0.0
    for z in range(len(image)):
        values = image[z] if mask is None else image[z][mask[z]]
        count += values.size
        total += values.sum(dtype=np.float64)
    mean = total / max(count, 1)
    squares = 0.0
    for z in range(len(image)):
        values = image[z] if mask is None else image[z][mask[z]]
        squares += np.square(values - mean, dtype=np.float64).sum()
    return mean, float(np.sqrt(squares / max(count, 1)))
