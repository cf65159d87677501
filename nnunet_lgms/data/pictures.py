"""Flat picture files as viewers show them: decoded to the end, turned as they say, of one page and 8 bits a channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nnunet_lgms.files import one_line
from nnunet_lgms.image_files import check_image_file

_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")

GREY = 16
"""Channels of grey pixels differ by no more; JPEG keeps colours to a few levels."""


def open_picture(path: Path, *, deep: bool = False) -> Image.Image:
    """Decode a file completely, so that a truncated one is noticed, and turn it as its EXIF or XMP orientation says.

    Args:
        path: PNG, JPEG, BMP or TIFF.
        deep: take one grey channel of 16 or 32 bits too.

    Raises:
        ValueError: it cannot be read, has several pages, or more than 8 bits a channel.
    """
    check_image_file(path)
    try:
        # by its name Pillow would map a TIFF into memory and mix up the rows of one that is to be turned
        with path.open("rb") as file, Image.open(file) as image:
            pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a phone's photo with its preview
            # Pillow halves 16-bit colours without a word
            halved = any(";16" in str(tile) for tile in image.tile) and image.mode not in _DEEP_MODES
            image.load()
            turned = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged files bring almost anything to light
        raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
    if pages > 1:
        raise ValueError(f"{path} has {pages} pages, expected one picture")
    if halved or turned.mode not in (*_EIGHT_BIT_MODES, *_DEEP_MODES[: len(_DEEP_MODES) * deep]):
        kind = "16 bits a channel" if halved else f"pixels of type {turned.mode}"
        raise ValueError(f"{path} has {kind}, expected 8 bits a channel")
    return turned


def samples_of(path: Path, channels: int, *, deep: bool = False) -> np.ndarray:
    """The samples of an image, (H, W) of uint8 for one channel, (H, W, 3) for three.

    Args:
        path: the file.
        channels: 1 or 3.
        deep: keep 16 bits of grey, as uint16, and refuse colours where one channel is wanted.

    Raises:
        ValueError: see `open_picture`; or parts of it are transparent, which hides samples that a network would see.
    """
    image = open_picture(path, deep=deep)
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        if channels != 1 or samples.min() < 0 or samples.max() >= 2**16:
            raise ValueError(f"{path} has grey pixels of {image.mode}, expected {channels} channel(s) of 8 or 16 bits")
        return samples.astype(np.uint16)
    if image.mode == "F":
        raise ValueError(f"{path} has pixels of type F, expected whole numbers")
    alpha = alpha_of(image)
    if alpha is not None and alpha.min() < 255:
        raise ValueError(f"{path} is transparent in places, where a viewer and a network see different things")
    samples = np.asarray(image.convert("RGB"))
    if channels == 3:
        return samples
    if deep and (samples.max(axis=-1).astype(np.int16) - samples.min(axis=-1)).max() > GREY:
        raise ValueError(f"{path} is in colour, where others are grey: give the three channels of colours")
    return np.asarray(image.convert("L"))


def alpha_of(image: Image.Image) -> np.ndarray | None:
    """The opacity of each pixel, (H, W) of uint8; None for a picture without."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    return np.asarray(image.convert("RGBA"))[..., 3]
