"""The figure of the report."""

from __future__ import annotations

from pathlib import Path

from nnunet_lgms.files import atomic_write

from .report import README_SETS, Results, difference
from .runs import MODELS

SHOWN = ("lgmsnet", "lgmsnet_nnunetda", "resenc_m")


def draw(folder: Path) -> bool:
    """``evidence.png``: differences of Dice to nnU-Net's U-Net with 95 % intervals, a panel a network, a line a set.

    Returns:
        whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results, lines = Results(folder), {}
    for title, stages, scores in README_SETS:
        found = [(s, e) for s in stages for e in results.schedules(s)[:1] if results.of(s, "nnunet", e)][:1]
        for stage, epochs in found:
            pairs = {name: (results.of(stage, name, epochs), results.of(stage, "nnunet", epochs)) for name in SHOWN}
            lines[title] = {name: difference(*pair, scores, "Dice") for name, pair in pairs.items() if pair[0]}
    if not lines:
        return False
    figure, axes = plt.subplots(
        1, len(SHOWN), figsize=(12, 1.2 + 0.35 * len(lines)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, SHOWN):
        for y, differences in enumerate(lines.values()):
            if name in differences:
                mean, low, high = differences[name]
                axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(MODELS[name].title, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(lines)), list(lines))
    axes[0].invert_yaxis()
    figure.supxlabel("difference of Dice to nnU-Net's U-Net, mirrored, 95 % interval over cases", fontsize=9)
    with atomic_write(folder / "evidence.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
    return True
