"""From the predictions that came back to metrics, with the package's own evaluation."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from record import commit_of

from nnunet_lgms.evaluation.evaluate import evaluate
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import METRICS
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet_files import Reader

from .runs import Run, file_of


def score_all(runs: Path, preprocessed: Path, out: Path) -> list[str]:
    """Writes ``out/RUN.json`` for every run of a bundle that is trained: its record, its commit, and all scores.

    A run whose cases were not all predicted yet, mirrored ones aside, is left out.

    Args:
        runs: folder with ``RUN/record.json`` and ``RUN/*.npz``.
        preprocessed: ``nnUNet_preprocessed``, for the references.
        out: folder of the results.

    Returns:
        names of the runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for file in sorted(runs.glob("*/record.json")):
        record = read_json(file)
        needed = [file_of(*prediction) for prediction in Run.of_record(record).predictions if not prediction[1]]
        if not all((file.parent / name).is_file() for name in needed):
            continue
        commit = commit_of(record["code"])
        scores = {}
        for predictions in sorted(file.parent.glob("*.npz")):
            name = predictions.stem.removesuffix("-mirrored")
            dataset = record["dataset"] if name == "validation" else name
            scores[predictions.stem] = score(predictions, preprocessed / dataset)
        with atomic_write(out / f"{file.parent.name}.json") as temporary:
            temporary.write_text(json.dumps(record | {"commit": commit, "scores": scores}) + "\n", "utf-8")
        done.append(file.parent.name)
    return done


def score(predictions: Path, dataset: Path) -> dict:
    """Metrics of every case and their means, with 95 % bootstrap intervals.

    Args:
        predictions: .npz, case → labels (Z, Y, X) on the grid of its reference.
        dataset: folder in ``nnUNet_preprocessed`` with ``gt_segmentations``.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    content = read_json(dataset / "dataset.json")
    writer = determine_reader_writer_from_dataset_json(content, verbose=False)()
    references, labels = dataset / "gt_segmentations", LabelSet.from_dataset_json(content)
    with tempfile.TemporaryDirectory() as folder, np.load(predictions) as arrays:
        for case in arrays.files:
            name = f"{case}{content['file_ending']}"
            writer.write_seg(arrays[case], str(Path(folder, name)), writer.read_seg(str(references / name))[1])
        result = evaluate({"model": Path(folder)}, references, labels, Reader.of_dataset(content))
    table = result.values["model"]
    return {
        "unit": result.unit,
        "mean": {
            label: {metric: {k: _number(v) for k, v in asdict(mean).items()} for metric, mean in metrics.items()}
            for label, metrics in result.summary["model"].items()
        },
        "cases": {
            case: {
                label: {metric: _number(table[i, j, m]) for m, metric in enumerate(METRICS)}
                for j, label in enumerate(labels.regions)
            }
            for i, case in enumerate(result.cases)
        },
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
