"""Flat images (PNG, JPEG, BMP, TIFF): read, check, and write as nnU-Net's `NaturalImage2DIO` wants them.

nnU-Net accepts no JPEG, and wants labels as consecutive integers. A colour image stays one file with three channels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.data.masks import read_mask
from nnunet_lgms.data.pictures import samples_of, says_to_turn
from nnunet_lgms.files import atomic_write

_ASPECT_TOLERANCE = 0.01  # a relative difference that rounding to whole pixels explains


def inspect(case: Case, description: DatasetDescription) -> Inspection:
    """Read image and masks of one case and say what is wrong with them."""
    problems, image, digest = [], None, None
    try:
        image = samples_of(case.image, len(description.channel_names))
        digest = hashlib.blake2b(image.tobytes() + str(image.shape).encode(), digest_size=16).hexdigest()
    except ValueError as error:
        problems.append(str(error))
    sizes, empty, full = set(), True, False
    for path in case.masks:
        try:
            mask = read_mask(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        sizes.add(mask.shape)
        empty &= not mask.any()
        full |= bool(mask.all())
        if image is not None and not _sizes_agree(image.shape[:2], mask.shape, description.image_follows_mask):
            turned = " as its orientation turns it" if says_to_turn(case.image) else ""
            problems.append(
                f"the image has {_size(image.shape)} pixels{turned}, the mask {path} has {_size(mask.shape)}"
            )
    if len(sizes) > 1:
        problems.append(f"its masks differ in size: {', '.join(_size(size) for size in sorted(sizes))} pixels")
    turned = not problems and any(map(says_to_turn, (case.image, *case.masks)))
    return Inspection(tuple(problems), digest, empty, full, turned)


def write(case: Case, description: DatasetDescription, image_file: Path, label_file: Path, size: int | None) -> None:
    """Write one checked case.

    Args:
        case: the source files.
        description: number of channels, and whether the image follows the size of the mask.
        image_file: PNG to write, (H, W) or (H, W, 3), 8 bits.
        label_file: PNG to write, (H, W), values 0 and 1.
        size: height and width to resize to, in pixels, as the paper does it; None keeps the original size.
    """
    image = Image.fromarray(samples_of(case.image, len(description.channel_names)))
    mask = Image.fromarray(np.logical_or.reduce([read_mask(path) for path in case.masks]).astype(np.uint8))
    target = mask.size if size is None else (size, size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    if mask.size != target:
        mask = mask.resize(target, Image.Resampling.NEAREST)
    for picture, path in ((image, image_file), (mask, label_file)):
        with atomic_write(path) as temporary:
            picture.save(temporary, format="PNG")


def _sizes_agree(image: tuple[int, ...], mask: tuple[int, ...], image_follows_mask: bool) -> bool:
    if image == mask:
        return True
    ratio = (image[0] * mask[1]) / (image[1] * mask[0])
    return image_follows_mask and abs(ratio - 1) <= _ASPECT_TOLERANCE


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
