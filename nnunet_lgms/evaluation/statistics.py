"""Means with bootstrap intervals, and paired tests between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nnunet_lgms.evaluation.metrics import LOWER_IS_BETTER

SIGNIFICANT = 0.05
"""Of p, corrected for the number of pairs of models: below it a difference is shown."""


@dataclass(frozen=True)
class Mean:
    """A mean over cases.

    Args:
        mean: NaN if no case has a value.
        low: lower end of the 95 % interval, NaN for fewer than two cases.
        high: upper end.
        n: number of cases that have a value.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedTest:
    """A paired Wilcoxon signed-rank test, two-sided, of two models on the same cases.

    Args:
        first: name of one model.
        second: name of the other.
        difference: mean of first - second over the cases that both have a value for.
        better: name of the model that is better, with ``p_holm`` below `SIGNIFICANT`; empty if no difference is shown.
        p: as tested.
        p_holm: corrected for the number of pairs of models (Holm).
        n: number of cases.
    """

    first: str
    second: str
    difference: float
    better: str
    p: float
    p_holm: float
    n: int


def bootstrap_mean(values: np.ndarray, n_resamples: int = 2000, seed: int = 0) -> Mean:
    """Mean over cases with a 95 % percentile bootstrap interval; cases are drawn as a whole.

    Args:
        values: (cases,), or (cases, labels): then the mean over labels of the means over cases, which is nnU-Net's
            foreground mean. NaN are left out, as nnU-Net does.
        n_resamples: number of bootstrap samples.
        seed: of the random numbers.
    """
    columns = values[:, None] if values.ndim == 1 else values
    columns = columns[:, ~np.isnan(columns).all(axis=0)]
    columns = columns[~np.isnan(columns).all(axis=1)]
    n = len(columns)
    if columns.size == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    mean = float(np.nanmean(columns, axis=0).mean())
    if n < 2:
        return Mean(mean, float("nan"), float("nan"), n)
    from scipy.stats import bootstrap

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        return mean_of_defined(np.stack([mean_of_defined(sample, axis) for sample in samples]), 0)

    interval = bootstrap(
        tuple(columns.T),
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=n_resamples,
        batch=max(1, 10**7 // columns.size),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Mean(mean, float(interval.low), float(interval.high), n)


def mean_of_defined(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis of what is not NaN; NaN, and no warning, where nothing else is there."""
    count = np.count_nonzero(~np.isnan(values), axis=axis)
    return np.divide(np.nansum(values, axis=axis), count, out=np.full(count.shape, np.nan), where=count > 0)


def compare(values: Mapping[str, np.ndarray], metric: str) -> list[PairedTest]:
    """Test every pair of models.

    Args:
        values: model → (cases,), the same cases in the same order; NaN where undefined.
        metric: its name, which tells what is better.
    """
    pairs = list(combinations(values, 2))
    raw = [_wilcoxon(values[first], values[second]) for first, second in pairs]
    corrected = holm([p for _, p, _ in raw])
    tests = []
    for (first, second), (difference, p, n), p_holm in zip(pairs, raw, corrected):
        better = ""
        if difference and p_holm < SIGNIFICANT:
            better = first if (difference > 0) != (metric in LOWER_IS_BETTER) else second
        tests.append(PairedTest(first, second, difference, better, p, p_holm, n))
    return tests


def _wilcoxon(first: np.ndarray, second: np.ndarray) -> tuple[float, float, int]:
    from scipy.stats import wilcoxon

    difference = (first - second)[~np.isnan(first - second)]
    if len(difference) == 0:
        return float("nan"), float("nan"), 0
    # without any difference the test has nothing to rank
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return float(difference.mean()), p, len(difference)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stay NaN and do not count."""
    p = np.asarray(p_values, float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    corrected, largest = np.full(len(p), np.nan), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected.tolist()
