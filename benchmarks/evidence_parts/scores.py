"""From the predictions that came back to metrics, with the package's own evaluation."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from record import commit_of

from nnunet_lgms.evaluation.by_size import found_objects
from nnunet_lgms.evaluation.evaluate import evaluate
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.output import summary_json
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet_files import Reader


def score_all(runs: Path, raw: Path, out: Path) -> list[str]:
    """Writes ``out/RUN.json`` for every finished run: its record, its commit, and all scores.

    Args:
        runs: folder with ``RUN/record.json`` and ``RUN/*.npz``.
        raw: ``nnUNet_raw``, for the references.
        out: folder of the results.

    Returns:
        names of the runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    finished = sorted(runs.glob("*/record.json"))
    for file in finished:
        record, scores = read_json(file), {}
        for predictions in sorted(file.parent.glob("*.npz")):
            name = predictions.stem.removesuffix("-mirrored")
            scores[predictions.stem] = score(predictions, raw / (record["dataset"] if name == "validation" else name))
        with atomic_write(out / f"{file.parent.name}.json") as temporary:
            content = record | {"commit": commit_of(record["code"]), "scores": scores}
            temporary.write_text(json.dumps(content) + "\n", "utf-8")
    return [file.parent.name for file in finished]


def score(predictions: Path, dataset: Path) -> dict:
    """Metrics of every case, their means with 95 % bootstrap intervals, and label, diameter and Dice of every object.

    Args:
        predictions: .npz, case → labels (Z, Y, X) on the grid of its reference.
        dataset: folder in ``nnUNet_raw``.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    content = read_json(dataset / "dataset.json")
    writer = determine_reader_writer_from_dataset_json(content, verbose=False)()
    references, labels = dataset / "labelsTr", LabelSet.from_dataset_json(content)
    with tempfile.TemporaryDirectory() as folder, np.load(predictions) as arrays:
        for case in arrays.files:
            name = f"{case}{content['file_ending']}"
            writer.write_seg(arrays[case], str(Path(folder, name)), writer.read_seg(str(references / name))[1])
        result = evaluate({"model": Path(folder)}, references, labels, Reader.of_dataset(content))
        objects = [(o.label, round(o.diameter, 3), round(o.dice, 4)) for o in found_objects(result)]
    # six digits of each number are enough
    found = json.loads(json.dumps(summary_json(result)), parse_float=lambda number: round(float(number), 6))
    model = found["models"]["model"]
    return {"unit": found["unit"], "mean": model["mean"], "cases": model["cases"], "objects": objects}
