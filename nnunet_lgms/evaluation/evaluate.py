"""Evaluate the predictions of one or several models against the same references."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.evaluation.metrics import METRICS, compute_metrics
from nnunet_lgms.evaluation.requirement import require_evaluation_extra
from nnunet_lgms.evaluation.statistics import Mean, PairedTest, bootstrap_mean, compare, mean_of_defined
from nnunet_lgms.nnunet_files import Reader, Segmentation, cases_in
from nnunet_lgms.parallel import default_workers, parallel_map

FOREGROUND = "foreground mean"
"""Name of the mean over all labels."""


@dataclass(frozen=True)
class Evaluation:
    """All numbers of an evaluation.

    Args:
        models: name → folder of its predictions.
        references: folder of the reference labels.
        labels: what was evaluated.
        reader: how files were read.
        tolerance: of NSD, in mm (pixels for flat images).
        unit: of distances.
        cases: names, sorted; the same for all models.
        values: model → (cases, labels, metrics), in the orders of `cases`, `labels.regions` and `METRICS`.
        summary: model → label or `FOREGROUND` → metric → mean over cases.
        tests: label or `FOREGROUND` → metric → tests between all pairs of models.
        remarks: sentences that the user should read.
        mapping: predicted label → reference's label, for models that number them otherwise.
    """

    models: Mapping[str, Path]
    references: Path
    labels: LabelSet
    reader: Reader
    tolerance: float
    unit: str
    cases: tuple[str, ...]
    values: Mapping[str, np.ndarray]
    summary: Mapping[str, Mapping[str, Mapping[str, Mean]]]
    tests: Mapping[str, Mapping[str, list[PairedTest]]]
    remarks: tuple[str, ...]
    mapping: Mapping[int, int] | None = None

    def read_pair(self, model: str, case: str) -> tuple[Segmentation, Segmentation]:
        """Prediction (mapped) and reference of one case."""
        ending = self.reader.file_ending
        files = (cases_in(folder, ending)[case] for folder in (self.models[model], self.references))
        return _read_pair(*files, self.reader, self.mapping)

    def foreground_per_case(self, model: str, metric: str) -> np.ndarray:
        """Mean over labels in every case, (cases,)."""
        return mean_of_defined(self.values[model][:, :, METRICS.index(metric)], axis=1)


@dataclass(frozen=True)
class _Task:
    case: str
    prediction: Path
    reference: Path
    reader: Reader
    labels: LabelSet
    tolerance: float
    mapping: Mapping[int, int] | None


@dataclass(frozen=True)
class _Result:
    case: str
    problem: str = ""
    values: np.ndarray | None = None  # (labels, metrics)
    predicted: frozenset[int] = frozenset()
    annotated: frozenset[int] = frozenset()


def evaluate(
    models: Mapping[str, Path],
    references: Path,
    labels: LabelSet,
    reader: Reader,
    *,
    tolerance: float = 1.0,
    n_resamples: int = 2000,
    mapping: Mapping[int, int] | None = None,
    workers: int | None = None,
) -> Evaluation:
    """Compute all metrics of all cases, their means and, for several models, the tests between them.

    Args:
        models: name → folder with predicted label files, named like the references.
        references: folder with reference label files; those without a prediction are not evaluated.
        labels: what to evaluate.
        reader: nnU-Net's reader of these files.
        tolerance: surface distance that NSD forgives, in mm (pixels for flat images).
        n_resamples: bootstrap samples of each interval.
        mapping: predicted label → reference's label, if models number them otherwise.
        workers: number of threads; default: one per core, at most 8.

    Raises:
        ValueError: a folder has no files, cases are missing, a prediction lies on another grid than its reference, or a
            file holds values that `labels` does not know and, where it is a selection, no file of the other side holds
            either (all are listed on stderr); or no file holds any of `labels`, but others.
        RequirementError: the extra `[evaluation]` is not installed.
    """
    require_evaluation_extra()
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"The NSD tolerance is {tolerance}: give a number of mm that is not negative.")
    if not labels.regions:
        raise ValueError("There is no label to evaluate.")
    known = cases_in(references, reader.file_ending)
    predicted = {model: cases_in(folder, reader.file_ending) for model, folder in models.items()}
    cases, remarks = _common_cases(models, references, predicted, known)
    tasks = {
        (model, case): _Task(case, files[case], known[case], reader, labels, tolerance, mapping)
        for model, files in predicted.items()
        for case in cases
    }
    workers = workers or default_workers()
    outcomes = parallel_map(_evaluate_case, list(tasks.values()), workers, "evaluating", threads=True)
    results = dict(zip(tasks, outcomes))
    _raise_problems(results, known, labels)
    remarks += _absent_labels(results.values(), labels) + _left_out(results.values(), labels)
    values = {model: np.stack([results[model, case].values for case in cases]) for model in models}
    return Evaluation(
        models=dict(models),
        references=references,
        labels=labels,
        reader=reader,
        tolerance=tolerance,
        unit=reader.unit(known[cases[0]]),
        cases=cases,
        values=values,
        summary={model: _summarise(values[model], labels, n_resamples) for model in models},
        tests=_test(values, labels) if len(models) > 1 else {},
        remarks=remarks,
        mapping=mapping,
    )


def _common_cases(
    models: Mapping[str, Path],
    references: Path,
    predicted: Mapping[str, Mapping[str, Path]],
    known: Mapping[str, Path],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for model, cases in predicted.items():
        if orphans := sorted(cases.keys() - known.keys()):
            raise ValueError(
                f"{len(orphans)} prediction(s) in {models[model]} have no reference in {references}, such as "
                f"{cases[orphans[0]].name}: give the folder of their references."
            )
    union = frozenset().union(*predicted.values())
    for model, cases in predicted.items():
        if missing := sorted(union - cases.keys()):
            raise ValueError(
                f"Model {model} lacks {len(missing)} case(s) that another model has, such as {missing[0]}: models can "
                f"only be compared on the same cases."
            )
    remarks = []
    if unpredicted := len(known.keys() - union):
        remarks.append(f"{unpredicted} of {len(known)} references have no prediction and were not evaluated.")
    return tuple(sorted(union)), tuple(remarks)


def _read_pair(
    prediction: Path, reference: Path, reader: Reader, mapping: Mapping[int, int] | None
) -> tuple[Segmentation, Segmentation]:
    predicted = reader.read_labels(prediction)
    if mapping:
        labels = predicted.labels.copy()
        for theirs, ours in mapping.items():
            labels[predicted.labels == theirs] = ours
        predicted = replace(predicted, labels=labels)
    return predicted, reader.read_labels(reference)


def _evaluate_case(task: _Task) -> _Result:
    try:
        prediction, reference = _read_pair(task.prediction, task.reference, task.reader, task.mapping)
    except ValueError as error:
        return _Result(task.case, str(error))
    if difference := prediction.grid.differences(reference.grid, rtol=1e-3):
        return _Result(task.case, f"{task.prediction} and {task.reference} have different {difference}")
    annotated = reference.labels != task.labels.ignore if task.labels.ignore is not None else True
    values = [
        compute_metrics(
            np.isin(prediction.labels, region) & annotated,
            np.isin(reference.labels, region) & annotated,
            prediction.spacing,
            task.tolerance,
        )
        for region in task.labels.regions.values()
    ]
    return _Result(
        task.case,
        values=np.array([[metrics[name] for name in METRICS] for metrics in values]),
        predicted=frozenset(np.unique(prediction.labels).tolist()),
        annotated=frozenset(np.unique(reference.labels).tolist()),
    )


def _raise_problems(
    results: Mapping[tuple[str, str], _Result], references: Mapping[str, Path], labels: LabelSet
) -> None:
    """All faulty cases at once, before anything is written."""
    known_in_references = known_in_predictions = labels.values | {labels.ignore}
    if labels.is_selection:  # then a value is known that both sides hold: one of their labels that was not asked for
        known_in_references = known_in_references.union(*(result.predicted for result in results.values()))
        known_in_predictions = known_in_predictions.union(*(result.annotated for result in results.values()))
    faulty = {}
    for (_, case), result in results.items():
        if unknown := sorted(result.annotated - known_in_references):
            faulty[case] = f"  {_no_label_has(references[case], unknown)}"
    problems = []
    for (model, case), result in results.items():
        if result.problem:
            problems.append(f"  {model}, {case}: {result.problem}")
        elif unknown := sorted(result.predicted - known_in_predictions):
            problems.append(
                f"  {model}, {case}: the prediction has label(s) {_listed(unknown)}, which no reference knows"
            )
    if faulty or problems:
        print("\n".join([*faulty.values(), *problems]), file=sys.stderr)
    if faulty:
        raise ValueError(
            f"{len(faulty)} reference(s) hold values that no label has (listed above), so nothing was written: write "
            f"them with the labels' values, or say with --labels what the others are, such as background=255, or "
            f"ignore=255 for what is not annotated."
        )
    if problems:
        raise ValueError(
            f"{len(problems)} prediction(s) cannot be evaluated (listed above), so nothing was written: predict on the "
            f"references' own grid, and map labels that differ before evaluating."
        )


def check_references(files: Mapping[str, Path], labels: LabelSet, reader: Reader, workers: int | None = None) -> None:
    """See that references hold no other values than labels have, which could not be told from background.

    Args:
        files: case → reference.
        labels: all that they may hold.
        reader: nnU-Net's reader of these files.
        workers: number of threads; default: one per core, at most 8.

    Raises:
        ValueError: some hold others, or cannot be read (they are listed on stderr).
    """

    def problem(path: Path) -> str:
        try:
            values = np.unique(reader.read_labels(path).labels).tolist()
        except ValueError as error:
            return str(error)
        unknown = sorted(set(values) - labels.values - {labels.ignore})
        return _no_label_has(path, unknown) if unknown else ""

    workers = workers or default_workers()
    found = parallel_map(problem, list(files.values()), workers, "checking references", threads=True)
    if problems := [text for text in found if text]:
        print("\n".join(f"  {text}" for text in problems), file=sys.stderr)
        raise ValueError(
            f"{len(problems)} of {len(files)} references hold values that no label of their dataset.json has, or "
            f"cannot be read (listed above): write them anew, or name the values in the dataset.json."
        )


def _no_label_has(reference: Path, values: Sequence[int]) -> str:
    return f"the reference {reference} has the value(s) {_listed(values)}, which no label has"


def _absent_labels(results: Iterable[_Result], labels: LabelSet) -> tuple[str, ...]:
    """A remark on labels that are in no file: their metrics are undefined, which is also how a typing error looks."""
    found = frozenset().union(*(result.predicted | result.annotated for result in results))
    absent = [name for name, values in labels.regions.items() if not found & set(values)]
    others = sorted(found - labels.values - {labels.ignore})
    if len(absent) == len(labels.regions) and others:
        raise ValueError(
            f"No prediction and no reference holds {_listed(absent)}: the files hold the labels {_listed(others)}."
        )
    if absent:
        return (f"No prediction and no reference holds {_listed(absent)}: not evaluated, all metrics are undefined.",)
    return ()


def _left_out(results: Iterable[_Result], labels: LabelSet) -> tuple[str, ...]:
    """Remarks on what a selection of labels leaves out, as a selection may be meant as all."""
    if not labels.is_selection:
        return ()
    annotated = frozenset().union(*(result.annotated for result in results))
    remarks = []
    if others := sorted(annotated - labels.values - {labels.ignore}):
        remarks.append(f"The references also hold {_listed(others)}, which no label has: it counts as background.")
    if labels.ignore in annotated:
        remarks.append(f"Where the references hold {labels.ignore}, the ignore label, nothing is counted.")
    return tuple(remarks)


def _listed(items: Sequence) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def _summarise(values: np.ndarray, labels: LabelSet, n_resamples: int) -> dict[str, dict[str, Mean]]:
    summary = {
        name: {metric: bootstrap_mean(values[:, i, m], n_resamples) for m, metric in enumerate(METRICS)}
        for i, name in enumerate(labels.regions)
    }
    summary[FOREGROUND] = {metric: bootstrap_mean(values[:, :, m], n_resamples) for m, metric in enumerate(METRICS)}
    return summary


def _test(values: Mapping[str, np.ndarray], labels: LabelSet) -> dict[str, dict[str, list[PairedTest]]]:
    tests = {
        name: {metric: compare({k: v[:, i, m] for k, v in values.items()}, metric) for m, metric in enumerate(METRICS)}
        for i, name in enumerate(labels.regions)
    }
    tests[FOREGROUND] = {
        metric: compare({model: mean_of_defined(v[:, :, m], axis=1) for model, v in values.items()}, metric)
        for m, metric in enumerate(METRICS)
    }
    return tests
