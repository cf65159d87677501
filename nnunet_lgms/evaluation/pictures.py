"""Pictures of a report: distributions of a metric, and single cases with both outlines."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

REFERENCE_COLOUR, PREDICTION_COLOUR = "#00a6d6", "#e4572e"
_MODEL_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")

#: names of labels and models are shown as they are: matplotlib takes what stands between two $ for mathematics
plain_text = rc_context({"text.parse_math": False})


@plain_text
def distribution(metric: str, unit: str, values: Mapping[str, np.ndarray], labels: Sequence[str]) -> str:
    """Boxes and single cases of one metric, a group a label, a colour a model; a PNG as data URI.

    Args:
        metric: its name.
        unit: of the axis, empty for fractions.
        values: model → (cases, labels).
        labels: their names.
    """
    figure = Figure(figsize=(max(4.0, 1.2 + 0.55 * len(labels) * len(values)), 3.2), layout="constrained")
    axes = figure.add_subplot()
    rng = np.random.default_rng(0)  # scatter of the points, the same in every report
    width = 0.8 / len(values)
    for i, (model, table) in enumerate(values.items()):
        colour = _MODEL_COLOURS[i % len(_MODEL_COLOURS)]
        for label in range(len(labels)):
            sample = table[:, label][~np.isnan(table[:, label])]
            if len(sample) == 0:
                continue
            x = label + (i - (len(values) - 1) / 2) * width
            axes.boxplot([sample], positions=[x], widths=0.7 * width, showfliers=False, medianprops={"color": colour})
            axes.scatter(x + rng.uniform(-0.2, 0.2, len(sample)) * width, sample, s=8, alpha=0.5, color=colour, lw=0)
        axes.scatter([], [], color=colour, label=model)
    axes.set_xticks(range(len(labels)), labels, rotation=25 if max(map(len, labels)) * len(labels) > 40 else 0)
    axes.set_ylabel(f"{metric} ({unit})" if unit else metric)
    if not unit:
        axes.set_ylim(-0.03, 1.03)
    if len(values) > 1:
        axes.legend(fontsize="small")
    return data_uri(figure)


def case_picture(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], image: np.ndarray | None
) -> str:
    """One slice with the outlines of both masks, a PNG as data URI.

    Args:
        prediction: foreground, bool, (Y, X) or (Z, Y, X): the slice with most errors is shown.
        reference: the same.
        spacing: of each axis, for the aspect of the pixels.
        image: (C, Z, Y, X) as nnU-Net's readers give it, or None.
    """
    position = None
    if prediction.ndim == 3:
        wrong = (prediction ^ reference).sum(axis=(1, 2))
        position = int(np.argmax(wrong if wrong.any() else reference.sum(axis=(1, 2))))
        prediction, reference, spacing = prediction[position], reference[position], spacing[1:]
    background = _background(image, position or 0, prediction.shape)
    height, width = (n * s for n, s in zip(prediction.shape, spacing))
    figure = Figure(figsize=(3.2, np.clip(3.2 * height / width, 1.6, 4.8)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(background, cmap="gray", aspect=spacing[0] / spacing[1], interpolation="nearest")
    for mask, colour in ((reference, REFERENCE_COLOUR), (prediction, PREDICTION_COLOUR)):
        if mask.any():
            # one pixel around lets outlines close at the border
            x, y = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
            axes.contour(x, y, np.pad(mask, 1), levels=[0.5], colors=[colour], linewidths=1.3)
    axes.set_axis_off()
    return data_uri(figure)


def _background(image: np.ndarray | None, position: int, shape: tuple[int, ...]) -> np.ndarray:
    """What is seen behind the outlines: colours as they are, else samples stretched between 1st and 99th percentile."""
    if image is None or image.shape[-2:] != shape:
        return np.full(shape, 0.5)
    picture = image[:, position if image.shape[1] > 1 else 0]
    if len(picture) == 3 and picture.min() >= 0 and picture.max() <= 255:
        return np.moveaxis(picture, 0, -1).astype(np.uint8)
    low, high = np.percentile(picture[0], (1, 99))
    return np.clip((picture[0] - low) / max(high - low, 1e-6), 0, 1)


def data_uri(figure: Figure) -> str:
    """A figure as PNG inside an HTML page."""
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
