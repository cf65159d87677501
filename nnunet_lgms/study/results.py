"""The numbers of a study, read from what its jobs left behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nnunet_lgms.evaluation.evaluate import FOREGROUND
from nnunet_lgms.evaluation.metrics import METRICS
from nnunet_lgms.evaluation.statistics import Mean, bootstrap_mean, mean_of_defined
from nnunet_lgms.study.graph import Graph, Model

LGMSNET = "LGMSNet"


@dataclass(frozen=True)
class Row:
    """One number of the tables.

    Args:
        cases: "validation" (of all folds), "test", or the name of an unseen data set.
        dataset: what was trained on.
        variant: its name in the study.
        configuration: nnU-Net's; "best" for what find_best_configuration chose.
        label: name of the label, or `FOREGROUND`.
        metric: its name.
        mean: over cases; a case that was predicted several times (seeds, overlapping folds) counts with its mean.
        folds: trained folds that the mean stands on, over all seeds.
        expected: folds that it should stand on.
    """

    cases: str
    dataset: str
    variant: str
    configuration: str
    label: str
    metric: str
    mean: Mean
    folds: int
    expected: int


@dataclass(frozen=True)
class Cost:
    """What a model costs; None where it was not profiled or trained.

    Args:
        parameters: of the network that was trained.
        gmac: multiplications and additions of a forward pass of one patch, in 10^9.
        hours: mean training time of a fold, as nnU-Net logged its epochs.
    """

    parameters: int | None
    gmac: float | None
    hours: float | None


@dataclass(frozen=True)
class WorstCase:
    """A validation case with a low Dice.

    Args:
        case: its name.
        dice: mean over labels.
        report: page with its picture, relative to the study's folder.
    """

    case: str
    dice: float
    report: str


class Results:
    """Everything that a study's report shows.

    Args:
        graph: the study.
        n_resamples: bootstrap samples of each interval.
    """

    def __init__(self, graph: Graph, n_resamples: int = 2000):
        self.graph = graph
        self.n_resamples = n_resamples

    @cached_property
    def done(self) -> dict[str, tuple[list[str], list[str]]]:
        """rule → files that are there, and files that are missing."""
        state = {}
        for rule, files in self.graph.jobs().items():
            there = [file for file in files if self.path(file).is_file()]
            state[rule] = there, [file for file in files if file not in set(there)]
        return state

    def path(self, file: str) -> Path:
        return self.graph.folder / file

    @cached_property
    def rows(self) -> list[Row]:
        """All numbers: validation, test and zero-shot."""
        return [*self._validation_rows(), *self._test_rows(), *self._zeroshot_rows()]

    def models(self) -> list[Model]:
        return [model for dataset in self.graph.datasets for model in self.graph.models(dataset)]

    def folds(self, model: Model) -> Iterator[tuple[str, int]]:
        """Run and fold of every training of a model."""
        for run in self.graph.runs:
            for fold in self.graph.folds(model.dataset):
                yield run, fold

    def cost(self, model: Model) -> Cost:
        """Of one model; see :class:`Cost`."""
        network = network_profile(self.path(self.graph.profile(model)), model.trainer) or {}
        seconds = [record["seconds"] for _, record in self.trainings(model)]
        hours = sum(seconds) / len(seconds) / 3600 if seconds else None
        return Cost(network.get("parameters"), network.get("gmac"), hours)

    def trainings(self, model: Model) -> list[tuple[str, dict]]:
        """Name and record (curves, seconds) of every finished training of a model."""
        files = {f"{run} fold {fold}": self._trained(model, run, fold) for run, fold in self.folds(model)}
        return [(name, json.loads(file.read_text("utf-8"))) for name, file in files.items() if file.is_file()]

    def worst_cases(self, model: Model, n: int = 5) -> list[WorstCase]:
        """Validation cases with the lowest mean Dice over labels, worst first."""
        found = []
        for run, fold in self.folds(model):
            file = self.graph.validated(run, model.dataset, model.name, fold)
            for case, labels in read_cases(self.path(file).with_name("cases.csv")).items():
                dice = np.array([values[METRICS.index("Dice")] for values in labels.values()])
                if not np.isnan(mean := float(mean_of_defined(dice, axis=0))):
                    found.append(WorstCase(case, mean, str(Path(file).with_name("report.html"))))
        return sorted(found, key=lambda worst: worst.dice)[:n]

    def _trained(self, model: Model, run: str, fold: int) -> Path:
        return self.path(self.graph.trained(run, model.dataset, model.name, fold))

    def _validation_rows(self) -> Iterator[Row]:
        for model in self.models():
            files = [
                self.path(self.graph.validated(run, model.dataset, model.name, fold)) for run, fold in self.folds(model)
            ]
            yield from self._rows("validation", model.dataset, model.variant, model.configuration, files)

    def _test_rows(self) -> Iterator[Row]:
        for dataset, own in self.graph.study.datasets.items():
            for variant in self.graph.study.variants if own.test else ():
                files = [self.path(self.graph.tested(run, dataset, variant)) for run in self.graph.runs]
                yield from self._rows("test", dataset, variant, "best", files)

    def _rows(self, cases: str, dataset: str, variant: str, configuration: str, summaries: list[Path]) -> Iterator[Row]:
        there = [file for file in summaries if file.is_file()]
        if not there:
            return
        values: dict[str, list[dict[str, np.ndarray]]] = {}
        for file in there:
            for case, labels in read_cases(file.with_name("cases.csv")).items():
                values.setdefault(case, []).append(labels)
        labels = list(next(iter(values.values()))[0])
        # (cases, labels, metrics), the mean over the predictions of a case
        table = np.stack(
            [mean_of_defined(np.stack([[p[label] for label in labels] for p in ps]), axis=0) for ps in values.values()]
        )
        for label in [*labels, FOREGROUND]:
            columns = slice(None) if label == FOREGROUND else labels.index(label)
            for m, metric in enumerate(METRICS):
                mean = bootstrap_mean(table[:, columns, m], self.n_resamples)
                yield Row(cases, dataset, variant, configuration, label, metric, mean, len(there), len(summaries))

    def _zeroshot_rows(self) -> Iterator[Row]:
        """The mean over seeds of the means; the interval is shown for a single seed only."""
        for model in self.models():
            if not self.graph.study.datasets[model.dataset].zeroshot:
                continue
            files = [self.path(self.graph.zeroshot(run, model.dataset, model.name)) for run in self.graph.runs]
            there = [json.loads(file.read_text("utf-8"))["rows"] for file in files if file.is_file()]
            n_folds = len(self.graph.folds(model.dataset))
            for same in zip(*there):
                row, means = same[0], [Mean(**_with_nan(row["zero_shot"])) for row in same]
                alone = means[0] if len(means) == 1 else None
                mean = alone or Mean(float(np.mean([m.mean for m in means])), np.nan, np.nan, means[0].n)
                only = len({r["label"] for r in there[0]}) == 1  # a single label is the foreground
                names = [row["label"], FOREGROUND] if only else [row["label"]]
                for label in names:
                    where = (row["dataset"], model.dataset, model.variant, model.configuration)
                    folds = (n_folds * len(there), n_folds * len(files))
                    yield Row(*where, label, row["metric"], mean, *folds)


def network_profile(file: Path, trainer: str) -> dict | None:
    """The part of a profile that is about a trainer's network: LGMSNet, or the one that nnU-Net planned."""
    if not file.is_file():
        return None
    ours, theirs = json.loads(file.read_text("utf-8"))["networks"]
    return ours if LGMSNET in trainer else theirs


def read_cases(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """``cases.csv`` of an evaluation: case → label → (metrics,), NaN where undefined; empty if there is none."""
    found: dict[str, dict[str, np.ndarray]] = {}
    if not file.is_file():
        return found
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            values = np.array([float(row[metric] or "nan") for metric in METRICS])
            found.setdefault(row["case"], {})[row["label"]] = values
    return found


def _with_nan(mean: Mapping[str, float | None]) -> dict[str, float]:
    return {key: np.nan if value is None else value for key, value in mean.items()}
