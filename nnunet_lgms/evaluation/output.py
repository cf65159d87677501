"""What an evaluation leaves behind: cases.csv, summary.json, report.html, and a table for the terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lgms.evaluation.evaluate import FOREGROUND, Evaluation, evaluate
from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import CONVENTION, METRICS
from nnunet_lgms.evaluation.page import interval, number, p_value, render, signed, verdict
from nnunet_lgms.files import atomic_write
from nnunet_lgms.locks import locked
from nnunet_lgms.nnunet_files import Reader


def evaluate_into(
    output: Path,
    models: Mapping[str, Path],
    references: Path,
    labels: LabelSet,
    reader: Reader,
    *,
    images: Path | None = None,
    n_worst: int = 6,
    wait: bool = False,
    **options: Any,
) -> tuple[Evaluation, list[Path]]:
    """:func:`evaluate` and :func:`write_all`, while no other evaluation writes to the same folder.

    Args:
        output: folder of the three files.
        models, references, labels, reader: see :func:`evaluate`.
        images, n_worst: see :func:`write_all`.
        wait: let another evaluation end first, instead of refusing.
        options: more of :func:`evaluate`.

    Raises:
        ValueError: see :func:`evaluate`; or another evaluation writes to ``output``.
    """
    with locked(output / ".evaluate.lock", f"evaluation into {output}", wait=wait):
        evaluation = evaluate(models, references, labels, reader, **options)
        return evaluation, write_all(evaluation, output, images=images, n_worst=n_worst)


def write_all(evaluation: Evaluation, output: Path, *, images: Path | None = None, n_worst: int = 6) -> list[Path]:
    """Write the three files of an evaluation: all of them, or on a full disk none, as one tells of the others.

    Args:
        evaluation: the numbers.
        output: folder, made if need be.
        images: folder with the images (nnU-Net's `imagesTr`), for the pictures of the worst cases.
        n_worst: number of those pictures a model.

    Returns:
        The files.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = [output / name for name in ("cases.csv", "summary.json", "report.html")]
    with ExitStack() as stack:
        _write_csv(evaluation, stack.enter_context(atomic_write(files[0])))
        stack.enter_context(atomic_write(files[1])).write_text(json.dumps(summary_json(evaluation), indent=2))
        report = report_html(evaluation, images, n_worst)
        stack.enter_context(atomic_write(files[2])).write_text(report, encoding="utf-8")
    return files


def _write_csv(evaluation: Evaluation, path: Path) -> None:
    """One row a model, case and label; empty where a metric is undefined."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "case", "label", *METRICS])
        for model, values in evaluation.values.items():
            for c, case in enumerate(evaluation.cases):
                for i, label in enumerate(evaluation.labels.regions):
                    row = values[c, i]
                    writer.writerow([model, case, label, *("" if math.isnan(v) else repr(float(v)) for v in row)])


def summary_json(evaluation: Evaluation) -> dict:
    """Everything but the pictures, with null for what is undefined."""
    content = {
        "references": str(evaluation.references),
        "unit": evaluation.unit,
        "nsd_tolerance": evaluation.tolerance,
        "convention": CONVENTION,
        "labels": {name: list(values) for name, values in evaluation.labels.regions.items()},
        "remarks": list(evaluation.remarks),
        "models": {
            model: {
                "predictions": str(folder),
                "mean": {
                    label: {metric: asdict(mean) for metric, mean in means.items()}
                    for label, means in evaluation.summary[model].items()
                },
                "cases": {
                    case: {
                        label: dict(zip(METRICS, evaluation.values[model][c, i].tolist()))
                        for i, label in enumerate(evaluation.labels.regions)
                    }
                    for c, case in enumerate(evaluation.cases)
                },
            }
            for model, folder in evaluation.models.items()
        },
        "tests": {
            label: {metric: [asdict(test) for test in tests] for metric, tests in metrics.items()}
            for label, metrics in evaluation.tests.items()
        },
    }
    return _without_nan(content)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def terminal_table(evaluation: Evaluation) -> str:
    """Means with intervals, a line a model and label."""
    rows = [["model", "label", *METRICS]]
    for model, means in evaluation.summary.items():
        for label in _shown_labels(evaluation):
            cells = [f"{number(m.mean)} {interval(m.low, m.high)}".strip() for m in means[label].values()]
            rows.append([model, label, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def report_html(evaluation: Evaluation, images: Path | None, n_worst: int) -> str:
    """The report as one HTML text that needs no other file."""
    from nnunet_lgms.evaluation import pictures

    labels, unit = list(evaluation.labels.regions), evaluation.unit
    return render(
        __package__,
        "report.html",
        title=f"Evaluation of {', '.join(evaluation.models)}",
        n_cases=len(evaluation.cases),
        references=evaluation.references,
        unit=unit,
        tolerance=f"{evaluation.tolerance:g}",
        remarks=evaluation.remarks,
        convention=CONVENTION,
        metrics=METRICS,
        legend=[{"name": name, "colour": colour} for name, colour in pictures.label_colours(labels).items()],
        models=[
            {"name": model, "rows": _rows(evaluation, model), "worst": _worst(evaluation, model, images, n_worst)}
            for model in evaluation.models
        ],
        tests=_test_rows(evaluation),
        distributions=[
            {"metric": metric}
            | pictures.distribution(
                metric,
                unit if metric == "HD95" else "",
                {model: values[:, :, m] for model, values in evaluation.values.items()},
                labels,
            )
            for m, metric in enumerate(METRICS)
        ],
        curves=_curves(evaluation),
    )


def _curves(evaluation: Evaluation) -> list[dict]:
    """Pictures of models whose predictions have probabilities beside them."""
    from nnunet_lgms.evaluation import curves, pictures

    found = []
    for model in evaluation.models:
        if curves.probability_files(evaluation, model) is None:
            continue
        if calibration := curves.calibration(evaluation, model):
            axes = ("predicted probability", "share of voxels that are the label")
            found.append(pictures.lines(f"Calibration, {model}", axes, calibration, diagonal=True))
        axes = (f"forgiven distance ({evaluation.unit})", "surface Dice (NSD)")
        found.append(pictures.lines(f"Surface Dice, {model}", axes, curves.surface_dice_curve(evaluation, model)))
    return found


def _shown_labels(evaluation: Evaluation) -> list[str]:
    """With a single label its mean is the foreground mean."""
    labels = list(evaluation.labels.regions)
    return labels if len(labels) == 1 else [*labels, FOREGROUND]


def _rows(evaluation: Evaluation, model: str) -> list[dict]:
    return [
        {
            "label": label,
            "is_mean": label == FOREGROUND,
            "cells": [
                {"mean": number(mean.mean), "interval": interval(mean.low, mean.high)}
                for mean in evaluation.summary[model][label].values()
            ],
            "n": evaluation.summary[model][label]["Dice"].n,
        }
        for label in _shown_labels(evaluation)
    ]


def _test_rows(evaluation: Evaluation) -> list[dict]:
    return [
        {
            "label": label,
            "metric": metric,
            "models": f"{test.first} − {test.second}",
            "difference": signed(test.difference),
            "better": test.better,
            "verdict": verdict(test),
            "p": p_value(test.p),
            "p_holm": p_value(test.p_holm),
            "n": test.n,
        }
        for label in (_shown_labels(evaluation) if evaluation.tests else ())
        for metric, tests in evaluation.tests[label].items()
        for test in tests
    ]


def _worst(evaluation: Evaluation, model: str, images: Path | None, n_worst: int) -> list[dict]:
    from nnunet_lgms.evaluation.pictures import case_pictures

    dice = evaluation.foreground_per_case(model, "Dice")
    order = [int(c) for c in np.argsort(dice) if not np.isnan(dice[c])][:n_worst]
    shown = []
    for c in order:
        case, reader = evaluation.cases[c], evaluation.reader
        prediction, reference = evaluation.read_pair(model, case)
        file = images / f"{case}_0000{reader.file_ending}" if images else None
        image = reader.read_image(file)[0] if file and file.exists() else None
        if image is not None and reference.labels.ndim == 2 and image[0].size == reference.labels.size:
            image = image.reshape(len(image), 1, *reference.labels.shape)
        shown.append(
            {"name": case, "dice": number(dice[c])}
            | case_pictures(prediction.labels, reference.labels, evaluation.labels.regions, reference.spacing, image)
        )
    return shown
