"""nnU-Net's preprocessing of a case that is to be predicted, without what prediction does not look at.

nnU-Net's DefaultPreprocessor fills the holes of the mask of nonzero voxels, and resamples that mask. It is only looked
at where a channel is normalised inside of it, or where the mask of a previous stage takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunet_lgms.files import one_line
from nnunet_lgms.prediction.resampling import as_matrices
from nnunet_lgms.splines import new_shape

#: nnU-Net's normalisations that look at the mask only where `use_mask_for_norm` says so
UNMASKED = (
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "ZScoreNormalization",
)


def preprocess(
    samples: np.ndarray,
    previous: np.ndarray | None,
    properties: dict,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
    on_device: Callable[[Callable[[torch.device], Tensor]], Tensor],
    verbose: bool = False,
) -> Tensor:
    """What the network sees of a case.

    Args:
        samples: (C, Z, Y, X) as nnU-Net's reader gives them.
        previous: labels (1, Z, Y, X) of the previous stage of a cascade, or None.
        properties: of the reader; what the way back needs is added, as nnU-Net does.
        plans: of the model.
        configuration: of the model.
        dataset_json: of the model.
        on_device: runs a function of a device, on one that has room.
        verbose: whether nnU-Net's preprocessor talks.

    Returns:
        (C + labels of the previous stage, Z', Y', X') float32.

    Raises:
        ValueError: the image would have no voxels, or more than anybody can mean, at the model's spacing.
    """
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    if type(preprocessor) is DefaultPreprocessor:
        data, labels = _default(samples, previous, properties, plans, configuration, on_device)
    else:
        data, labels, _ = preprocessor.run_case_npy(samples, previous, properties, plans, configuration, dataset_json)
        data = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    if previous is None:
        return data
    foreground = plans.get_label_manager(dataset_json).foreground_labels
    one_hot = torch.from_numpy(convert_labelmap_to_one_hot(labels[0], foreground, np.float32))
    return torch.cat([data, one_hot.to(data.device)])


def _default(
    samples: np.ndarray,
    previous: np.ndarray | None,
    properties: dict,
    plans: PlansManager,
    configuration: ConfigurationManager,
    on_device: Callable[[Callable[[torch.device], Tensor]], Tensor],
) -> tuple[Tensor, np.ndarray | None]:
    """As ``DefaultPreprocessor.run_case_npy``; `samples` are changed."""
    transposed = (0, *(axis + 1 for axis in plans.transpose_forward))
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    # Views, as nnU-Net has them: a mean over memory in another order is another number in its last digits.
    data, labels = samples.transpose(transposed), None
    properties["shape_before_cropping"] = data.shape[1:]
    box = bounding_box(data)
    inside = (slice(None), *(slice(*ends) for ends in box))
    data = data[inside]
    if previous is not None:
        if previous.shape[1:] != samples.shape[1:]:
            raise ValueError(
                f"The image has {samples.shape[1:]} voxels, the prediction of the previous stage {previous.shape[1:]}: "
                "predict this very image with the previous stage."
            )
        labels = previous.transpose(transposed)[inside].copy()
    if labels is not None or _looks_at_mask(configuration):
        data, labels, _ = crop_to_nonzero(data, labels)  # fills holes, and marks what is outside by -1
    properties["bbox_used_for_cropping"] = box
    properties["shape_after_cropping_and_before_resampling"] = old = data.shape[1:]

    target = own_spacing(configuration, spacing)
    new = new_shape(old, spacing, target)
    marked, intensities = [None] if labels is None else labels, plans.foreground_intensity_properties_per_channel
    try:
        data = DefaultPreprocessor(verbose=False)._normalize(data, marked, configuration, intensities)
    except AssertionError as error:  # as of colours beyond 255
        raise ValueError(
            f"The image has values that the model's normalisation does not take ({one_line(error)})."
        ) from error
    resampling = as_matrices(configuration.resampling_fn_data, old, new, spacing, target)
    if resampling is None:
        prepared = torch.from_numpy(np.asarray(configuration.resampling_fn_data(data, new, spacing, target)))
    else:
        volume = torch.from_numpy(np.ascontiguousarray(data))
        prepared = on_device(lambda device: resampling.to(device)(volume))
    if previous is not None:
        labels = configuration.resampling_fn_seg(labels, new, spacing, target)
    return prepared.float(), labels


def own_spacing(configuration: ConfigurationManager, spacing: Sequence[float]) -> list[float]:
    """(z, y, x) of the network's grid, in mm, for an image of another one: flat networks leave slices as they are."""
    own = list(configuration.spacing)
    return own if len(own) == len(spacing) else [spacing[0], *own]


def _looks_at_mask(configuration: ConfigurationManager) -> bool:
    """Whether a normalisation may ask which voxels are outside."""
    return any(configuration.use_mask_for_norm) or not set(configuration.normalization_schemes) <= set(UNMASKED)


def bounding_box(data: np.ndarray) -> list[list[int]]:
    """First and behind the last plane along each axis of (C, Z, Y, X) that is not zero; all planes if all are.

    From outside in: in most images the outermost planes are not zero, and nothing else is looked at.
    """
    box = [[0, size] for size in data.shape[1:]]
    for axis, ends in enumerate(box):
        planes = np.moveaxis(data[(slice(None), *(slice(*part) for part in box))], axis + 1, 0)
        while ends[0] < len(planes) and not planes[ends[0]].any():
            ends[0] += 1
        if ends[0] == len(planes):  # nothing but zeros
            return [[0, size] for size in data.shape[1:]]
        while not planes[ends[1] - 1].any():
            ends[1] -= 1
    return box
