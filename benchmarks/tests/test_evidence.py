"""The evidence: its tables are made from its JSONs alone, and trainings stop and go on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import evidence
import numpy as np
import pytest
from conftest import ROOT
from evidence_parts import report, scheduler
from evidence_parts.results import NOT_COMPARABLE, Results, mean_of, verdict
from evidence_parts.runs import PLANNED, STAGES, Run, runs_of
from evidence_parts.sets import SETS, gather
from workshop import Workshop

from .laid_out import lay_out

RESULTS = ROOT / "benchmarks" / "results"
STU = SETS["stu"].name


# ---- the README and the report are what the JSONs say ----------------------------------------------------------------


@pytest.mark.slow
def test_readme_and_report_are_made_from_the_results():
    """No number in them is typed."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert report.readme_with(readme, RESULTS) == readme, "run benchmarks/evidence.py report"
    made = report.evidence_md(RESULTS)
    assert made == (RESULTS / "evidence.md").read_text("utf-8"), "run benchmarks/evidence.py report"


def test_every_result_says_where_it_is_from():
    for file in (RESULTS / "evidence").glob("*.json"):
        content = json.loads(file.read_text())
        if file.name != "state.json":
            assert {"command", "commit", "date", "device", "versions"} <= content.keys(), file.name


def result(model: str, dice: list[float], seed: int = 0, stage: str = "sets_busi", step: float | None = 20.0) -> dict:
    """A finished run as `scores.py` writes it, with these values of its cases."""
    cases = {
        f"{seed % 2 if stage == 'sets_acdc' else ''}case_{i}": {"lesion": {"IoU": d - 0.1, "Dice": d, "HD95": 10 - d}}
        for i, d in enumerate(dice)
    }
    scores = {"unit": "pixels", "mean": {"lesion": {}, "foreground mean": {}}, "cases": cases}
    return {
        "run": asdict(Run(stage, model, 10, seed)),
        "title": model,
        "iterations": 280,
        "iterations_per_epoch": 28,
        "batch_size": 16,
        "parameters": 2_321_576,
        "step_ms_alone": step and [step, step, step],
        "scores": {f"{name}{end}": scores for name in ("validation", STU) for end in ("", "-mirrored")},
    }


def write_results(folder: Path, *contents: dict) -> Results:
    (folder / "evidence").mkdir(parents=True)
    for content in contents:
        (folder / "evidence" / f"{Run(**content['run']).name}.json").write_text(json.dumps(content))
    return Results(folder)


def line_of(lines: list[str], begin: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"| {begin}")]
    return line


def test_tables_hold_means_intervals_and_what_is_within_noise(tmp_path):
    better, same = [0.5, 0.7, 0.9, 0.6] * 10, [0.4, 0.6, 0.8, 0.5] * 10
    jitter = [v + (0.01 if i % 2 else -0.01) for i, v in enumerate(same)]
    results = write_results(
        tmp_path,
        result("published", better),
        result("nnunet", same),
        result("plain", jitter),
        result("lgmsnet", same),
    )
    lines = report.scores_table(results, "sets_busi", 10, "validation")
    ours = line_of(lines, "LGMSNet, the five published levels")
    assert "0.675 [" in ours and "2.32 M" in ours and "better on these cases" in ours and "| 20.0 |" in ours
    assert "within noise" in line_of(lines, "plain U-Net of LGMSNet's widths")
    assert "better" not in line_of(lines, "LGMSNet, nnU-Net's planned levels")
    assert "not run" in line_of(lines, "LGMSNet, planned levels, nnU-Net's augmentation")
    assert "\n".join(report.stage_lines(results, "sets_busi")).count("better on these cases") == 4  # with STU, mirrored
    assert report.stage_lines(results, "sets_isic")[0] == "Not run."
    accuracy = report.readme_accuracy(results)
    assert line_of(accuracy, "BUSI").endswith("| 0.575 (+0.000 [+0.000, +0.000]) | not run | 0.575, not run |")
    assert "One training each, 280 to 280 steps" in accuracy[-1]
    report.draw(tmp_path)
    assert (tmp_path / "evidence.png").stat().st_size > 5000


def test_seeds_count_as_noise(tmp_path):
    """A difference that every case shows is no more than noise if seeds differ as much."""
    values = np.linspace(0.3, 0.9, 30)
    runs = [
        result("default", list(values + shift), seed, "ablations_busi") for seed, shift in enumerate((-0.04, 0, 0.04))
    ]
    other = [result("kernels_3", list(values + 0.02), seed, "ablations_busi") for seed in (0, 1, 2)]
    assert verdict(other, runs[1:2], "validation") == "better on these cases"
    results = write_results(tmp_path, *runs, *other)
    table = report.scores_table(results, "ablations_busi", 10, "validation")
    line = line_of(table, "kernels_3")
    assert "within noise" in line and "| 0, 1, 2 |" in line and "| 0.000 |" in line
    assert "SD of seeds" in table[0] and "Dice against the default" in table[0]


def test_what_has_no_case_in_common_is_not_compared(tmp_path):
    ours, theirs = result("lgmsnet", [0.5, 0.6]), result("nnunet", [0.5, 0.6])
    scores = theirs["scores"]["validation"]
    theirs["scores"] = {
        name: scores | {"cases": {f"other_{case}": v for case, v in scores["cases"].items()}}
        for name in theirs["scores"]
    }
    table = report.scores_table(write_results(tmp_path, ours, theirs), "sets_busi", 10, "validation")
    line = line_of(table, "LGMSNet, nnU-Net's planned levels")
    assert line.count(NOT_COMPARABLE) == 2 and "on these cases" not in line


def test_undefined_metrics_are_left_out():
    """No lesion and none predicted: nothing to score."""
    run = result("nnunet", [0.5, 0.7])
    run["scores"]["validation"]["cases"]["empty"] = {"lesion": {"IoU": None, "Dice": None, "HD95": None}}
    assert mean_of([run], "validation").mean == pytest.approx(0.6)


def test_sets_are_counted_as_ahead_level_and_behind(tmp_path):
    """p is adjusted for the number of sets: one that is level stays so."""
    random = np.random.default_rng(0)
    base = random.uniform(0.6, 0.9, 30)
    runs = []
    for stage, gain in (("sets_kvasir", 0.05), ("sets_acdc", 0.0), ("sets_la2018", -0.05)):
        for seed in (0, 1):
            ours = base + gain + random.normal(0, 0.01, 30)
            runs += [result("lgmsnet", list(ours), seed, stage, None), result("nnunet", list(base), seed, stage, None)]
    results = write_results(tmp_path, *runs)
    row = line_of(report.verdicts(results), "LGMSNet")
    assert row.endswith("| 1 / 1 / 1 |") and row.count("not run") == 4 and "+0.05" in row
    assert "no spacing" in report.stage_lines(results, "sets_acdc")[2]
    assert "| 0, 1 |" in report.stage_lines(results, "sets_kvasir")[2]


def test_a_network_that_was_not_trained_anew_keeps_its_older_line(tmp_path):
    """It stands beside the U-Net that was trained with it, and says so."""
    older = [result(name, [0.5, 0.6], 0, "hippocampus") for name in ("lgmsnet", "lgmsnet_nnunetda", "nnunet")]
    newer = [result(name, [0.7, 0.9], 0, "sets_hippocampus") for name in ("lgmsnet", "nnunet")]
    for folder, more, dice in (
        ("some", [], "0.550 (+0.000 [+0.000, +0.000]) \\*"),
        ("all", [result("lgmsnet_nnunetda", [0.7, 0.9], 0, "sets_hippocampus")], "0.800 (+0.000 [+0.000, +0.000])"),
    ):
        runs = [
            run | {"scores": {"validation-mirrored": run["scores"]["validation"]}} for run in (*older, *newer, *more)
        ]
        lines = report.readme_accuracy(write_results(tmp_path / folder, *runs))
        cells = line_of(lines, "hippocampus").split(" | ")
        assert cells[1:] == ["0.800 (+0.000 [+0.000, +0.000])", dice, "0.800, not run |"]
        assert lines[-1].endswith("Older trainings, beside their own U-Net.") == bool(not more)


def test_the_recipes_in_3d_are_compared_where_both_were_trained(tmp_path):
    """With the seeds that both have; the sentence below the table says on which sets there is a difference."""
    random, runs = np.random.default_rng(0), []
    base = random.uniform(0.6, 0.9, 30)
    for stage, gained in (("sets_acdc", -0.05), ("sets_hippocampus", 0.0), ("sets_chaos", 0.05)):
        noise = random.normal(0, 0.01, 30)
        runs += [
            result("lgmsnet", list(base), 0, stage),
            result("lgmsnet_paper3d", list(base + gained + noise - noise.mean()), 0, stage),
            result("lgmsnet_paper3d", list(base + 0.09), 1, stage),  # the other recipe has no such seed
        ]
    lines = report.recipes_in_3d(write_results(tmp_path, *runs))
    behind = line_of(lines, "ACDC")
    assert behind.startswith("| ACDC | 0 | ") and behind.count("worse on these cases |") == 2  # mirrored and not
    assert "+0.000 [" in line_of(lines, "Hippocampus") and line_of(lines, "LA2018").startswith("| LA2018 | not run |")
    said = "is worse on ACDC, made no difference that shows on Hippocampus, is better on CHAOST2"
    assert lines[-1] == f"Mirrored, the 3D recipe {said}."
    assert "better" not in "\n".join(report.recipes_in_3d(write_results(tmp_path / "none", runs[0])))


def test_objects_are_compared_by_their_size(tmp_path):
    """Small objects are not hidden by large ones, and a few say nothing."""
    sizes = [*range(1, 11), *range(50, 60)]
    ours, theirs = result("lgmsnet", [0.8, 0.8]), result("nnunet", [0.8, 0.8])
    for run, small in ((ours, 0.9), (theirs, 0.4)):
        objects = [["lesion", size, small if size < 20 else 0.7] for size in sizes]
        objects += [["rare", size, small] for size in sizes[1:]]
        run["scores"]["validation-mirrored"] = run["scores"]["validation-mirrored"] | {"objects": objects}
    lines = report.sizes_table(write_results(tmp_path, ours, theirs))[2:]
    sizes = [line.split(" | ")[2] for line in lines]
    assert sizes == ["1 to 5 pixels", "6 to 10 pixels", "50 to 54 pixels", "55 to 59 pixels"]
    assert [line.split(" | ")[-1].split()[0] for line in lines] == ["+0.500", "+0.500", "+0.000", "+0.000"]


def test_sizes_of_all_objects_are_told_by_set_and_label(tmp_path):
    """Two lesions, of 4 and of 1 pixel, in one of two images; a set that is measured later stays beside it."""
    from evidence_parts import sizes
    from PIL import Image

    row, file = replace(SETS["busi"], title="Lesions"), tmp_path / "sizes.json"
    labels = tmp_path / row.name / "labelsTr"
    labels.mkdir(parents=True)
    mask = np.zeros((16, 16), np.uint8)
    Image.fromarray(mask).save(labels / "none.png")
    mask[2:4, 2:4] = mask[9, 9] = 1
    Image.fromarray(mask).save(labels / "two.png")
    content = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".png", "channel_names": {"0": "ultrasound"}}
    (tmp_path / row.name / "dataset.json").write_text(json.dumps(content))
    sizes.measure([row], tmp_path, file)
    (tmp_path / row.name).rename(tmp_path / replace(row, title="Others").name)
    sizes.measure([replace(row, title="Others")], tmp_path, file)
    measured = {"unit": "pixels", "cases": 2, "diameters": {"lesion": [1.1, 2.3]}}
    assert json.loads(file.read_text())["sets"] == {"Lesions": measured, "Others": measured}
    assert sizes.spread_table(file)[2] == "| Lesions | lesion | 2 | 1.7 pixels | 1.16 to 2.24 | 1.9 |"
    sizes.draw(file, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 5000


def test_readme_needs_its_markers():
    with pytest.raises(ValueError, match="once each"):
        report.readme_with("# No markers", RESULTS)


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_runs_are_in_the_order_of_seeds_sets_and_models():
    runs = runs_of(["acdc", "busi"], ["lgmsnet", "published"], [0, 1], epochs=50)
    assert [run.name for run in runs[:3]] == [
        "sets_acdc-lgmsnet-50x100-s0",
        "sets_busi-lgmsnet-50x100-s0",
        "sets_busi-published-50x100-s0",  # which volumes do not have
    ]
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1, 1]


def test_scheduler_runs_stops_and_goes_on(tmp_path, monkeypatch):
    """A script in place of a training: one finishes, one fails, one is too slow, and one is not begun."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "run = json.loads(sys.argv[2]); work = pathlib.Path(sys.argv[sys.argv.index('--work') + 1])\n"
        "if run['seed'] == 1: sys.exit('no such data')\n"
        "if run['seed'] == 2: time.sleep(60)\n"
        "name = f\"{run['stage']}-{run['model']}-{run['epochs']}x{run['iterations']}-s{run['seed']}\"\n"
        "done = {'epoch': 3, 'epochs': 5, 'loss': -0.5}\n"
        "file = 'record.json' if run['seed'] == 0 else 'progress.json'\n"
        "(work / 'runs' / name / file).write_text(json.dumps(done))\n"
    )
    monkeypatch.setattr(scheduler, "SCRIPT", script)
    monkeypatch.setattr(scheduler, "TO_STOP", 0.5)
    runs = [Run("sets_busi", "nnunet", 5, seed) for seed in (0, 1, 4, 2, 3)]
    finished, failed, aside, stopped, left = scheduler.train_all(runs, tmp_path, "cpu", 1, 8).values()
    assert finished == "finished" and left == "not started" and failed == "failed: no such data"
    assert aside == "put aside, epoch 3/5, loss -0.500; goes on when called again"
    assert "stopped" in stopped and "goes on when called again" in stopped
    assert list(scheduler.train_all(runs[:1], tmp_path, "cpu", 1, 4).values()) == ["finished"]


def test_a_call_says_and_keeps_what_became_of_its_runs(tmp_path, monkeypatch, capsys):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, "of another project")
    (tmp_path / "fake.py").write_text("import os, sys\nsys.exit(os.environ['nnUNet_raw'])")
    monkeypatch.setattr(scheduler, "SCRIPT", tmp_path / "fake.py")

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *words, "--work", str(tmp_path / "work")])
        evidence.main()

    call("train", "busi", "acdc", "--models", "published", "--epochs", "5", "--device", "cpu")
    state = json.loads((tmp_path / "work" / "runs" / "state.json").read_text())
    assert state == {"sets_busi-published-5x100-s0": f"failed: {tmp_path / 'work' / 'raw'}"}
    assert f"sets_busi-published-5x100-s0: failed: {tmp_path}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name another model"):
        call("train", "acdc", "--models", "published")


def test_trainings_are_spread_over_the_gpus(tmp_path, monkeypatch):
    """Two at a time on each of two; a place that falls free is taken on its own GPU."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "seed = json.loads(sys.argv[2])['seed']; work = pathlib.Path(sys.argv[sys.argv.index('--work') + 1])\n"
        "(work / f'gpu-{seed}').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while seed < 4 and not (seed == 1 or (work / 'gpu-4').exists()): time.sleep(0.05)\n"
        "while seed == 1 and not all((work / f'gpu-{s}').exists() for s in (0, 2, 3)): time.sleep(0.05)\n"
        "sys.exit('done')\n"
    )
    monkeypatch.setattr(scheduler, "SCRIPT", script)
    monkeypatch.setattr(scheduler, "TO_STOP", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    scheduler.train_all([Run("sets_busi", "nnunet", 5, seed) for seed in range(5)], tmp_path, "cuda", 2, 60)
    gpus = [(tmp_path / f"gpu-{seed}").read_text() for seed in range(5)]
    assert gpus == ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-b"]  # the last in the place of the second


# ---- a rehearsal -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]")
def test_rehearsal_from_files_to_scores(tmp_path, monkeypatch):
    """Two epochs of two steps, put aside after the first; predictions at home and of another set, scores and tables."""
    from evidence_parts.plans import prepare
    from evidence_parts.scores import score_all
    from evidence_parts.training import OutOfTime, train_run

    home, unseen = replace(SETS["hippocampus"], unseen=("acdc",)), replace(SETS["acdc"], rule=None)
    for name, row in (("hippocampus", home), ("acdc", unseen)):
        monkeypatch.setitem(SETS, name, row)
        lay_out(tmp_path, row, 5)
    monkeypatch.setitem(STAGES, "sets_hippocampus", home)
    run = Run("sets_hippocampus", "lgmsnet", epochs=2, iterations=2)
    bench = Workshop(tmp_path / "work")
    with bench.environment(nnUNet_def_n_proc="1"):
        for row in (home, unseen):
            gather(row, tmp_path, bench.raw, bench.preprocessed)
            prepare(row)
        (tmp_path / "work" / "preprocessed").symlink_to(bench.preprocessed)
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        monkeypatch.setenv("nnUNet_results", str(tmp_path / "work" / "results" / run.name))
        with pytest.raises(OutOfTime):
            train_run(run, tmp_path / "work", "cpu", until=0)
        folder = tmp_path / "work" / "runs" / run.name
        assert json.loads((folder / "progress.json").read_text())["epoch"] == 1
        train_run(run, tmp_path / "work", "cpu", until=float("inf"))

    written = json.loads((folder / "record.json").read_text())
    assert len(written["train_losses"]) == 2 and written["iterations"] == 4 and 0 <= written["waiting_for_batches"] < 1
    assert written["cases"] == {"training": 4, "validation": 1} and written["versions"]["torch"]
    for name, cases in (("validation", 1), (f"{unseen.name}-mirrored", 5)):
        with np.load(folder / f"{name}.npz") as labels:
            assert len(labels.files) == cases and all(labels[case].shape == (22, 24, 20) for case in labels.files)
    (model,) = (tmp_path / "work" / "results" / run.name / home.name).iterdir()
    assert model.name == f"nnUNetTrainerLGMSNet__{PLANNED}__3d_fullres"
    assert score_all(tmp_path / "work" / "runs", bench.raw, tmp_path / "out" / "evidence") == [run.name]
    results = Results(tmp_path / "out")
    assert len(results.runs[0]["scores"][unseen.name]["cases"]) == 5
    assert "| 2 × 2 |" in report.stage_lines(results, run.stage)[2]
