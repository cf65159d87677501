"""Pictures of a study's report: cost beside quality, and training curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from nnunet_lgms.evaluation.evaluate import FOREGROUND
from nnunet_lgms.evaluation.pictures import plain, plain_text, shown
from nnunet_lgms.study.graph import Model
from nnunet_lgms.study.results import Results

COSTS = {"gmac": "GMAC of one patch", "hours": "training hours of a fold"}


@plain_text
def pareto(results: Results) -> list[dict[str, str | int]]:
    """Dice over cost, one picture a data set and configuration; what nothing beats in both is joined by a line."""
    means = {
        (row.dataset, row.configuration, row.variant): row.mean
        for row in results.rows
        if (row.cases, row.metric, row.label) == ("validation", "Dice", FOREGROUND)
    }
    pictures = []
    for title, models in _groups(results):
        known = [(m, means.get((m.dataset, m.configuration, m.variant)), results.cost(m)) for m in models]
        known = [(m, mean, cost) for m, mean, cost in known if mean and not np.isnan(mean.mean)]
        costs = [c for c in COSTS if any(getattr(cost, c) for _, _, cost in known)]
        if not costs:
            continue
        figure = Figure(figsize=(0.6 + 4.2 * len(costs), 3.6), layout="constrained")
        for axes, name in zip(np.ravel(figure.subplots(1, len(costs), sharey=True)), costs):
            points = [(getattr(cost, name), mean, m) for m, mean, cost in known if getattr(cost, name)]
            for x, mean, model in points:
                below, above = np.nan_to_num([mean.mean - mean.low, mean.high - mean.mean])
                style = {"fmt": "o", "ms": 6, "lw": 1.2, "color": _colour(results, model), "label": model.variant}
                axes.errorbar(x, mean.mean, yerr=[[below], [above]], **style)
            front = pareto_front([(x, mean.mean) for x, mean, _ in points])
            axes.plot(*zip(*front), color="#888888", lw=0.8, zorder=0)
            axes.set_xlabel(COSTS[name])
            axes.locator_params(axis="x", nbins=5)
            axes.margins(x=0.12)
            plain(axes)
        figure.axes[0].set_ylabel("Dice")
        named = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize="small")
        pictures.append({"title": title} | shown(figure))
    return pictures


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, quality) that no other point beats in one and matches in the other, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


@plain_text
def training_curves(results: Results) -> list[dict[str, str | int]]:
    """nnU-Net's moving average of the Dice, thin for each training, thick for a variant's mean."""
    pictures = []
    for title, models in _groups(results):
        curves = {m: [np.array(record["ema_fg_dice"]) for _, record in results.trainings(m)] for m in models}
        if not any(curves.values()):
            continue
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for model, lines in curves.items():
            if not lines:
                continue
            colour = _colour(results, model)
            for line in lines:
                axes.plot(np.arange(1, len(line) + 1), line, color=colour, lw=0.5, alpha=0.4)
            shortest = min(map(len, lines))
            mean = np.mean([line[:shortest] for line in lines], axis=0)
            axes.plot(np.arange(1, shortest + 1), mean, color=colour, lw=1.6, label=model.variant)
        axes.set_xlabel("epoch")
        axes.set_ylabel("moving average of Dice")
        plain(axes)
        axes.legend(fontsize="small", ncols=1 + len(models) // 8)
        pictures.append({"title": title} | shown(figure))
    return pictures


def _groups(results: Results) -> list[tuple[str, list[Model]]]:
    """Models of the same data set and configuration."""
    groups: dict[str, list[Model]] = {}
    for model in results.models():
        groups.setdefault(f"{model.dataset.removeprefix('Dataset')} {model.configuration}", []).append(model)
    return list(groups.items())


def _colour(results: Results, model: Model):
    variants = list(results.graph.study.variants)
    return colormaps["tab10" if len(variants) <= 10 else "tab20"](variants.index(model.variant) % 20)
