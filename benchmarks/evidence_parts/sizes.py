"""How large the objects of the data sets are: by their spread the paper argues for kernels of several sizes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from record import provenance, table

from nnunet_lgms.evaluation.by_size import objects_of
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet_files import Reader
from nnunet_lgms.parallel import default_workers, parallel_map

from .sets import DataSet

BINS = 30


def measure(rows: Iterable[DataSet], raw: Path, file: Path) -> None:
    """Adds the diameters of all objects of these sets, in mm or pixels, to a file, by set and label.

    Args:
        rows: the sets.
        raw: ``nnUNet_raw``, with all their cases.
        file: .json.
    """
    found = _sets(file) if file.is_file() else {}
    for row in rows:
        content = read_json(raw / row.name / "dataset.json")
        reader, labels = Reader.of_dataset(content), LabelSet.from_dataset_json(content)
        cases = sorted((raw / row.name / "labelsTr").glob(f"*{content['file_ending']}"))
        of_case = partial(_objects, reader=reader, labels=labels)
        objects = sum(parallel_map(of_case, cases, default_workers(), row.title, threads=True), [])
        by_label = {name: sorted(size for label, size in objects if label == name) for name in labels.regions}
        found[row.title] = {"unit": reader.unit(cases[0]), "cases": len(cases), "diameters": by_label}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({**provenance("cpu"), "sets": found}) + "\n", "utf-8")


def _objects(path: Path, reader: Reader, labels: LabelSet) -> list[tuple[str, float]]:
    """Label and diameter of each object of a case."""
    case = reader.read_labels(path)
    masks = {name: np.isin(case.labels, region) for name, region in labels.regions.items()}
    objects = (objects_of("", "", name, mask, mask, case.spacing) for name, mask in masks.items())
    return [(o.label, round(o.diameter, 1)) for of_label in objects for o in of_label]


def spread_table(file: Path) -> list[str]:
    """A line a label: how many objects, the middle of their diameters, and how far nine tenths of them reach."""
    rows = []
    for title, label, sizes, unit in _labels(file):
        low, middle, high = np.percentile(sizes, (5, 50, 95))
        rows.append([title, label, len(sizes), f"{middle:.3g} {unit}", f"{low:.3g} to {high:.3g}", f"{high / low:.1f}"])
    return table("set | label | objects | median diameter | 5 to 95 % | ratio of these", rows)


def draw(file: Path, picture: Path) -> None:
    """Histograms of the diameters, a panel a set."""
    from matplotlib.figure import Figure

    titles = list(_sets(file))
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes = dict(zip(titles, figure.subplots(2, -(-len(titles) // 2)).flat))
    for axis in figure.axes[len(titles) :]:
        axis.remove()
    for title, label, sizes, unit in _labels(file):
        axis = axes[title]
        axis.hist(sizes, np.geomspace(1, 400, BINS), histtype="step", linewidth=1.5, label=label.replace("_", " "))
        axis.set(xscale="log", xlabel=f"diameter, {unit}", title=title)
        axis.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
        axis.legend(fontsize=8, loc="upper left", frameon=False)
    figure.supylabel("objects")
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _sets(file: Path) -> dict[str, dict]:
    return read_json(file)["sets"]


def _labels(file: Path) -> Iterator[tuple[str, str, list[float], str]]:
    for title, of_set in _sets(file).items():
        for label, sizes in of_set["diameters"].items():
            yield title, label, sizes, of_set["unit"]
