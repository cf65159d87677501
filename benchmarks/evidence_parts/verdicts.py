"""The seven data sets side by side: a table a set, and who is ahead where, tested."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_lgms.evaluation.statistics import holm

from .report import MIRRORED, NOT_RUN, Results, difference, per_case, signed, stage_lines, table
from .runs import MODELS, STAGES
from .sets import SETS

NETWORKS = ("lgmsnet", "lgmsnet_nnunetda", "published")  # ours, each against both of
RIVALS = {"nnunet": "nnU-Net's U-Net", "resenc_m": "ResEnc M"}
LEVEL = 0.05

HOW = """All networks of a set take equally many steps, in 2D with equal batches; the last epoch is evaluated. LGMSNet,
nnU-Net's U-Net and ResEnc M have the plans of nnU-Net's own planners and the recipes of their trainers. Training k is
split k where a set has several splits, else seed k; "seeds" are the k that were run. ACDC's header holds a nominal
spacing, so no distance of it counts."""
TESTED = """Differences of Dice, mirrored as nnU-Net predicts by default, with 95 % bootstrap intervals over cases, and
p of Wilcoxon's signed-rank test over the cases, adjusted by Holm's method for all rows that have the same two networks.
Where there is one training, what another would give is in neither."""


def seven_lines(results: Results) -> list[str]:
    """The section of ``evidence.md``."""
    lines = ["## Seven data sets", "", " ".join(HOW.split()), "", *verdicts(results), ""]
    for stage, row in STAGES.items():
        unseen = [SETS[name].name for name in row.unseen]
        lines += [f"### {row.about}", "", *stage_lines(results, stage, unseen, distances=row.title != "ACDC")]
    return lines


def p_value(ours: Sequence[dict], theirs: Sequence[dict]) -> float:
    """Of Wilcoxon's signed-rank test over the cases that both have; 1 where they do not differ."""
    from scipy.stats import wilcoxon

    a, b = (per_case(runs, MIRRORED, "Dice") for runs in (ours, theirs))
    differences = np.array([a[case] - b[case] for case in a if case in b])
    differences = differences[np.isfinite(differences)]
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0


def verdicts(results: Results) -> list[str]:
    """A line for each of our networks and each rival: the difference on every set, and wins, ties and losses."""
    rows = []
    for name in NETWORKS:
        for rival, called in RIVALS.items():
            there, cells = {}, []
            for stage in STAGES:
                for epochs in results.schedules(stage)[:1]:
                    pair = results.of(stage, name, epochs), results.of(stage, rival, epochs)
                    if all(pair) and all(MIRRORED in run["scores"] for runs in pair for run in runs):
                        there[stage] = difference(*pair, MIRRORED, "Dice"), p_value(*pair)
            adjusted = dict(zip(there, holm([p for _, p in there.values()])))
            won = {stage: adjusted[stage] < LEVEL and np.sign(there[stage][0][0]) for stage in there}
            for stage in STAGES:
                said = f"{signed(there[stage][0])}, p {adjusted[stage]:.2g}" if stage in there else NOT_RUN
                cells.append(said)
            counts = [sum(w == sign for w in won.values()) for sign in (1, 0, -1)]
            if there:
                rows.append([MODELS[name].title, called, *cells, " / ".join(map(str, counts))])
    if not rows:
        return [f"{NOT_RUN.capitalize()}."]
    heads = ["", "against", *(row.title for row in STAGES.values()), "ahead / level / behind"]
    return [*table(heads, rows), "", " ".join(TESTED.split())]
