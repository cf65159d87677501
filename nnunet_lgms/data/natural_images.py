"""Flat images (PNG, JPEG, BMP, TIFF): read, check, and write as nnU-Net's `NaturalImage2DIO` wants them.

nnU-Net accepts no JPEG, and wants labels as consecutive integers. A colour image stays one file with three channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.data.masks import read_label_map, read_mask
from nnunet_lgms.data.pictures import samples_of
from nnunet_lgms.files import atomic_write
from nnunet_lgms.image_files import says_to_turn

_ASPECT_TOLERANCE = 0.01  # a relative difference that rounding to whole pixels explains


def inspect(case: Case, description: DatasetDescription) -> Inspection:
    """Read image and masks of one case and say what is wrong with them."""
    problems, shape = [], None
    digest = hashlib.blake2b(digest_size=16)
    for path in case.images:
        try:
            samples = _samples_of(path, case, description)
        except ValueError as error:
            problems.append(str(error))
            continue
        digest.update(samples.tobytes() + str(samples.shape).encode())
        shape = shape or samples.shape
        if samples.shape != shape:
            problems.append(f"{path} has {_size(samples.shape)} pixels, {case.image} has {_size(shape)}")
    readable = not problems
    if len(case.masks) > 1 and description.label_of:
        problems.append(f"expected one label map, found {len(case.masks)}")
    sizes, empty, full, labels = set(), True, False, set()
    for path in case.masks:
        try:
            mask = _labels_of(path, description)
        except ValueError as error:
            problems.append(str(error))
            continue
        sizes.add(mask.shape)
        empty &= not mask.any()
        labels.update(np.unique(mask).tolist())
        full |= bool(mask.all())
        if shape and not _sizes_agree(shape[:2], mask.shape, description.image_follows_mask):
            turned = " as its orientation turns it" if says_to_turn(case.image) else ""
            problems.append(f"the image has {_size(shape)} pixels{turned}, the mask {path} has {_size(mask.shape)}")
    if len(sizes) > 1:
        problems.append(f"its masks differ in size: {', '.join(_size(size) for size in sorted(sizes))} pixels")
    turned = not problems and any(map(says_to_turn, (*case.images, *case.masks)))
    return Inspection(tuple(problems), digest.hexdigest() if readable else None, empty, full, turned, frozenset(labels))


def write(
    case: Case, description: DatasetDescription, image_files: Sequence[Path], label_file: Path, size: int | None
) -> None:
    """Write one checked case.

    Args:
        case: the source files.
        description: number of channels, what the masks hold, and whether the image follows the size of the mask.
        image_files: PNGs to write, one for each of the case's, (H, W) or (H, W, 3).
        label_file: PNG to write, (H, W), values 0, 1, ….
        size: height and width to resize to, in pixels, as the paper does it; None keeps the original size.
    """
    masks = [_labels_of(path, description) for path in case.masks]
    mask = Image.fromarray(np.maximum.reduce(masks).astype(np.uint8))
    target = mask.size if size is None else (size, size)
    if mask.size != target:
        mask = mask.resize(target, Image.Resampling.NEAREST)
    for source, path in zip(case.images, image_files, strict=True):
        image = Image.fromarray(_samples_of(source, case, description))
        _save(image if image.size == target else image.resize(target, Image.Resampling.BICUBIC), path)
    _save(mask, label_file)


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def _samples_of(path: Path, case: Case, description: DatasetDescription) -> np.ndarray:
    channels = 1 if case.channels else len(description.channel_names)
    return samples_of(path, channels, deep=description.deep)


def _labels_of(path: Path, description: DatasetDescription) -> np.ndarray:
    return read_label_map(path, description.label_of) if description.label_of else read_mask(path)


def _sizes_agree(image: tuple[int, ...], mask: tuple[int, ...], image_follows_mask: bool) -> bool:
    if image == mask:
        return True
    ratio = (image[0] * mask[1]) / (image[1] * mask[0])
    return image_follows_mask and abs(ratio - 1) <= _ASPECT_TOLERANCE


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
