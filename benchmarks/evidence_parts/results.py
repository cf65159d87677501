"""What was measured, as the JSONs hold it, and two networks compared on the same cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_lgms.evaluation.statistics import Mean, bootstrap_mean, compare
from nnunet_lgms.files import read_json

from .runs import MODELS, STAGES, models_of

WITHIN_NOISE, NOT_COMPARABLE = "within noise", "not comparable"
ONE_TRAINING = " on these cases"  # what another training would give is not in the interval

Runs = Sequence[dict[str, Any]]  # of one model, one a seed
OBJECT = ["label", "diameter", "dice"]  # as `score` writes it
FEWEST_OBJECTS = 5  # of a size of which a mean says something


class Results:
    """The finished runs.

    Args:
        folder: ``benchmarks/results``.
    """

    def __init__(self, folder: Path):
        contents = [read_json(file) | {"name": file.stem} for file in sorted((folder / "evidence").glob("*.json"))]
        self.runs = [content for content in contents if "scores" in content]

    def schedules(self, stage: str) -> list[int]:
        """Epochs of the stage's runs, the longest first."""
        return sorted({r["run"]["epochs"] for r in self.runs if r["run"]["stage"] == stage}, reverse=True)

    def of(self, stage: str, epochs: int, model: str) -> Runs:
        wanted = {"stage": stage, "epochs": epochs, "model": model}
        return [run for run in self.runs if wanted.items() <= run["run"].items()]

    def longest(self, stage: str, model: str) -> Runs:
        """Those with the stage's longest schedule."""
        return [run for epochs in self.schedules(stage)[:1] for run in self.of(stage, epochs, model)]

    def titles(self, stage: str) -> dict[str, str]:
        """Model → what the tables call it; of stages that are trained no more, the models that were."""
        if stage in STAGES:
            return {name: model.title for name, model in models_of(STAGES[stage]).items()}
        found = {r["run"]["model"]: r["title"] for r in self.runs if r["run"]["stage"] == stage}
        return {name: found[name] for name in ("default", *MODELS, *found) if name in found}


def per_case(runs: Runs, scores: str, metric: str = "Dice") -> pd.Series:
    """Case → metric, the mean over labels, then over seeds; NaN where no label or one of the seeds has none."""
    tables = [pd.DataFrame(run["scores"][scores]["cases"]).map(itemgetter(metric)) for run in runs]
    values = pd.concat([table.astype(float).mean() for table in tables])
    return values.groupby(level=0, sort=False).apply(lambda seeds: seeds.mean(skipna=False))


def of_both(ours: Runs, theirs: Runs) -> tuple[Runs, Runs]:
    """The trainings whose seeds both have, in the order of the seeds."""
    seeds = sorted({run["run"]["seed"] for run in ours} & {run["run"]["seed"] for run in theirs})
    by_seed = [{run["run"]["seed"]: run for run in runs} for runs in (ours, theirs)]
    return [by_seed[0][seed] for seed in seeds], [by_seed[1][seed] for seed in seeds]


def mean_of(runs: Runs, scores: str, metric: str = "Dice") -> Mean:
    """The mean over cases with its 95 % bootstrap interval."""
    return bootstrap_mean(per_case(runs, scores, metric).to_numpy())


def difference(ours: Runs, theirs: Runs, scores: str, metric: str = "Dice") -> Mean:
    """The same of ours - theirs, paired by case."""
    return bootstrap_mean((per_case(ours, scores, metric) - per_case(theirs, scores, metric)).to_numpy())


def p_value(ours: Runs, theirs: Runs, scores: str) -> float:
    """Of Wilcoxon's signed-rank test of Dice over the cases that both have."""
    pair = per_case(ours, scores).align(per_case(theirs, scores), join="inner")
    (test,) = compare({name: values.to_numpy() for name, values in zip("ab", pair)}, "Dice")
    return test.p


def by_size(ours: dict[str, Any], theirs: dict[str, Any], scores: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each label with the objects in a quartile of diameters, small ones first: `diameter`, Dice `ours`, `theirs`.

    Labels with fewer than FEWEST_OBJECTS in a quartile are left out.
    """
    tables = [pd.DataFrame(run["scores"][scores]["objects"]).set_axis(OBJECT, axis=1) for run in (ours, theirs)]
    objects = tables[0].rename(columns={"dice": "ours"}).assign(theirs=tables[1]["dice"])
    for label, own in objects.groupby("label", sort=False):
        quartiles = own.groupby(pd.qcut(own["diameter"], 4, duplicates="drop"), observed=True)
        if quartiles.size().min() >= FEWEST_OBJECTS:
            yield from ((label, quartile) for _, quartile in quartiles)


def spread(runs: Runs, scores: str) -> float:
    """Standard deviation over seeds of the mean Dice; 0 for one seed."""
    means = [per_case([run], scores).mean() for run in runs]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def verdict(ours: Runs, theirs: Runs, scores: str) -> str:
    """Whether the difference of Dice stands out from cases and seeds."""
    found = difference(ours, theirs, scores)
    if not np.isfinite([found.mean, found.low, found.high]).all():
        return NOT_COMPARABLE
    if found.low <= 0 <= found.high or abs(found.mean) <= 2 * max(spread(ours, scores), spread(theirs, scores)):
        return WITHIN_NOISE
    one = ONE_TRAINING if min(len(ours), len(theirs)) == 1 else ""
    return ("better" if found.mean > 0 else "worse") + one
