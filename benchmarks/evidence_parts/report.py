"""Tables and a picture from the JSONs of ``benchmarks/results``, and the README's section; nothing is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
from record import table

from nnunet_lgms.evaluation.statistics import SIGNIFICANT, Mean, bootstrap_mean, holm
from nnunet_lgms.files import atomic_write, read_json

from .results import Results, Runs, by_size, difference, mean_of, of_both, p_value, spread, verdict
from .runs import MODELS, STAGES
from .sets import SETS, VOLUMES, DataSet
from .sizes import spread_table

BEGIN, END = "<!-- evidence: made by benchmarks/evidence.py report; a test compares -->", "<!-- end of evidence -->"
NOT_RUN = "not run"
REFERENCES = Path(__file__).with_name("references.json")
MIRRORED = "validation-mirrored"
#: whose header holds a nominal spacing: no distance counts
WITHOUT_SPACING = "sets_acdc"
#: stages that are trained no more, and what they are about
OLDER = {
    "busi": "BUSI, the paper's split 1, epochs of one pass",
    "hippocampus": "Hippocampus, fold 0 of nnU-Net's five, epochs of one pass",
    "hippocampus_equal_time": "Hippocampus, longer trainings of LGMSNet alone, among them the shipped model",
    "ablations_busi": "Ablations, BUSI, the published levels",
    "ablations_hippocampus": "Ablations, hippocampus, the planned levels",
}
#: lines of the README's table and of the picture: title, stage, scores
HEADLINES = [
    line
    for stage, row in STAGES.items()
    for line in (
        (row.about.split(";")[0], stage, MIRRORED),
        *((f"zero-shot on {SETS[name].title}", stage, f"{SETS[name].name}-mirrored") for name in row.unseen),
    )
]
#: who is tested against whom
NETWORKS = ("lgmsnet", "lgmsnet_nnunetda", "published")
RIVALS = {"nnunet": "nnU-Net's U-Net", "resenc_m": "ResEnc M"}
SHOWN = ("lgmsnet", "lgmsnet_nnunetda", "resenc_m")  # in the picture

HOW = """How: nnU-Net's own training loop, loader, augmentation and predictor; trainers and plans as in the table. The
last epoch is evaluated, nothing is chosen on the validation cases. In 2D all models have the paper's batch of 16 and
its Dice per sample in place of nnU-Net's batch of 32 and Dice per batch. Scores are without mirroring at prediction
unless the column says so (mirrored: predicted in all orientations, nnU-Net's default). Intervals are 95 % bootstrap
intervals over cases, differences are paired by case; "within noise" is a difference whose interval holds 0, or that is
less than two standard deviations over seeds. Of models that were trained once, a difference can stand out "on these
cases" alone: what another training would give is not in its interval. Step times are medians of steps that had the GPU
to themselves, of the package as it was at the run's commit (see the last table); steps are timed anew on a
[GPU](gpu.md) and on a [CPU](cpu.md)."""
PICTURES = """![differences of Dice to nnU-Net's U-Net with intervals, a panel a network](evidence.png)

![the worst hippocampus cases](evidence_worst_cases.png)"""
SEVEN_SETS = (
    "All networks of a set take equally many steps, in 2D with equal batches; in 3D ResEnc M's planner gives it larger "
    "ones. The last epoch is evaluated. LGMSNet, nnU-Net's U-Net and ResEnc M have the plans of nnU-Net's own planners "
    'and the recipes of their trainers. Training k is split k where a set has several splits, else seed k; "seeds" are '
    "the k that were run. ACDC's header holds a nominal spacing, so no distance of it counts."
)
TESTED = (
    "Differences of Dice, mirrored as nnU-Net predicts by default, with 95 % bootstrap intervals over cases, and p of "
    "Wilcoxon's signed-rank test over the cases, adjusted by Holm's method for all rows that have the same two "
    "networks, by which a set counts as ahead or behind; the tables of the sets go by the intervals, so the two can "
    "differ. Where there is one training, what another would give is in neither."
)
RECIPES = (
    "LGMSNet with the recipe of the paper's 2D experiments, `nnUNetTrainerLGMSNet`, and with that of its released 3D "
    "script, `nnUNetTrainerLGMSNet_paper3D`: the same plans, levels, steps, splits and seeds. Dice, mirrored but for "
    "the last two columns; differences and p as above, adjusted for the sets of this table."
)

SPREAD = (
    "Sizes of all connected objects of the sets, training and test cases: diameters of the disks or balls of their "
    "area or volume, in 2D on the images of 256 × 256 that are trained on; ACDC's millimetres are nominal. What is a "
    "few pixels large is mostly a speck beside an object that somebody drew.\n\n"
    "![histograms of the diameters, a panel a set](evidence_sizes.png)"
)
SIZES = (
    "Every connected object of the references, with the predicted objects that touch it, in quartiles of its diameter "
    "(of the disk or ball of its size); Dice of LGMSNet on the planned levels and of nnU-Net's U-Net, mirrored, and "
    "their difference with a 95 % bootstrap interval over objects, not adjusted for the number of lines. One training "
    "each; sets that were scored before objects were kept are left out."
)


# ---- how numbers look ------------------------------------------------------------------------------------------------


def with_interval(mean: Mean, digits: int = 3) -> str:
    return f"{mean.mean:.{digits}f} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"


def signed(mean: Mean) -> str:
    return f"{mean.mean:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]".replace("-", "\N{MINUS SIGN}")


# ---- evidence.md -----------------------------------------------------------------------------------------------------


def evidence_md(folder: Path) -> str:
    """The whole of ``evidence.md``."""
    results = Results(folder)
    lines = ["# Evidence", "", HOW, "", PICTURES, ""]
    lines += ["## Seven data sets", "", SEVEN_SETS, "", *verdicts(results), ""]
    for stage, row in STAGES.items():
        lines += [f"### {row.about}", "", *stage_lines(results, stage)]
    lines += ["## The paper's two recipes in 3D", "", RECIPES, "", *recipes_in_3d(results), ""]
    spread = [SPREAD, "", *spread_table(folder / "evidence" / "sizes.json")]
    lines += ["## Dice by the size of an object", "", *spread, "", SIZES, "", *sizes_table(results), ""]
    for stage, about in OLDER.items():
        lines += [f"## {about}", "", *stage_lines(results, stage)]
    lines += ["## The authors' own figures", "", *reference_lines(results)]
    lines += ["## Published by others, not measured here", "", *published_lines(), ""]
    lines += ["## What was run, and what was left", "", *runs_table(results, folder / "evidence" / "state.json"), ""]
    return "\n".join(lines)


def verdicts(results: Results) -> list[str]:
    """A line for each of our networks and each rival: the difference on every set, and wins, ties and losses."""
    rows = []
    for name, (rival, called) in product(NETWORKS, RIVALS.items()):
        there = {}
        for stage in STAGES:
            ours, theirs = results.longest(stage, name), results.longest(stage, rival)
            if ours and theirs:
                there[stage] = difference(ours, theirs, MIRRORED), p_value(ours, theirs, MIRRORED)
        adjusted = dict(zip(there, holm([p for _, p in there.values()])))
        cells = [f"{signed(there[s][0])}, p {adjusted[s]:.2g}" if s in there else NOT_RUN for s in STAGES]
        signs = [np.sign(diff.mean) if adjusted[s] < SIGNIFICANT else 0 for s, (diff, _) in there.items()]
        if there:
            ahead_level_behind = " / ".join(str(signs.count(sign)) for sign in (1, 0, -1))
            rows.append([MODELS[name].title, called, *cells, ahead_level_behind])
    titles = " | ".join(row.title for row in STAGES.values())
    return [*table(f" | against | {titles} | ahead / level / behind", rows), "", TESTED]


def recipes_in_3d(results: Results) -> list[str]:
    """A line a set of volumes, with the trainings that both recipes have in common; then which recipe is better."""
    stages = [stage for stage, row in STAGES.items() if row.configuration == VOLUMES]
    pairs = {s: of_both(results.longest(s, "lgmsnet_paper3d"), results.longest(s, "lgmsnet")) for s in stages}
    pairs = {stage: (ours, theirs) for stage, (ours, theirs) in pairs.items() if ours}
    adjusted = dict(zip(pairs, holm([p_value(*pair, MIRRORED) for pair in pairs.values()])))
    rows, said = [], {}
    for stage in stages:
        title = STAGES[stage].title
        if stage not in pairs:
            rows.append([title, NOT_RUN])
            continue
        ours, theirs = pairs[stage]
        found, plain = verdict(ours, theirs, MIRRORED), [cell(ours, theirs, "validation") for cell in (gain, verdict)]
        seeds = ", ".join(str(run["run"]["seed"]) for run in ours)
        means = [with_interval(mean_of(runs, MIRRORED)) for runs in (theirs, ours)]
        rows.append([title, seeds, *means, gain(ours, theirs, MIRRORED), f"{adjusted[stage]:.2g}", found, *plain])
        what = (
            f"is {found.split()[0]} on" if found.startswith(("better", "worse")) else "made no difference that shows on"
        )
        said.setdefault(what, []).append(title)
    compared = "3D against 2D recipe | p | the 3D recipe is | the same, not mirrored | "
    lines = table(f"set | seeds | 2D recipe | 3D recipe | {compared}", rows)
    answer = ", ".join(f"{what} {' and '.join(titles)}" for what, titles in said.items())
    return [*lines, "", f"Mirrored, the 3D recipe {answer}."] if pairs else lines


def sizes_table(results: Results) -> list[str]:
    """A line for each quartile of the diameters of a set's objects: Dice of LGMSNet and of the U-Net."""
    rows = []
    for stage, row in STAGES.items():
        pair = [
            runs[0] for runs in of_both(results.longest(stage, "lgmsnet"), results.longest(stage, "nnunet")) if runs
        ]
        if len(pair) < 2 or not all("objects" in run["scores"][MIRRORED] for run in pair):
            continue
        unit = pair[0]["scores"][MIRRORED]["unit"]
        for label, objects in by_size(*pair, MIRRORED):
            smallest, largest = objects["diameter"].agg(["min", "max"])
            dice = [f"{objects[name].mean():.3f}" for name in ("ours", "theirs")]
            gained = signed(bootstrap_mean((objects["ours"] - objects["theirs"]).to_numpy()))
            rows.append([row.title, label, f"{smallest:.3g} to {largest:.3g} {unit}", len(objects), *dice, gained])
    return table("set | label | diameter | objects | LGMSNet | nnU-Net's U-Net | difference", rows)


def stage_lines(results: Results, stage: str) -> list[str]:
    """The tables of a stage: its validation cases, and what its models were tested on without further training."""
    lines = []
    for epochs in results.schedules(stage):
        lines += [*scores_table(results, stage, epochs, "validation"), ""]
        for row in unseen_by(results, stage):
            lines += [f"The same models, without further training, on {row.about}:", ""]
            lines += [*scores_table(results, stage, epochs, row.name), ""]
    return lines or [f"{NOT_RUN.capitalize()}.", ""]


def unseen_by(results: Results, stage: str) -> list[DataSet]:
    """The sets that a stage's models were tested on; of ablations they are left to the JSONs."""
    tested = {name for run in results.runs if run["run"]["stage"] == stage for name in run["scores"]}
    return [row for row in SETS.values() if row.name in tested and not stage.startswith("ablations")]


def scores_table(results: Results, stage: str, epochs: int, scores: str) -> list[str]:
    """A line a model: scores without mirroring, Dice with it, and differences to nnU-Net's U-Net or the default."""
    titles, mirrored = results.titles(stage), f"{scores}-mirrored"
    models = {name: results.of(stage, epochs, name) for name in titles}
    done = [run for runs in models.values() for run in runs]
    unit = done[0]["scores"][scores]["unit"]
    baseline, called = ("default", "the default") if "default" in titles else ("nnunet", "nnU-Net")
    theirs = models.get(baseline, [])

    def compared(cell: Callable[[Runs, Runs, str], str], way: str) -> Callable[[Runs], str]:
        return lambda runs: cell(runs, theirs, way) if theirs and runs != theirs else ""

    def distance(runs: Runs) -> str:
        mean = with_interval(mean_of(runs, scores, "HD95"), 1 if unit == "pixels" else 2)
        return "no spacing" if stage == WITHOUT_SPACING else mean

    def step(runs: Runs) -> str:
        alone = [run["step_ms_alone"][0] for run in runs if run.get("step_ms_alone")]
        return f"{np.mean(alone):.1f}" if alone else NOT_RUN

    columns = [
        ("parameters", lambda runs: f"{runs[0]['parameters'] / 1e6:.2f} M"),
        ("epochs × steps", lambda runs: f"{epochs} × {runs[0]['iterations_per_epoch']}"),
        ("batch", lambda runs: str(runs[0]["batch_size"])),
        ("seeds", lambda runs: ", ".join(str(run["run"]["seed"]) for run in runs)),
        ("IoU", lambda runs: with_interval(mean_of(runs, scores, "IoU"))),
        ("Dice", lambda runs: with_interval(mean_of(runs, scores))),
        (f"HD95, {unit}", distance),
    ]
    if any(len(runs) > 1 for runs in models.values()):
        columns.append(("SD of seeds", lambda runs: f"{spread(runs, scores):.3f}" if len(runs) > 1 else ""))
    differences = [(f"Dice against {called}", compared(gain, scores)), ("", compared(verdict, scores))]
    if mirrored in done[0]["scores"]:
        columns.append(("Dice, mirrored", lambda runs: with_interval(mean_of(runs, mirrored))))
        differences += [("the same, mirrored", compared(gain, mirrored)), ("", compared(verdict, mirrored))]
    columns += differences
    if any(run.get("step_ms_alone") for run in done):
        columns.append(("step, ms", step))
    cells = {name: [cell(runs) for _, cell in columns] if runs else [NOT_RUN] for name, runs in models.items()}
    heads = ["model", *(head for head, _ in columns)]
    return table(" | ".join(heads), [[titles[name], *row] for name, row in cells.items()])


def gain(ours: Runs, theirs: Runs, scores: str) -> str:
    return signed(difference(ours, theirs, scores))


def reference_lines(results: Results) -> list[str]:
    """The authors' figures for the paper's first split of BUSI and for STU, and ours."""
    authors, lines = read_json(REFERENCES), []
    runs = results.longest("busi", "published")
    for data, title, scores in (("busi", "BUSI, split 1", "validation"), ("stu", "STU", SETS["stu"].name)):
        ranges = (f"{m} {' to '.join(f'{v:.3f}' for v in authors[data][m])}" for m in ("IoU", "Dice"))
        ours = (f"{m} {mean_of(runs, scores, m).mean:.3f}" for m in ("IoU", "Dice"))
        lines.append(f"- {title}: {', '.join(ranges)}; ours, {MODELS['published'].title}: {', '.join(ours)}")
    return [f"Of {authors['what']} ({authors['source']}):", "", *lines, ""]


def published_lines() -> list[str]:
    """Figures of other networks, as their authors published them."""
    published = read_json(REFERENCES)["published"]
    rows = [
        [name, f"{size} M" if size else "", f"{iou:.1f} ± {sd:.1f}"] for name, size, iou, sd in published["networks"]
    ]
    about = f"{published['what']} ({published['source']}). Splits, recipes and the choice of the epoch are theirs."
    return [about, "", *table("network | parameters | IoU, %", rows)]


def runs_table(results: Results, state: Path) -> list[str]:
    rows = []
    for run in results.runs:
        versions = f"torch {run['versions']['torch']}, nnunetv2 {run['versions']['nnunetv2']}"
        about = [run["date"], run["device"], versions, (run["commit"] or "")[:12] or "not committed"]
        rows.append([f"`{run['name']}`", *about, f"{run['seconds']:.0f}", f"{run['waiting_for_batches']:.0%}"])
    left = {name: what for name, what in read_json(state).items() if name not in {run["name"] for run in results.runs}}
    rows += [[f"`{name}`", what] for name, what in left.items()]
    times = "s of training beside others | waiting for batches, at most"
    return table(f"run | date | device | versions | commit | {times}", rows)


# ---- the README and the picture --------------------------------------------------------------------------------------


def readme_with(readme: str, folder: Path) -> str:
    """The README with accuracy and cost beside nnU-Net's U-Net between its two markers.

    Raises:
        ValueError: it lacks the markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"The README needs the lines {BEGIN!r} and {END!r}, once each.")
    before, rest = readme.split(BEGIN)
    where = (
        "[All runs, tests and ablations](benchmarks/results/evidence.md); [model card](docs/explanation/model_card.md)."
    )
    section = [*readme_accuracy(Results(folder)), "", *readme_cost(read_json(folder / "gpu.json")), "", where]
    return "\n".join([before + BEGIN, *section, END]) + rest.split(END)[1]


def headlines(results: Results) -> Iterator[tuple[str, str, dict[str, tuple[Runs, Runs]]]]:
    """Title, scores, and for each network its runs and the U-Net's beside them: of the newest stage that has both."""
    for title, stage, scores in HEADLINES:
        pairs = {}
        for of in (stage.removeprefix("sets_"), stage):  # the newest last
            if theirs := results.longest(of, "nnunet"):
                runs = {name: results.longest(of, name) for name in ("nnunet", *SHOWN)}
                pairs |= {name: (ours, theirs) for name, ours in runs.items() if ours}
        if pairs:
            yield title, scores, pairs


def readme_accuracy(results: Results) -> list[str]:
    """Dice as nnU-Net predicts by default."""
    rows, steps, older = [], [], ""
    for title, scores, pairs in headlines(results):
        baseline, _ = pairs["nnunet"]
        cells = []
        for ours, theirs in (pairs.get(name, ((), baseline)) for name in NETWORKS[:2]):
            cells.append(f"{mean_of(ours, scores).mean:.3f} ({gain(ours, theirs, scores)})" if ours else NOT_RUN)
            steps += [run["iterations"] for run in theirs]
            if theirs != baseline:
                cells[-1] += " \\*"
                older = " \\* Older trainings, beside their own U-Net."
        rivals = (pairs.get(name, ((), ()))[0] for name in RIVALS)
        rivals = ", ".join(f"{mean_of(runs, scores).mean:.3f}" if runs else NOT_RUN for runs in rivals)
        rows.append([title, *cells, rivals])
    names = "LGMSNet, paper's augmentation | LGMSNet, nnU-Net's augmentation"
    return [
        *table(f"Dice | {names} | {', '.join(RIVALS.values())}", rows),
        "",
        f"One training each, {min(steps):,} to {max(steps):,} steps (nnU-Net's default: 250,000); in brackets the "
        f"difference to the U-Net, 95 % interval: with 0 inside, none was shown.{older}",
    ]


def readme_cost(measured: list[dict]) -> list[str]:
    """A step beside the U-Net's of the same run, each compiled as its trainer compiles it, from ``gpu.json``."""
    rows, devices = [], {}
    for case, title in (("3d", "3D, 2 × 128³"), ("2d", "2D, 16 × 256²")):
        usual = [row for row in measured if row["case"] == case and "failed" not in row and not row.get("size")]
        pair = [
            next((row for row in usual if (row["network"], row["mode"]) == which), None)
            for which in (("lgmsnet", "graphs"), ("plain", "compiled"))
        ]
        if None in pair or pair[0]["run"] != pair[1]["run"]:
            raise ValueError(f"gpu.json has no LGMSNet and U-Net of one run in {case}: measure both with gpu.py.")
        cells = []
        for key, unit, digits in (("train_ms", "ms", 1), ("infer_ms", "ms", 1), ("train_gib", "GiB", 2)):
            a, b = (row[key][0] if isinstance(row[key], list) else row[key] for row in pair)
            cells.append(f"{a / b:.2f} ({a:.{digits}f}/{b:.{digits}f} {unit})")
        rows.append([title, *cells])
        devices[pair[0]["device"]] = None
    networks = f"LGMSNet, five levels / U-Net, {', '.join(devices)}"
    return table(f"{networks} | training step | prediction | training memory", rows)


def draw(folder: Path) -> None:
    """``evidence.png``: differences of Dice to nnU-Net's U-Net with 95 % intervals, a panel a network, a line a set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = list(headlines(Results(folder)))
    figure, axes = plt.subplots(
        1, len(SHOWN), figsize=(12, 1.2 + 0.35 * len(lines)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, name in zip(axes, SHOWN):
        for y, (_, scores, pairs) in enumerate(lines):
            if name in pairs:
                diff = difference(*pairs[name], scores)
                ends = [[diff.mean - diff.low], [diff.high - diff.mean]]
                axis.errorbar(diff.mean, y, xerr=ends, fmt="o", capsize=3, color="C0")
            else:
                at_the_right = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center"}
                axis.text(0.97, y, NOT_RUN, color="0.5", fontsize=8, **at_the_right)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(MODELS[name].title.replace(", ", ",\n", 1), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(lines)), [title for title, _, _ in lines])
    axes[0].invert_yaxis()
    figure.supxlabel(
        "difference of Dice to nnU-Net's U-Net, mirrored, 95 % interval over cases; right of 0: above the U-Net",
        fontsize=9,
    )
    with atomic_write(folder / "evidence.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
