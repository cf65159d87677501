"""How well objects of a size are found: Dice, recall and detection of every connected object of the references.

A mean over cases hides small objects, as large ones make up its voxels.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from nnunet_lgms.evaluation.evaluate import Evaluation
from nnunet_lgms.evaluation.pictures import plain_text
from nnunet_lgms.files import atomic_write
from nnunet_lgms.parallel import default_workers, parallel_map

CLASSES = 4
#: of size
QUARTILES = np.linspace(0, 1, CLASSES + 1)


@dataclass(frozen=True)
class FoundObject:
    """One connected object of a reference, and what a model made of it.

    Attributes:
        model: its name.
        case: name of the case.
        label: name of the label or region.
        diameter: of the disk or ball of the same size, in mm (pixels for flat images without mm).
        dice: with the predicted objects that touch it, as far as they lie in no other object of the reference.
        recall: share of its voxels that are predicted.
        detected: whether one of its voxels is predicted.
    """

    model: str
    case: str
    label: str
    diameter: float
    dice: float
    recall: float
    detected: bool


@dataclass(frozen=True)
class SizeClass:
    """Objects of one label between two sizes, of one model.

    Attributes:
        model: its name.
        label: name of the label or region.
        smallest: diameter of the smallest object, in mm or pixels.
        largest: diameter of the largest.
        n: objects.
        dice: mean over them.
        recall: mean over them.
        detected: share of them.
    """

    model: str
    label: str
    smallest: float
    largest: float
    n: int
    dice: float
    recall: float
    detected: float


def objects_of(
    model: str, case: str, label: str, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> list[FoundObject]:
    """The objects of one label in one case.

    Args:
        model: name of the model.
        case: name of the case.
        label: name of the label.
        prediction: bool, (Y, X) or (Z, Y, X).
        reference: bool, the same shape; objects touch at corners as well.
        spacing: of each axis, in mm or pixels.
    """
    # an axis of one voxel has no extent: a slice stays flat
    flat = [axis for axis, n in enumerate(reference.shape) if n == 1 and reference.ndim > 2]
    spacing = [s for axis, s in enumerate(spacing) if axis not in flat]
    prediction, reference = prediction.squeeze(tuple(flat)), reference.squeeze(tuple(flat))
    everywhere = np.ones((3,) * reference.ndim)
    objects, n_objects = ndimage.label(reference, everywhere)
    predicted, _ = ndimage.label(prediction, everywhere)
    outside = np.bincount(predicted[~reference], minlength=predicted.max() + 1)  # voxels of each in no object
    found = []
    for i, box in enumerate(ndimage.find_objects(objects, n_objects), start=1):
        own = objects[box] == i
        n, hit = int(own.sum()), predicted[box][own]
        inside = int(np.count_nonzero(hit))
        touching = np.unique(hit[hit > 0])
        dice = 2 * inside / (n + inside + int(outside[touching].sum()))
        diameter = _diameter(n * math.prod(spacing), reference.ndim)
        found.append(FoundObject(model, case, label, diameter, dice, inside / n, inside > 0))
    return found


def _diameter(size: float, dim: int) -> float:
    """Of the disk or ball of that area or volume."""
    return 2 * math.sqrt(size / math.pi) if dim == 2 else 2 * (3 * size / (4 * math.pi)) ** (1 / 3)


def found_objects(evaluation: Evaluation, workers: int | None = None) -> list[FoundObject]:
    """The objects of all references of an evaluation, for each of its models."""

    def of_case(task: tuple[str, str]) -> list[FoundObject]:
        prediction, reference = evaluation.read_pair(*task)
        ignore = evaluation.labels.ignore
        annotated = reference.labels != ignore if ignore is not None else np.ones(reference.labels.shape, bool)
        found = []
        for name, region in evaluation.labels.regions.items():
            pair = (np.isin(labels, region) & annotated for labels in (prediction.labels, reference.labels))
            found += objects_of(*task, name, *pair, reference.spacing)
        return found

    tasks = [(model, case) for model in evaluation.models for case in evaluation.cases]
    return sum(parallel_map(of_case, tasks, workers or default_workers(), "objects", threads=True), [])


def size_classes(objects: Sequence[FoundObject]) -> Iterator[SizeClass]:
    """Objects of each label and model in four classes of size, with as many objects each, the small ones first.

    Classes are the same for all models, as the objects are the references'.
    """
    for label in dict.fromkeys(o.label for o in objects):
        of_label = [o for o in objects if o.label == label]
        edges = np.quantile([o.diameter for o in of_label], QUARTILES)
        for model in dict.fromkeys(o.model for o in of_label):
            own = [o for o in of_label if o.model == model]
            places = np.searchsorted(edges[1:-1], [o.diameter for o in own], side="left")
            for place in range(CLASSES):
                inside = [o for o, p in zip(own, places, strict=True) if p == place]
                if not inside:
                    continue
                diameters = [o.diameter for o in inside]
                means = (float(np.mean([getattr(o, name) for o in inside])) for name in ("dice", "recall", "detected"))
                yield SizeClass(model, label, min(diameters), max(diameters), len(inside), *means)


def write_by_size(evaluation: Evaluation, output: Path, workers: int | None = None) -> tuple[list[Path], str]:
    """Writes ``by_size.csv``, a row an object, and ``by_size.png``; the folder is there.

    Returns:
        the files, and a table for the terminal.

    Raises:
        ValueError: no reference has an object.
    """
    objects = found_objects(evaluation, workers)
    if not objects:
        raise ValueError("--by-size finds no object in any reference: there is nothing to sort by size.")
    classes = list(size_classes(objects))
    files = [output / "by_size.csv", output / "by_size.png"]
    with ExitStack() as stack:
        with stack.enter_context(atomic_write(files[0])).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                [f"diameter_{evaluation.unit}" if f.name == "diameter" else f.name for f in fields(objects[0])]
            )
            writer.writerows([*astuple(o)[:-1], int(o.detected)] for o in objects)
        stack.enter_context(atomic_write(files[1])).write_bytes(picture(objects, classes, evaluation.unit))
    return files, table(classes, evaluation.unit)


def table(classes: Sequence[SizeClass], unit: str) -> str:
    """Size classes as text, one line each."""
    left = max(len(f"{c.model}, {c.label}") for c in classes)
    lines = [f"{'':{left}}  {f'diameter ({unit})':>20}  {'objects':>7}  {'Dice':>5}  {'Recall':>6}  {'found':>5}"]
    for c in classes:
        size = f"{c.smallest:.3g} to {c.largest:.3g}"
        numbers = f"{c.n:>7}  {c.dice:>5.3f}  {c.recall:>6.3f}  {c.detected:>5.0%}"
        lines.append(f"{f'{c.model}, {c.label}':{left}}  {size:>20}  {numbers}")
    return "\n".join(lines)


@plain_text
def picture(objects: Sequence[FoundObject], classes: Sequence[SizeClass], unit: str) -> bytes:
    """A PNG: for each label Dice and share of found objects over the diameter, a colour a model."""
    labels, models = (list(dict.fromkeys(getattr(o, name) for o in objects)) for name in ("label", "model"))
    figure = Figure(figsize=(8, 3 * len(labels)), layout="constrained")
    for axes, label in zip(figure.subplots(len(labels), 1, squeeze=False)[:, 0], labels, strict=True):
        for i, model in enumerate(models):
            own = [o for o in objects if (o.label, o.model) == (label, model)]
            axes.scatter([o.diameter for o in own], [o.dice for o in own], s=9, alpha=0.4, color=f"C{i}", lw=0)
            bins = [c for c in classes if (c.label, c.model) == (label, model)]
            middles = [math.sqrt(c.smallest * c.largest) for c in bins]
            axes.plot(middles, [c.dice for c in bins], "-o", color=f"C{i}", label=f"{model}: Dice")
            axes.plot(middles, [c.detected for c in bins], "--s", color=f"C{i}", label=f"{model}: found")
        axes.set(xscale="log", ylim=(-0.03, 1.03), title=label, xlabel=f"diameter ({unit})")
        axes.legend(fontsize="small", loc="lower right")
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
