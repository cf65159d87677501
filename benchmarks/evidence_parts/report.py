"""Tables from the JSONs of ``benchmarks/results``, and the README's section; nothing is typed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_lgms.evaluation.statistics import bootstrap_mean
from nnunet_lgms.files import atomic_write, read_json

from .runs import MODELS, STAGES, models_of
from .sets import SETS

BEGIN, END = "<!-- evidence: made by benchmarks/evidence.py report; a test compares -->", "<!-- end of evidence -->"
NOT_RUN = "not run"
MIRRORED = "validation-mirrored"
REFERENCES = Path(__file__).with_name("references.json")
MINUS = "\N{MINUS SIGN}"
STU = SETS["stu"].name
#: trainings of other stages, which are made no more: what they are about, and what they were tested on
OLDER = {
    "busi": ("BUSI, the paper's split 1, epochs of one pass", [STU]),
    "hippocampus": ("Hippocampus, fold 0 of nnU-Net's five, epochs of one pass", []),
    "hippocampus_equal_time": ("Hippocampus, longer trainings of LGMSNet alone, among them the shipped model", []),
    "ablations_busi": ("Ablations, BUSI, the published levels", []),
    "ablations_hippocampus": ("Ablations, hippocampus, the planned levels", []),
}
# rows of the README's table: title, stages that measure it (the first that was run counts), scores
README_SETS = [
    *((data.about.split(";")[0], [f"sets_{name}"], MIRRORED) for name, data in SETS.items() if name not in OLDER),
    ("BUSI, breast ultrasound", ["sets_busi", "busi"], MIRRORED),
    ("the same models on STU, another hospital", ["sets_busi", "busi"], f"{STU}-mirrored"),
    ("hippocampus, MRI", ["sets_hippocampus", "hippocampus"], MIRRORED),
]
WITHIN_NOISE, NOT_COMPARABLE = "within noise", "not comparable"
ONE_TRAINING = " on these cases"  # what another training would give is not in the interval


class Results:
    """Everything that was measured.

    Args:
        folder: ``benchmarks/results``.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        contents = [read_json(file) | {"name": file.stem} for file in sorted((folder / "evidence").glob("*.json"))]
        self.runs = [content for content in contents if "scores" in content]
        self.state = self.read("evidence/state.json") or {}

    def read(self, name: str):
        return read_json(self.folder / name) if (self.folder / name).is_file() else None

    def schedules(self, stage: str) -> list[int]:
        """Epochs of the stage's runs, the longest first."""
        return sorted({r["run"]["epochs"] for r in self.runs if r["run"]["stage"] == stage}, reverse=True)

    def of(self, stage: str, model: str, epochs: int) -> list[dict]:
        """The finished runs of a model, one a seed."""
        wanted = (stage, model, epochs)
        return [r for r in self.runs if (r["run"]["stage"], r["run"]["model"], r["run"]["epochs"]) == wanted]

    def titles(self, stage: str) -> dict[str, str]:
        """Model → what the tables call it; of stages that are trained no more, the models that were."""
        if stage in STAGES:
            return {name: model.title for name, model in models_of(STAGES[stage]).items()}
        found = {r["run"]["model"]: r["title"] for r in self.runs if r["run"]["stage"] == stage}
        return {name: found[name] for name in ("default", *MODELS, *found) if name in found}


def per_case(runs: Sequence[dict], scores: str, metric: str) -> dict[str, float]:
    """Case → metric, the mean over labels and seeds. NaN where undefined."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for case, labels in run["scores"][scores]["cases"].items():
            numbers = [np.nan if m[metric] is None else m[metric] for m in labels.values()]
            values.setdefault(case, []).append(float(np.nanmean(numbers)) if not np.isnan(numbers).all() else np.nan)
    return {case: float(np.mean(v)) for case, v in values.items()}


def interval(runs: Sequence[dict], scores: str, metric: str) -> tuple[float, float, float]:
    """Mean over cases with its 95 % bootstrap interval."""
    mean = bootstrap_mean(np.array(list(per_case(runs, scores, metric).values())))
    return mean.mean, mean.low, mean.high


def difference(ours: Sequence[dict], theirs: Sequence[dict], scores: str, metric: str) -> tuple[float, float, float]:
    """Mean over cases of ours - theirs, paired, with its 95 % bootstrap interval."""
    a, b = per_case(ours, scores, metric), per_case(theirs, scores, metric)
    mean = bootstrap_mean(np.array([a[case] - b[case] for case in a if case in b]))
    return mean.mean, mean.low, mean.high


def spread(runs: Sequence[dict], scores: str, metric: str) -> float:
    """Standard deviation over seeds of the mean over cases; 0 for one seed."""
    means = [np.nanmean(list(per_case([run], scores, metric).values())) for run in runs]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def noise(diff: tuple[float, float, float], *spreads: float) -> str:
    """Whether a difference stands out from cases and seeds."""
    if not np.isfinite(diff).all():
        return NOT_COMPARABLE
    inside = diff[1] <= 0 <= diff[2] or abs(diff[0]) <= 2 * max(spreads, default=0.0)
    return WITHIN_NOISE if inside else ("better" if diff[0] > 0 else "worse")


# ---- how numbers look ------------------------------------------------------------------------------------------------


def with_interval(values: tuple[float, float, float], digits: int = 3) -> str:
    return f"{values[0]:.{digits}f} [{values[1]:.{digits}f}, {values[2]:.{digits}f}]"


def signed(values: tuple[float, float, float]) -> str:
    low, mean, high = (f"{v:+.3f}".replace("-", MINUS) for v in (values[1], values[0], values[2]))
    return f"{mean} [{low}, {high}]"


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# ---- the tables ------------------------------------------------------------------------------------------------------


def scores_table(results: Results, stage: str, epochs: int, scores: str, distances: bool = True) -> list[str]:
    """A line a model: scores without mirroring, Dice with it, and differences to nnU-Net's U-Net or the default."""
    titles, models = results.titles(stage), {}
    for name in titles:
        models[name] = results.of(stage, name, epochs)
    baseline = "default" if "default" in titles else "nnunet"
    done = [run for runs in models.values() for run in runs]
    unit = next((run["scores"][scores]["unit"] for run in done), "")
    ways = [way for way in (scores, f"{scores}-mirrored") if any(way in run["scores"] for run in done)]
    seeds, timed = any(len(runs) > 1 for runs in models.values()), any(run["step_ms_alone"] for run in done)
    heads = ["model", "parameters", "epochs × steps", "seeds", "IoU", "Dice", f"HD95, {unit}"]
    heads += ["SD of seeds"] * seeds + ["Dice, mirrored"] * (len(ways) - 1)
    against_what = f"Dice against {'nnU-Net' if baseline == 'nnunet' else 'the default'}"
    heads += [against_what, "", "the same, mirrored", ""][: 2 * len(ways)] + ["step, ms"] * timed
    rows = []
    for name, runs in models.items():
        if not runs:
            rows.append([titles[name], NOT_RUN, *[""] * (len(heads) - 2)])
            continue
        cells = [titles[name], millions(runs[0]["parameters"])]
        cells += [f"{runs[0]['run']['epochs']} × {runs[0]['iterations_per_epoch']}"]
        cells += [", ".join(str(run["run"]["seed"]) for run in runs)]
        cells += [with_interval(interval(runs, scores, metric)) for metric in ("IoU", "Dice")]
        hd95 = with_interval(interval(runs, scores, "HD95"), 1 if unit == "pixels" else 2)
        cells += [hd95 if distances else "no spacing"]
        cells += [f"{spread(runs, scores, 'Dice'):.3f}" if len(runs) > 1 else ""] * seeds
        cells += [with_interval(interval(runs, w, "Dice")) if _have(runs, w) else NOT_RUN for w in ways[1:]]
        cells += [cell for way in ways for cell in against(runs, models.get(baseline, []), way)]
        steps = [run["step_ms_alone"][0] for run in runs if run["step_ms_alone"]]
        rows.append(cells + [f"{np.mean(steps):.1f}" if steps else NOT_RUN] * timed)
    return table(heads, rows)


def _have(runs: Sequence[dict], scores: str) -> bool:
    return all(scores in run["scores"] for run in runs)


def against(ours: Sequence[dict], theirs: Sequence[dict], scores: str) -> list[str]:
    """The difference of Dice in two cells: mean with interval, and what it is worth.

    Empty where one of them has no such scores, and against themselves.
    """
    if not (ours and theirs and _have([*ours, *theirs], scores)) or ours == theirs:
        return ["", ""]
    diff = difference(ours, theirs, scores, "Dice")
    verdict = noise(diff, spread(ours, scores, "Dice"), spread(theirs, scores, "Dice"))
    if verdict not in (WITHIN_NOISE, NOT_COMPARABLE) and min(len(ours), len(theirs)) == 1:
        verdict += ONE_TRAINING
    return [signed(diff), verdict]


def stage_lines(results: Results, stage: str, unseen: Sequence[str], distances: bool = True) -> list[str]:
    """The tables of a stage: its validation cases, and what its models were tested on without further training."""
    lines = []
    for epochs in results.schedules(stage):
        lines += [*scores_table(results, stage, epochs, "validation", distances), ""]
        for name in unseen:
            about = next(row.about for row in SETS.values() if row.name == name)
            lines += [f"The same models, without further training, on {about}:", ""]
            lines += [*scores_table(results, stage, epochs, name, distances), ""]
    return lines or [f"{NOT_RUN.capitalize()}.", ""]


def reference_lines(results: Results) -> list[str]:
    """The authors' figures for the paper's first split of BUSI and for STU, and ours."""
    authors, lines = read_json(REFERENCES), []
    for data, title, scores in (("busi", "BUSI, split 1", "validation"), ("stu", "STU", STU)):
        ranges = (f"{m} {' to '.join(f'{v:.3f}' for v in authors[data][m])}" for m in ("IoU", "Dice"))
        line = f"- {title}: {', '.join(ranges)}"
        for epochs in results.schedules("busi")[:1]:
            if runs := results.of("busi", "published", epochs):
                ours = (f"{m} {interval(runs, scores, m)[0]:.3f}" for m in ("IoU", "Dice"))
                line += f"; ours, {MODELS['published'].title}: {', '.join(ours)}"
        lines.append(line)
    return [f"Of {authors['what']} ({authors['source']}):", "", *lines, ""]


# ---- the texts -------------------------------------------------------------------------------------------------------

HOW = """How: nnU-Net's own training loop, loader, augmentation and predictor; trainers and plans as in the table. The
last epoch is evaluated, nothing is chosen on the validation cases. In 2D all models have the paper's batch of 16 and
its Dice per sample in place of nnU-Net's batch of 32 and Dice per batch. Scores are without mirroring at prediction
unless the column says so (mirrored: predicted in all orientations, nnU-Net's default). Intervals are 95 % bootstrap
intervals over cases, differences are paired by case; "within noise" is a difference whose interval holds 0, or that is
less than two standard deviations over seeds. Of models that were trained once, a difference can stand out "on these
cases" alone: what another training would give is not in its interval. Step times are medians of steps that had the GPU
to themselves, of the package as it was at the run's commit (see the last table)."""
PICTURES = {
    "evidence.png": "differences of Dice to nnU-Net's U-Net with intervals, a panel a network",
    "evidence_worst_cases.png": "the worst hippocampus cases",
}


def evidence_md(results: Results) -> str:
    """The whole of ``evidence.md``."""
    from .verdicts import seven_lines

    lines = ["# Evidence", "", HOW, ""]
    for name, what in PICTURES.items():
        lines += [f"![{what}]({name})", ""] if (results.folder / name).is_file() else []
    lines += seven_lines(results)
    for stage, (title, unseen) in OLDER.items():
        lines += [f"## {title}", "", *stage_lines(results, stage, unseen)]
    lines += ["## The authors' own figures", "", *reference_lines(results)]
    lines += ["Steps are timed on a [GPU](gpu.md) and on a [CPU](cpu.md).", ""]
    lines += ["## What was run, and what was left", "", *_runs_table(results), ""]
    return "\n".join(lines)


def _runs_table(results: Results) -> list[str]:
    rows = []
    for run in results.runs:
        versions = f"torch {run['versions']['torch']}, nnunetv2 {run['versions']['nnunetv2']}"
        about = [run["date"], run["device"], versions, (run["commit"] or "not committed")[:12]]
        about += [f"{run['seconds']:.0f}", f"{run['waiting_for_batches']:.0%}"]
        rows.append([f"`{run['name']}`", *about])
    done = {run["name"] for run in results.runs}
    rows += [[f"`{name}`", what, *[""] * 5] for name, what in results.state.items() if name not in done]
    heads = ["run", "date", "device", "versions", "commit"]
    heads += ["s of training beside others", "waiting for batches, at most"]
    return table(heads, rows) if rows else [f"{NOT_RUN.capitalize()}."]


def readme_section(results: Results) -> str:
    """What stands between the README's two markers: accuracy and cost beside nnU-Net's U-Net, in four columns each."""
    where = (
        "[All runs, tests, ablations and costs](benchmarks/results/evidence.md); [model card](docs/explanation/"
        "model_card.md)."
    )
    return "\n".join([*_readme_accuracy(results), "", *_readme_cost(results), "", where])


def _readme_accuracy(results: Results) -> list[str]:
    """Dice as nnU-Net predicts by default; the newest stage of a data set stands for it."""
    rows, steps = [], []
    for title, stages, scores in README_SETS:
        found = [(stage, epochs) for stage in stages for epochs in results.schedules(stage)[:1]]
        found = [(s, e, baseline) for s, e in found if (baseline := results.of(s, "nnunet", e))]
        if not found:
            continue
        stage, epochs, baseline = found[0]
        cells = []
        for model in ("lgmsnet", "lgmsnet_nnunetda"):
            if ours := results.of(stage, model, epochs):
                mean = interval(ours, scores, "Dice")[0]
                cells.append(f"{mean:.3f} ({signed(difference(ours, baseline, scores, 'Dice'))})")
            else:
                cells.append(NOT_RUN)
        rows.append([title, *cells, f"{interval(baseline, scores, 'Dice')[0]:.3f}"])
        steps += [run["iterations"] for run in baseline]
    if not rows:
        return ["Accuracy is **not measured yet**: `benchmarks/evidence.py` trains and compares, its table goes here."]
    heads = ["Dice", "LGMSNet, paper's augmentation", "LGMSNet, nnU-Net's augmentation", "nnU-Net's U-Net"]
    return [
        *table(heads, rows),
        "",
        f"One training each of {min(steps):,} to {max(steps):,} steps, where nnU-Net's default is 250,000. In brackets "
        "the difference to the U-Net with its 95 % interval over cases, not over trainings: where that contains 0, "
        "no difference was shown.",
    ]


def _readme_cost(results: Results) -> list[str]:
    """A step beside the U-Net's of the same run, each compiled as its trainer compiles it."""
    rows, devices = [], set()
    measured = [row for row in results.read("gpu.json") or [] if "failed" not in row and not row.get("size")]
    for case, title in (("3d", "3D, 2 × 128³"), ("2d", "2D, 16 × 256²")):
        pair = [
            next((row for row in measured if (row["case"], row["network"], row["mode"]) == (case, *which)), None)
            for which in (("lgmsnet", "graphs"), ("plain", "compiled"))
        ]
        if None in pair or pair[0]["run"] != pair[1]["run"] or not all(row["train_gib"] for row in pair):
            continue
        cells = []
        for key, unit, digits in (("train_ms", "ms", 1), ("infer_ms", "ms", 1), ("train_gib", "GiB", 2)):
            a, b = (row[key][0] if isinstance(row[key], list) else row[key] for row in pair)
            cells.append(f"{a:.{digits}f} / {b:.{digits}f} {unit} = {a / b:.2f}")
        rows.append([title, *cells])
        devices.add(pair[0]["device"])
    if not rows:
        return ["Cost on a GPU is **not measured yet**."]
    heads = [f"LGMSNet / U-Net, {', '.join(sorted(devices))}", "training step", "prediction", "training memory"]
    return table(heads, rows)


def readme_with(readme: str, folder: Path) -> str:
    """The README with the section of these results.

    Raises:
        ValueError: it lacks the markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"The README needs the lines {BEGIN!r} and {END!r}, once each.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_section(Results(folder))}\n{END}{rest.split(END)[1]}"


def write_report(folder: Path) -> None:
    """``evidence.md`` beside the JSONs."""
    with atomic_write(folder / "evidence.md") as temporary:
        temporary.write_text(evidence_md(Results(folder)), "utf-8")
