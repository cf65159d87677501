"""What is marked in a mask that somebody drew: a white, coloured, dim, or transparent tool, one thing on black.

Nothing is guessed. A mask is taken if it can only be read in one way, however it was drawn, and refused by name
otherwise: several classes in one file, no black background, or colours that say another thing than the transparency.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from nnunet_lgms.data.pictures import GREY, alpha_of, open_picture

WHITE = (1, 255, 2**16 - 1)
"""Full scale, where a mask is filled to its edges and has no black to compare with."""

FEW = 16
"""Files with more values have noise or soft edges."""

NOISE = 0.12
"""Of full scale: how far JPEG's noise and ringing leave black and white."""

REACH = 9
"""Pixels across; soft edges are not wider, and no block of JPEG's noise is."""

SPECKS = 0.01
"""Of the foreground: pixels that may be of neither kind."""


def read_mask(path: Path) -> np.ndarray:
    """The foreground of a mask file, (H, W) of bool.

    White, grey, coloured, 1-bit, 16-bit, palette and transparent masks are read alike: what is marked, on black or on
    nothing. Soft edges, from anti-aliasing or JPEG, are cut at half of the mask's own brightest value.

    Raises:
        ValueError: the file is not a readable picture, or can be read in more than one way.
    """
    image = open_picture(path, deep=True)
    try:
        if image.mode[0] in "IF":  # 16 or 32 bits of grey
            mask = _of_brightness(np.asarray(image).astype(np.float64))
        else:
            mask = _of_colour_and_alpha(np.asarray(image.convert("RGB")).astype(np.int16), alpha_of(image))
        if not mask.all() and all(edge.all() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            raise ValueError("marks all four edges and leaves out what they enclose: expected white on black")
        return mask
    except ValueError as error:
        raise ValueError(f"the mask {path} {error}") from None


def read_label_map(path: Path, label_of: Mapping[int | tuple[int, int, int], int]) -> np.ndarray:
    """The labels of a map of several classes, (H, W) of uint8.

    Args:
        path: the file.
        label_of: grey value, or colour (red, green, blue) → label; every pixel must have one.

    Raises:
        ValueError: the file is not a readable picture, or has other values.
    """
    image = open_picture(path, deep=True)
    alpha = alpha_of(image)
    if alpha is not None and alpha.min() < 255:
        raise ValueError(f"the label map {path} is transparent in places: save it without")
    if any(isinstance(value, tuple) for value in label_of):
        samples = np.asarray(image.convert("RGB")).astype(np.int64) @ (65536, 256, 1)
        codes = {_code(value): label for value, label in label_of.items()}
    elif image.mode in ("1", "RGB", "RGBA", "CMYK", "YCbCr"):  # two values, or three that are the same if it is grey
        colour = np.asarray(image.convert("RGB")).astype(np.int64)
        if (colour != colour[..., :1]).any():
            raise ValueError(f"the label map {path} is in colour: give --labels as colours, lesion=#ff0000")
        samples, codes = colour[..., 0], label_of
    else:  # of a palette its indices
        samples, codes = np.asarray(image).astype(np.int64), label_of
    if other := sorted(set(np.unique(samples).tolist()) - set(codes)):
        listed = [f"#{value:06x}" if codes is not label_of else str(value) for value in other[:6]]
        raise ValueError(
            f"the label map {path} has {', '.join(listed)}{' …' if len(other) > 6 else ''}, which no label has"
        )
    labels = np.zeros(samples.shape, np.uint8)
    for value, label in codes.items():
        labels[samples == value] = label
    return labels


def _code(value: int | tuple[int, int, int]) -> int:
    red, green, blue = value if isinstance(value, tuple) else (value,) * 3
    return 65536 * red + 256 * green + blue


def _of_colour_and_alpha(colour: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    if alpha is None or alpha.min() == alpha.max() > 0:
        return _of_colour(colour)
    plain = (colour == colour[:1, :1]).all()
    if alpha.max() == 0:
        if plain:
            return np.zeros(alpha.shape, bool)
        raise ValueError("is transparent everywhere, though colours are in it: save it without transparency")
    marked = _of_brightness(alpha.astype(np.float64), "opacity")
    if plain:
        return marked
    try:
        seen = _of_colour(np.rint(colour * (alpha[..., None] / 255)).astype(np.int16))
        agree = np.count_nonzero(seen ^ marked) <= SPECKS * np.count_nonzero(marked)
    except ValueError:
        agree = False
    if not agree:
        raise ValueError("marks one thing by colour and another by transparency: save it in black and white")
    return marked


def _of_colour(colour: np.ndarray) -> np.ndarray:
    """(H, W, 3) → (H, W): the brightest channel tells what is marked, if all that is marked has one colour."""
    brightness = colour.max(axis=-1)
    if (brightness - colour.min(axis=-1)).max(initial=0) > GREY:
        marked = brightness >= max(brightness.max() / 2, 1)
        inner = ndimage.binary_erosion(marked, iterations=3, border_value=1)  # JPEG's colours run over edges
        marked = inner if inner.any() else marked
        hues = colour[marked] / brightness[marked][:, None]
        usual = np.median(hues, axis=0)
        other = np.abs(hues - usual).max(axis=1) > 2 * NOISE
        if np.count_nonzero(other) > SPECKS * len(hues):
            colours = [tuple(int(c) for c in colour[marked][i]) for i in (np.argmin(other), np.argmax(other))]
            raise ValueError(f"has several colours, such as {colours[0]} and {colours[1]}, expected one on black")
    return _of_brightness(brightness.astype(np.float64))


def _of_brightness(grey: np.ndarray, kind: str = "grey") -> np.ndarray:
    """(H, W) → (H, W): what is at least half as bright as the brightest, if all is either bright or dark."""
    values = np.unique(grey)
    low, top = values[0], values[-1]
    if not np.isfinite(grey).all() or low < 0:
        raise ValueError("has pixels that are negative or no numbers")
    if len(values) == 1:
        if top not in (0, *WHITE):
            raise ValueError(f"has the {kind} {top:g} everywhere, expected what is marked on black")
        return grey > 0
    if low > top / 4:
        raise ValueError(f"has no black background: its darkest {kind} is {low:g}, its brightest {top:g}")
    if len(values) == 2:
        return grey == top
    if top < 2 * FEW:
        listed = ", ".join(f"{value:g}" for value in values[:6]) + (" …" if len(values) > 6 else "")
        raise ValueError(f"has the values {listed}, which are several classes or none, expected one on black")
    white = _usual(grey[grey >= top / 2])
    noise = NOISE * white
    near_black, near_white = grey <= noise, np.abs(grey - white) <= noise
    # soft edges are slopes with something bright at hand, a further class is a plain or stands alone
    alone = (grey < white) & (ndimage.maximum_filter(grey, REACH) < 0.75 * white)
    third = ~(near_black | near_white) & (alone | _plain(grey, 3, noise / 2))
    if len(values) <= FEW:  # nothing was lost in this file, so that 0, 1 and 255 are three classes as well
        third |= (grey > low) & (grey != white) & _plain(grey, REACH, 0)
    marked = grey >= white / 2
    if np.count_nonzero(third) > max(REACH, SPECKS * np.count_nonzero(marked)):
        usual = np.bincount(np.rint(grey[third]).astype(np.int64)).argmax()
        raise ValueError(
            f"has {kind} {usual:g} beside {low:g} and {white:g}, which are several classes, expected one on black"
        )
    return marked


def _usual(bright: np.ndarray) -> float:
    """What most of the bright pixels are, as JPEG overshoots at edges; the brightest, where most are soft edges."""
    values, counts = np.unique(bright, return_counts=True)
    most = values[::-1][np.argmax(counts[::-1])]
    alike = np.abs(bright - most) <= NOISE * most
    return most if 2 * np.count_nonzero(alike) >= len(bright) else values[-1]


def _plain(grey: np.ndarray, size: int, tolerance: float) -> np.ndarray:
    """Where all values of a window are the same, (H, W) of bool."""
    return ndimage.maximum_filter(grey, size) - ndimage.minimum_filter(grey, size) <= tolerance
