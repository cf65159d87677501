"""Tables from the JSONs of ``benchmarks/results``, and the README's section; nothing is typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnunet_lgms.evaluation.evaluate import FOREGROUND
from nnunet_lgms.evaluation.statistics import bootstrap_mean
from nnunet_lgms.files import atomic_write, read_json

from .runs import ABLATIONS, STAGES, STU, Model
from .sets import SETS

BEGIN, END = "<!-- evidence: made by benchmarks/evidence.py report; a test compares -->", "<!-- end of evidence -->"
NOT_RUN = "not run"
MIRRORED = "validation-mirrored"
OLDER = ("busi", "hippocampus")  # sets that were measured before there was a table of sets
REFERENCES = Path(__file__).with_name("references.json")
MINUS = "\N{MINUS SIGN}"
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
        files = sorted((folder / "evidence").glob("*.json"))
        contents = [(file, read_json(file)) for file in files]
        self.runs = [content for _, content in contents if "scores" in content]
        self.state = self._read("evidence/state.json") or {}
        self.costs = self._read("evidence/costs.json") or {"runs": {}, "sizes": {}}
        self.references = read_json(REFERENCES)

    def _read(self, name: str):
        return read_json(self.folder / name) if (self.folder / name).is_file() else None

    def schedules(self, stage: str) -> list[int]:
        """Epochs of the stage's runs, the longest first; with equal time, those of the U-Net whose time it is."""
        return sorted({_epochs(r) for r in self.runs if r["run"]["stage"] == stage}, reverse=True)

    def of(self, stage: str, model: str, epochs: int) -> list[dict]:
        """The finished runs of a model, one a seed."""
        if model == "nnunet" and STAGES[stage].equal_time_of:
            stage = STAGES[stage].equal_time_of
        wanted = (stage, model, epochs)
        return [r for r in self.runs if (r["run"]["stage"], r["run"]["model"], _epochs(r)) == wanted]


def _epochs(record: Mapping) -> int:
    return record["run"].get("time_of") or record["run"]["epochs"]


def models_of(stage: str) -> dict[str, Model]:
    """With equal time, the U-Net whose time it is belongs to them."""
    source = STAGES[stage].equal_time_of
    return STAGES[source].models if source else STAGES[stage].models


def per_case(runs: Sequence[dict], scores: str, metric: str, label: str | None = None) -> dict[str, float]:
    """Case → metric, the mean over seeds; over labels if none is named. NaN where undefined."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for case, labels in run["scores"][scores]["cases"].items():
            chosen = [m[metric] for name, m in labels.items() if label in (None, name)]
            numbers = [np.nan if value is None else value for value in chosen]
            values.setdefault(case, []).append(float(np.nanmean(numbers)) if not np.isnan(numbers).all() else np.nan)
    return {case: float(np.mean(v)) for case, v in values.items()}


def interval(runs: Sequence[dict], scores: str, metric: str, label: str | None = None) -> tuple[float, float, float]:
    """Mean over cases with its 95 % bootstrap interval."""
    mean = bootstrap_mean(np.array(list(per_case(runs, scores, metric, label).values())))
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


def signed(values: tuple[float, float, float], digits: int = 3) -> str:
    low, mean, high = (f"{v:+.{digits}f}".replace("-", MINUS) for v in (values[1], values[0], values[2]))
    return f"{mean} [{low}, {high}]"


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def from_to(values: Sequence[float]) -> str:
    low, high = (f"{v:.3f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ---- the tables ------------------------------------------------------------------------------------------------------


def _schedule(run: dict) -> str:
    return f"{run['run']['epochs']} × {run['iterations_per_epoch']}"


def _step(runs: Sequence[dict]) -> str:
    steps = [run["step_ms_alone"][0] for run in runs if run["step_ms_alone"]]
    return f"{np.mean(steps):.1f}" if steps else NOT_RUN


def _seeds(runs: Sequence[dict]) -> str:
    return ", ".join(str(run["run"]["seed"]) for run in runs)


def scores_table(
    results: Results, stage: str, epochs: int, scores: str, digits: int = 3, distances: bool = True
) -> list[str]:
    """A line a model: scores without mirroring, Dice with it, and the differences to nnU-Net's U-Net."""
    unit = next((r["scores"][scores]["unit"] for r in results.runs if r["run"]["stage"] == stage), "")
    heads = ["model", "parameters", "epochs × steps", "seeds", "IoU", "Dice", f"HD95, {unit}", "Dice, mirrored"]
    heads += ["Dice against nnU-Net", "", "the same, mirrored", "", "step, ms"]
    rows = []
    baseline = results.of(stage, "nnunet", epochs)
    for name, model in models_of(stage).items():
        runs = results.of(stage, name, epochs)
        if not runs:
            rows.append([model.title, NOT_RUN, *[""] * (len(heads) - 2)])
            continue
        cells = [model.title, millions(runs[0]["parameters"]), _schedule(runs[0]), _seeds(runs)]
        cells += [with_interval(interval(runs, scores, metric), digits) for metric in ("IoU", "Dice")]
        hd95 = with_interval(interval(runs, scores, "HD95"), 1 if unit == "pixels" else 2)
        cells += [hd95 if distances else "no spacing"]
        mirrored = f"{scores}-mirrored"
        there = _have(runs, mirrored)
        cells += [with_interval(interval(runs, mirrored, "Dice"), digits) if there else NOT_RUN]
        for way in (scores, mirrored):
            cells += against(runs, baseline, way, digits)
        rows.append([*cells, _step(runs)])
    return table(heads, rows)


def _have(runs: Sequence[dict], scores: str) -> bool:
    return all(scores in run["scores"] for run in runs)


def against(ours: Sequence[dict], theirs: Sequence[dict], scores: str, digits: int = 3) -> list[str]:
    """The difference of Dice in two cells: mean with interval, and what it is worth.

    Empty where one of them has no such scores, and against themselves.
    """
    if not (ours and theirs and _have([*ours, *theirs], scores)) or ours == theirs:
        return ["", ""]
    diff = difference(ours, theirs, scores, "Dice")
    verdict = noise(diff, spread(ours, scores, "Dice"), spread(theirs, scores, "Dice"))
    if verdict not in (WITHIN_NOISE, NOT_COMPARABLE) and min(len(ours), len(theirs)) == 1:
        verdict += ONE_TRAINING
    return [signed(diff, digits), verdict]


def reference_line(results: Results, data: str, scores: str, stage: str = "busi") -> list[str]:
    """The authors' figures, and where ours lie."""
    authors = results.references["authors"]
    figures = ", ".join(f"{metric} {from_to(authors[data][metric])}" for metric in ("IoU", "Dice"))
    lines = [f"Reference: {figures} ({authors['what']}; {authors['source']})."]
    for epochs in results.schedules(stage)[:1]:
        for name in ("published", "lgmsnet"):
            if runs := results.of(stage, name, epochs):
                low, high = min(authors[data]["IoU"]), max(authors[data]["IoU"])
                mean = interval(runs, scores, "IoU")[0]
                place = "below" if mean < low else "above" if mean > high else "inside"
                lines.append(f"{models_of(stage)[name].title}: IoU {mean:.3f}, {place} that range.")
    if any(not line.endswith("inside that range.") for line in lines[1:]):
        lines.append(
            "Why it is outside is not known: loader, normalisation, augmentation and prediction are nnU-Net's here, "
            "the authors' own there."
        )
    return lines


def labels_table(results: Results, stage: str, epochs: int) -> list[str]:
    """Dice and HD95 of each label, a line a model."""
    runs = next(r for r in results.runs if r["run"]["stage"] == stage)
    labels = [label for label in runs["scores"]["validation"]["mean"] if label != FOREGROUND]
    heads = ["model", *(f"{m} {label}" for m in ("Dice", "HD95") for label in labels), "s of all steps, alone"]
    rows = []
    for name, model in models_of(stage).items():
        if not (runs := results.of(stage, name, epochs)):
            rows.append([model.title, NOT_RUN, *[""] * (len(heads) - 2)])
            continue
        cells = [with_interval(interval(runs, "validation", "Dice", label)) for label in labels]
        cells += [with_interval(interval(runs, "validation", "HD95", label), 2) for label in labels]
        alone = runs[0]["step_ms_alone"]
        seconds = f"{alone[0] * runs[0]['iterations'] / 1e3:.0f}" if alone else NOT_RUN
        rows.append([model.title, *cells, seconds])
    return table(heads, rows)


def ablations_table(results: Results, stage: str, epochs: int) -> list[str]:
    """A line a variant: mean over seeds, spread over seeds, difference to the default, cost."""
    heads = ["variant", "parameters", "GMAC", "step, ms", "Dice", "SD of seeds", "against the default", "", "seeds"]
    costs = results.costs["runs"].get(STAGES[stage].dataset, {})
    default, rows = results.of(stage, "default", epochs), []
    for name in ABLATIONS:
        runs = results.of(stage, name, epochs)
        if name not in STAGES[stage].models:
            rows.append([ABLATIONS[name], "the same network as the default", *[""] * (len(heads) - 2)])
            continue
        if not runs:
            rows.append([ABLATIONS[name], NOT_RUN, *[""] * (len(heads) - 2)])
            continue
        gmac = f"{costs[name]['gmac']:.2f}" if name in costs else NOT_RUN
        sd = spread(runs, "validation", "Dice")
        cells = [ABLATIONS[name], millions(runs[0]["parameters"]), gmac, _step(runs)]
        cells += [with_interval(interval(runs, "validation", "Dice")), f"{sd:.3f}" if len(runs) > 1 else ""]
        cells += against(runs, default, "validation")
        rows.append([*cells, _seeds(runs)])
    return table(heads, rows)


def ablations_words(results: Results, stage: str, epochs: int) -> str:
    """What the table comes to, in a sentence or two."""
    default, found = results.of(stage, "default", epochs), {}
    others = [(name, results.of(stage, name, epochs)) for name in ABLATIONS if name != "default"]
    for name, runs in others if default else []:
        if runs:
            verdict = against(runs, default, "validation")[1]
            found.setdefault(verdict.removesuffix(ONE_TRAINING), []).append(ABLATIONS[name])
    said = "; ".join(f"{v}: {' / '.join(found.get(v, ['none']))}" for v in ("better", "worse", WITHIN_NOISE))
    words = f"Dice against the default: {said}."
    if any(len(runs) == 1 for runs in (default, *(runs for _, runs in others))):
        words += (
            " A variant with one seed is compared by its cases alone: what another training of it would give is not "
            "in its interval, so a small difference is no finding there."
        )
    return words


def recipe_lines(results: Results) -> list[str]:
    """nnU-Net's augmentation in place of the paper's, on the same plans; with mirroring, as nnU-Net predicts."""
    rows = []
    for stage, scores in (
        ("busi", "validation"),
        ("busi", STU),
        ("hippocampus", "validation"),
        ("hippocampus_equal_time", "validation"),
    ):
        for epochs in results.schedules(stage):
            ours, plain = (results.of(stage, name, epochs) for name in ("lgmsnet_nnunetda", "lgmsnet"))
            mirrored = f"{scores}-mirrored"
            if ours and plain and _have([*ours, *plain], mirrored):
                cells = [*against(ours, plain, scores), *against(ours, plain, mirrored)]
                where = stage if scores == "validation" else f"{stage}, {scores}"
                rows.append([where, _schedule(ours[0]), *cells])
    if not rows:
        return [f"{NOT_RUN.capitalize()}."]
    better, worse = (sum(any(c.startswith(v) for c in row) for row in rows) for v in ("better", "worse"))
    words = f"It stands out as better in {better} of {len(rows)} rows and as worse in {worse}"
    words += "." if better else ", so no other recipe is recommended beside the paper's."
    heads = ["", "epochs × steps", "Dice against the paper's augmentation", "", "the same, mirrored", ""]
    return [*table(heads, rows), "", words]


NETWORK_NAMES = {
    "lgmsnet": "LGMSNet",
    "plain": "nnU-Net's PlainConvUNet",
    "resenc_m": "nnU-Net's ResEnc M",
    "mednext_s": "MedNeXt-S-like",
}


def costs_table(results: Results) -> list[str]:
    """Parameters and GMAC, and the time on two CPU threads where `cpu.py` measured it."""
    cpu = (results._read("cpu.json") or {"rows": {}})["rows"]
    rows = []
    for size, networks in results.costs["sizes"].items():
        for name, cost in networks.items():
            row = next((row for key, row in cpu.items() if key.startswith("inference") and _same(key, size)), None)
            latency = f"{1e3 * row['median'][name]:.0f}" if row and name in row["median"] else NOT_RUN
            cells = [NETWORK_NAMES[name], size, millions(cost["parameters"]), f"{cost['gmac']:.2f}"]
            rows.append([*cells, latency])
    for other in results.references["published"]:
        cells = [f"{other['network']}, not measured here", other["source"], millions(other["parameters"])]
        rows.append([*cells, f"{other['gflops']} GFLOPs as published", ""])
    return table(["network", "input", "parameters", "GMAC", "CPU inference, ms"], rows)


def gpu_table(results: Results) -> list[str]:
    """Steps on a GPU, compiled as each network's trainer compiles it, where `gpu.py` measured them."""
    rows = []
    for row in results._read("gpu.json") or []:
        if "failed" in row or row["mode"] != ("graphs" if row["network"] == "lgmsnet" else "compiled"):
            continue
        cells = [NETWORK_NAMES[row["network"]], " × ".join(map(str, row["input"]))]
        cells += [f"{row[key][0]:.1f}" for key in ("train_ms", "infer_ms")]
        rows.append([*cells, f"{row['train_gib']:.2f}" if row["train_gib"] else "", row["device"]])
    heads = ["network", "input", "training step, ms", "inference, ms", "training, GiB", "device"]
    return table(heads, rows) if rows else [f"{NOT_RUN.capitalize()}."]


def loading_table(results: Results) -> list[str]:
    """What one process prepares, and how many of them a training alone on the GPU would keep busy."""
    heads = ["trainer", "patch", "batch", "ms a batch", "s an epoch", "processes for the measured step"]
    rows = []
    for row in (results._read("evidence/loading.json") or {"rows": {}})["rows"].values():
        models = [n for n, m in STAGES[row["stage"]].models.items() if m.trainer == row["trainer"]]
        runs = [run for n in models for e in results.schedules(row["stage"]) for run in results.of(row["stage"], n, e)]
        steps = [run["step_ms_alone"][0] for run in runs if run["step_ms_alone"]]
        needed = f"{1e3 * row['batch_s'] / min(steps):.1f}" if steps else NOT_RUN
        patch = " × ".join(map(str, row["patch_size"]))
        times = [f"{1e3 * row['batch_s']:.0f}", f"{row['epoch_s']:.2f}"]
        rows.append([row["trainer"], patch, str(row["batch_size"]), *times, needed])
    return table(heads, rows) if rows else [f"{NOT_RUN.capitalize()}."]


def _same(key: str, size: str) -> bool:
    return key.replace("^2", "²").replace("^3", "³").endswith(size)


# ---- the texts -------------------------------------------------------------------------------------------------------

HOW = """How: nnU-Net's own training loop, loader, augmentation and predictor; trainers and plans as in the table. An
epoch is one pass over the training cases (as many steps as batches hold them, drawn with replacement), the last epoch
is evaluated, nothing is chosen on the validation cases. In 2D all models have the paper's batch of 16 and its Dice per
sample in place of nnU-Net's batch of 32 and Dice per batch. Scores are without mirroring at prediction unless the
column says so. Intervals are 95 % bootstrap intervals over cases, differences are paired by case; "within noise" is a
difference whose interval holds 0, or that is less than two standard deviations over seeds. Of models that were trained
once, a difference can stand out "on these cases" alone: what another training would give is not in its interval. Step
times are medians of steps that had the GPU to themselves, of the package as it was at the run's commit (see the last
table); what slowed some of them is in [how it is made](../../docs/explanation/evidence.md). Mirrored: predicted in all
orientations, nnU-Net's default."""


PICTURES = {
    "evidence.png": "IoU on BUSI and STU with intervals, and training losses",
    "evidence_worst_cases.png": "the worst hippocampus cases",
}


def evidence_md(results: Results) -> str:
    """The whole of ``evidence.md``."""
    from .verdicts import seven_lines

    lines = ["# Evidence", "", HOW, ""]
    for name, what in PICTURES.items():
        lines += [f"![{what}]({name})", ""] if (results.folder / name).is_file() else []
    lines += seven_lines(results)
    for stage, title, zero_shot in (
        ("busi", "BUSI, the paper's split 1", True),
        ("hippocampus", "Hippocampus, fold 0 of nnU-Net's five, equal epochs", False),
        ("hippocampus_equal_time", "Hippocampus, equal time of steps", False),
    ):
        lines += [f"## {title}", ""]
        if not results.schedules(stage):
            lines += [f"{NOT_RUN.capitalize()}.", ""]
        for epochs in results.schedules(stage):
            lines += [*scores_table(results, stage, epochs, "validation"), ""]
            if not zero_shot:
                lines += [*labels_table(results, stage, epochs), ""]
        if zero_shot:
            lines += [*reference_line(results, "busi", "validation"), "", "## Zero-shot, STU-Hospital", ""]
            if not results.schedules(stage):
                lines += [f"{NOT_RUN.capitalize()}.", ""]
            for epochs in results.schedules(stage):
                lines += [*scores_table(results, stage, epochs, STU), ""]
            lines += [*reference_line(results, "stu", STU), ""]
    for stage in ("ablations_busi", "ablations_hippocampus"):
        lines += [f"## Ablations, {STAGES[stage].dataset}", ""]
        if not results.schedules(stage):
            lines += [f"{NOT_RUN.capitalize()}.", ""]
        for epochs in results.schedules(stage):
            lines += [f"{epochs} epochs.", ""]
            lines += [*ablations_table(results, stage, epochs), "", ablations_words(results, stage, epochs), ""]
    lines += ["## Is there a better recipe?", "", *recipe_lines(results), ""]
    lines += ["## Cost", "", *costs_table(results), "", "On a GPU:", "", *gpu_table(results), ""]
    lines += ["## Data loading, one process on one core", "", *loading_table(results), ""]
    lines += ["## What was run, and what was left", ""]
    lines += [*_runs_table(results), ""]
    return "\n".join(lines)


def _runs_table(results: Results) -> list[str]:
    rows = []
    for run in results.runs:
        about = [
            run["date"],
            run["device"],
            f"torch {run['versions']['torch']}, nnunetv2 {run['versions']['nnunetv2']}",
        ]
        about += [(run["commit"] or NOT_COMMITTED)[:12], f"{run['seconds']:.0f}", f"{run['waiting_for_batches']:.0%}"]
        rows.append([f"`{_name(run)}`", *about])
    done = {_name(run) for run in results.runs}
    rows += [[f"`{name}`", what, *[""] * 5] for name, what in results.state.items() if name not in done]
    heads = ["run", "date", "device", "versions", "commit"]
    heads += ["s of training beside others", "waiting for batches, at most"]
    return table(heads, rows) if rows else [f"{NOT_RUN.capitalize()}."]


NOT_COMMITTED = "not committed"


def _name(run: Mapping) -> str:
    from .runs import Run

    return Run(**run["run"]).name


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
    measured = [row for row in results._read("gpu.json") or [] if "failed" not in row and not row.get("size")]
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
