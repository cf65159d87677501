"""``report.html`` and ``results.csv``: what a study found, and what is missing."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from nnunet_lgms.evaluation.evaluate import FOREGROUND
from nnunet_lgms.evaluation.metrics import METRICS
from nnunet_lgms.evaluation.page import interval, number, render
from nnunet_lgms.evaluation.requirement import require_evaluation_extra
from nnunet_lgms.files import atomic_write
from nnunet_lgms.study import pictures
from nnunet_lgms.study.graph import Graph
from nnunet_lgms.study.results import Results, Row

CSV_HEADER = ("cases", "dataset", "variant", "configuration", "label", "metric", "mean", "low", "high", "n", "folds")


def write(graph: Graph, output: Path) -> None:
    """Writes ``report.html`` to `output` and ``results.csv`` beside it, with what there is.

    Raises:
        RequirementError: the extra `[evaluation]` is not installed.
    """
    require_evaluation_extra()
    results = Results(graph)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output.with_name("results.csv")) as temporary, temporary.open("w", newline="") as file:
        _write_csv(results, csv.writer(file))
    with atomic_write(output) as temporary:
        temporary.write_text(report_html(results), "utf-8")
    missing = sum(len(files) for _, files in results.done.values())
    print(f"Written: {output}, {output.with_name('results.csv')}" + (f"; {missing} jobs are missing" * bool(missing)))


def _write_csv(results: Results, writer) -> None:
    writer.writerow([*CSV_HEADER, "folds_expected", "parameters", "gmac", "train_hours_per_fold"])
    costs = {(model.dataset, model.variant, model.configuration): results.cost(model) for model in results.models()}
    for row in results.rows:
        cost = costs.get((row.dataset, row.variant, row.configuration))
        tail = (cost.parameters, cost.gmac, cost.hours) if cost else (None, None, None)
        cells = [row.mean.mean, row.mean.low, row.mean.high, row.mean.n, row.folds, row.expected, *tail]
        names = (row.cases, row.dataset, row.variant, row.configuration, row.label, row.metric)
        writer.writerow([*names, *("" if c is None or math.isnan(c) else c for c in cells)])


def report_html(results: Results) -> str:
    """The page; pictures are inside, and links lead to the folds' own reports beside it."""
    graph = results.graph
    hours = sum(record["seconds"] for model in results.models() for _, record in results.trainings(model)) / 3600
    return render(
        __package__,
        "report.html",
        title=graph.study.name,
        device="GPU" if graph.study.device == "cuda" else "CPU",
        hours=f"{hours:.1f}" if hours >= 1 else f"{hours:.3f}",
        progress=[{"rule": r, "done": len(there), "of": len(there) + len(m)} for r, (there, m) in results.done.items()],
        missing=[
            {"rule": rule, "jobs": [_job(f) for f in files]} for rule, (_, files) in results.done.items() if files
        ],
        tables=_tables(results),
        zeroshot=_zeroshot_tables(results),
        costs=_cost_rows(results),
        pareto=pictures.pareto(results),
        curves=pictures.training_curves(results),
        worst=_worst(results),
    )


def _job(file: str) -> dict[str, str]:
    """What a missing file would have been, and the log of its job."""
    return {"name": " ".join(Path(file).with_suffix("").parts).replace("done ", ""), "file": file}


def _tables(results: Results) -> list[dict]:
    """One table of variants × data sets for each metric, of validation and of test cases."""
    tables = []
    for cases, title in (("validation", "Cross-validation"), ("test", "Test cases, with the best configuration")):
        for metric in METRICS:
            rows = [r for r in results.rows if (r.cases, r.metric, r.label) == (cases, metric, FOREGROUND)]
            if rows:
                tables.append(_table(results, rows, title, metric, lambda r: (r.dataset, r.configuration)))
    return tables


def _zeroshot_tables(results: Results) -> list[dict]:
    tables = []
    for metric in ("Dice", "HD95"):
        known = ("validation", "test")
        rows = [r for r in results.rows if r.cases not in known and (r.metric, r.label) == (metric, FOREGROUND)]
        if rows:
            tables.append(
                _table(
                    results,
                    rows,
                    "Zero-shot",
                    metric,
                    lambda r: (f"{r.dataset} → {r.cases.removeprefix('Dataset')}", r.configuration),
                )
            )
    return tables


def _table(results: Results, rows: list[Row], title: str, metric: str, column_of) -> dict:
    columns = list(dict.fromkeys(column_of(row) for row in rows))
    cells = {(row.variant, column_of(row)): row for row in rows}
    return {
        "title": title,
        "metric": metric,
        "columns": [f"{dataset.removeprefix('Dataset')} {configuration}" for dataset, configuration in columns],
        "rows": [
            {"variant": variant, "cells": [_cell(cells.get((variant, column))) for column in columns]}
            for variant in results.graph.study.variants
        ],
    }


def _cell(row: Row | None) -> dict:
    if row is None:
        return {"mean": "missing", "interval": "", "partial": "", "missing": True}
    partial = f"{row.folds} of {row.expected} folds" if row.cases == "validation" and row.folds < row.expected else ""
    shown = interval(row.mean.low, row.mean.high)
    return {"mean": number(row.mean.mean), "interval": shown, "partial": partial, "missing": False}


def _cost_rows(results: Results) -> list[dict]:
    rows = []
    for model in results.models():
        cost = results.cost(model)
        rows.append(
            {
                "dataset": model.dataset.removeprefix("Dataset"),
                "configuration": model.configuration,
                "variant": model.variant,
                "parameters": f"{cost.parameters:,}" if cost.parameters else "–",
                "gmac": f"{cost.gmac:.3g}" if cost.gmac else "–",
                "hours": f"{cost.hours:.3g}" if cost.hours else "–",
            }
        )
    return rows


def _worst(results: Results) -> list[dict]:
    found = []
    for model in results.models():
        if cases := results.worst_cases(model):
            title = f"{model.dataset.removeprefix('Dataset')} {model.configuration}, {model.variant}"
            links = [{"case": c.case, "dice": number(c.dice), "report": c.report} for c in cases]
            found.append({"title": title, "cases": links})
    return found
