"""Pictures of a report: distributions and curves of matplotlib, and slices of cases with both segmentations."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

MODEL_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
LABEL_COLOURS = ("#ffb000", "#00a6d6", "#e4572e", "#55c667", "#b07cff", "#ff7fbf", "#9be000", "#00c9a7", "#f5e663")
DPI = 160
CSS_DPI = 96

LARGEST, SMALLEST = 640, 160
"""Pixels of the longer edge of a flat image; small ones are enlarged by a whole number."""

LARGEST_OF_MANY = 400
"""The same for the slices of a volume."""

MAX_SLICES = 32
"""Of a volume, at even distances over all that hold something."""

FILLED = 0.4
"""Opacity of the prediction."""

#: names of labels and models are shown as they are: matplotlib takes what stands between two $ for mathematics
plain_text = rc_context({"text.parse_math": False})


@plain_text
def distribution(
    metric: str, unit: str, values: Mapping[str, np.ndarray], labels: Sequence[str]
) -> dict[str, str | int]:
    """Boxes and single cases of one metric, a group a label, a colour a model, on the range of the data.

    Args:
        metric: its name.
        unit: of the axis, empty for fractions.
        values: model → (cases, labels).
        labels: their names.
    """
    figure = Figure(figsize=(max(3.4, 1.4 + 0.6 * len(labels) * len(values)), 3.0), layout="constrained")
    axes = figure.add_subplot()
    rng = np.random.default_rng(0)  # scatter of the points, the same in every report
    width = 0.8 / len(values)
    for i, (model, table) in enumerate(values.items()):
        colour = MODEL_COLOURS[i % len(MODEL_COLOURS)]
        for label in range(len(labels)):
            sample = table[:, label][~np.isnan(table[:, label])]
            if len(sample) == 0:
                continue
            x = label + (i - (len(values) - 1) / 2) * width
            axes.boxplot(
                [sample],
                positions=[x],
                widths=0.7 * width,
                showfliers=False,
                medianprops={"color": colour, "linewidth": 2},
            )
            axes.scatter(x + rng.uniform(-0.2, 0.2, len(sample)) * width, sample, s=9, alpha=0.5, color=colour, lw=0)
        axes.scatter([], [], color=colour, label=model)
    axes.set_xticks(range(len(labels)), labels, rotation=25 if max(map(len, labels)) * len(labels) > 40 else 0)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_title(f"{metric} ({unit})" if unit else metric, fontsize="medium", loc="left")
    plain(axes, "y")
    if len(values) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return shown(figure)


@plain_text
def lines(
    title: str,
    axis_names: tuple[str, str],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    diagonal: bool = False,
) -> dict[str, str | int]:
    """One line a name, (x, y); NaN are left out."""
    figure = Figure(figsize=(3.7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    if diagonal:
        axes.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls="--")
    for (name, (x, y)), colour in zip(curves.items(), MODEL_COLOURS * len(curves)):
        known = ~np.isnan(y)
        axes.plot(x[known], y[known], marker="o", ms=4, lw=1.4, color=colour, label=name)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel(axis_names[0])
    axes.set_ylabel(axis_names[1])
    plain(axes)
    axes.legend(fontsize="small")
    return shown(figure) | {"name": title}


def label_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the same in all pictures."""
    return {label: LABEL_COLOURS[i % len(LABEL_COLOURS)] for i, label in enumerate(labels)}


def case_pictures(
    prediction: np.ndarray,
    reference: np.ndarray,
    regions: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    image: np.ndarray | None,
) -> dict:
    """A flat image, or the slices of a volume that hold something, with both segmentations.

    Args:
        prediction: labels, (Y, X) or (Z, Y, X).
        reference: the same.
        regions: name → label values; later ones are drawn over earlier ones.
        spacing: of each axis, for the aspect of the pixels.
        image: (C, Z, Y, X) as nnU-Net's readers give it, or None.

    Returns:
        `uri` of the picture; for volumes of all slices side by side, with `numbers`, from 1, of these slices, `shown`,
        the place among them of the one with most wrong voxels, and `n_slices` of the volume.
    """
    masks = [(np.isin(prediction, region), np.isin(reference, region)) for region in regions.values()]
    colours = list(label_colours(list(regions)).values())
    if prediction.ndim == 2:
        picture = _slice(masks, colours, spacing, image, None, prediction.shape, LARGEST)
        return {"uri": _jpeg(picture), "numbers": [], "shown": 0, "n_slices": 1}
    wrong = sum((p ^ r).sum(axis=(1, 2)) for p, r in masks)
    there = sum(r.sum(axis=(1, 2)) for _, r in masks)
    worst = int(np.argmax(wrong if wrong.any() else there))
    occupied = np.flatnonzero(wrong + there)
    n_shown = min(MAX_SLICES, len(occupied))
    chosen = sorted({int(occupied[round(i)]) for i in np.linspace(0, len(occupied) - 1, n_shown)} | {worst})
    slices = []
    for z in chosen:
        at = [(p[z], r[z]) for p, r in masks]
        slices.append(_slice(at, colours, spacing[1:], image, z, prediction.shape[1:], LARGEST_OF_MANY))
    strip = Image.fromarray(np.concatenate([np.asarray(one) for one in slices], axis=1))
    return {
        "uri": _jpeg(strip),
        "numbers": [z + 1 for z in chosen],
        "shown": chosen.index(worst),
        "n_slices": len(prediction),
    }


def _slice(
    masks: Sequence[tuple[np.ndarray, np.ndarray]],
    colours: Sequence[str],
    spacing: Sequence[float],
    image: np.ndarray | None,
    position: int | None,
    shape: tuple[int, ...],
    largest: int,
) -> Image.Image:
    """Background, prediction filled, reference outlined on top."""
    zoom = max(1, SMALLEST * largest // LARGEST // max(shape))
    zoom = min(max(zoom, largest // max(shape)), 8) if max(shape) < largest else 1
    picture = np.repeat(_background(image, position or 0, shape)[..., :3] * 1.0, zoom, 0).repeat(zoom, 1)
    for (predicted, _), colour in zip(masks, colours):
        at = _zoomed(predicted, zoom)
        picture[at] = (1 - FILLED) * picture[at] + FILLED * 255 * np.array(to_rgb(colour))
    for (_, reference), colour in zip(masks, colours):
        at = _zoomed(reference, zoom)
        inner = ndimage.binary_erosion(at, iterations=2 if zoom > 1 else 1, border_value=0)
        halo = ndimage.binary_dilation(at, iterations=1) & ~at
        picture[halo] *= 0.45
        picture[at & ~inner] = 255 * np.array(to_rgb(colour))
    drawn = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    ratio = spacing[0] / spacing[1]
    width, height = drawn.size
    size = (width, round(height * ratio)) if ratio >= 1 else (round(width / ratio), height)
    scale = min(1, largest / max(size))
    size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return drawn if size == drawn.size else drawn.resize(size, Image.Resampling.BILINEAR)


def _jpeg(picture: Image.Image) -> str:
    """A data URI."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _zoomed(mask: np.ndarray, zoom: int) -> np.ndarray:
    return mask.repeat(zoom, 0).repeat(zoom, 1)


def _background(image: np.ndarray | None, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """(Y, X, 3) of 0 to 255: colours as they are, else the first channel between its 1st and 99th percentile."""
    if image is None or image.shape[-2:] != tuple(shape):
        return np.full((*shape, 3), 90.0)
    picture = image[:, position if image.shape[1] > 1 else 0]
    if len(picture) == 3 and picture.min() >= 0 and picture.max() <= 255:
        return np.moveaxis(picture, 0, -1)
    low, high = np.percentile(picture[0], (1, 99))
    grey = 255 * np.clip((picture[0] - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def plain(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """The style of all charts: a quiet grid behind, two of the four edges."""
    axes.grid(axis=grid, color="#e2e5e9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shown(figure: Figure) -> dict[str, str | int]:
    """A figure as PNG inside an HTML page: its `uri`, and its `width` in pixels of the page."""
    stream = io.BytesIO()
    width = round(CSS_DPI * figure.get_size_inches()[0])
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return {"uri": "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), "width": width}
