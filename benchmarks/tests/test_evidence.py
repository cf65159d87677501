"""The evidence: its tables are made from its JSONs alone, trainings stop and go on, and what travels arrives whole."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_plans
from conftest import ROOT
from dataset_replicas import disc, grey, picture, save
from evidence_parts import packs, pictures, report, scheduler, verdicts
from evidence_parts.report import STU
from evidence_parts.runs import PUBLISHED, SETS, Run, file_of, runs_of
from tiny_model import dataset_json

SIZE, BUSI = 32, SETS["busi"].name
TRAINING, VALIDATION, UNSEEN = ["a", "b", "c"], ["d", "e"], ["f", "g"]


# ---- the README and the report are what the JSONs say ----------------------------------------------------------------


@pytest.mark.slow
def test_readme_and_report_are_made_from_the_results():
    """No number in them is typed."""
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert report.readme_with(readme, results) == readme, "run benchmarks/evidence.py report"
    made = report.evidence_md(report.Results(results))
    assert made == (results / "evidence.md").read_text("utf-8"), "run benchmarks/evidence.py report"


def test_every_result_says_where_it_is_from():
    for file in (ROOT / "benchmarks" / "results" / "evidence").glob("*.json"):
        content = json.loads(file.read_text())
        if file.name != "state.json":
            assert {"command", "commit", "date", "device", "versions"} <= content.keys(), file.name


def result(
    model: str, iou: list[float], seed: int = 0, stage: str = "sets_busi", epochs: int = 10, step: float = 20.0
) -> dict:
    """A finished run as `scores.py` writes it, with these IoUs of its cases."""
    run = Run(stage, model, epochs, seed)
    cases = {
        f"case_{i}": {"lesion": {"IoU": value, "Dice": 2 * value / (1 + value), "HD95": 10.0 * (1 - value)}}
        for i, value in enumerate(iou)
    }
    scores = {"unit": "pixels", "mean": {"lesion": {}, "foreground mean": {}}, "cases": cases}
    return {
        "run": run.as_dict() | {"timed": True},  # of older runs more was said
        "title": model,
        "iterations": 28 * epochs,
        "iterations_per_epoch": 28,
        "parameters": 2_321_576,
        "step_ms_alone": [step, step, step],
        "cases": {"training": 452, "validation": len(iou)},
        "train_losses": [0.5, 0.25],
        "scores": {f"{name}{end}": scores for name in ("validation", STU) for end in ("", "-mirrored")},
        "date": "2020-01-01",
        "device": "made up",
        "versions": {"torch": "0", "nnunetv2": "0"},
        "commit": None,
        "seconds": 1.0,
        "waiting_for_batches": 0.25,
    }


def write_results(folder: Path, *results: dict) -> report.Results:
    (folder / "evidence").mkdir(parents=True, exist_ok=True)
    for content in results:
        name = Run.of_record(content).name
        (folder / "evidence" / f"{name}.json").write_text(json.dumps(content))
    return report.Results(folder)


def test_without_results_everything_is_not_run(tmp_path):
    text = report.evidence_md(report.Results(tmp_path))
    assert text.count("Not run.") == 14 and "IoU 0.673 to 0.681" in text
    section = report.readme_section(report.Results(tmp_path))
    assert "Accuracy is **not measured yet**" in section and "Cost on a GPU is **not measured yet**" in section
    assert not pictures.draw(tmp_path)


def test_tables_hold_means_intervals_and_what_is_within_noise(tmp_path):
    better, same = [0.5, 0.7, 0.9, 0.6] * 10, [0.4, 0.6, 0.8, 0.5] * 10
    jitter = [v + (0.01 if i % 2 else -0.01) for i, v in enumerate(same)]
    results = write_results(
        tmp_path,
        result("published", better),
        result("nnunet", same),
        result("plain", jitter),
        result("lgmsnet", same, 1),
    )
    lines = {line.split(" | ")[0]: line for line in report.scores_table(results, "sets_busi", 10, "validation")}
    ours = lines["| LGMSNet, the five published levels"]
    assert "0.675 [" in ours and "2.32 M" in ours and "better on these cases" in ours and "| 20.0 |" in ours
    assert "within noise" in lines["| plain U-Net of LGMSNet's widths"]
    assert "better" not in lines["| LGMSNet, nnU-Net's planned levels"]
    assert "not run" in lines["| LGMSNet, planned levels, nnU-Net's augmentation"]
    text = report.evidence_md(results)
    assert "better on these cases" in text and "+0.0" in "".join(verdicts.verdicts(results))
    assert pictures.draw(tmp_path) and (tmp_path / "evidence.png").stat().st_size > 5000
    section = report.readme_section(results)
    assert "| BUSI, breast ultrasound | 0.719 (+0.000 [+0.000, +0.000]) | not run | 0.719 |" in section
    assert "One training each of 280 to 280 steps" in section and "Cost on a GPU is **not measured yet**" in section


def test_seeds_count_as_noise(tmp_path):
    """A difference that every case shows is no more than noise if seeds differ as much."""
    values = np.linspace(0.3, 0.9, 30)
    runs = [
        result("default", list(values + shift), seed, "ablations_busi", 60)
        for seed, shift in enumerate((-0.04, 0, 0.04))
    ]
    other = [result("kernels_3", list(values + 0.02), seed, "ablations_busi", 60) for seed in (0, 1, 2)]
    assert report.noise(report.difference(other, runs, "validation", "IoU")) == "better"
    results = write_results(tmp_path, *runs, *other)
    table = report.scores_table(results, "ablations_busi", 60, "validation")
    (line,) = [line for line in table if line.startswith("| kernels_3")]
    assert "within noise" in line and "| 0, 1, 2 |" in line and "| 0.0" in line
    assert "SD of seeds" in table[0] and "Dice against the default" in table[0]


def test_what_is_trained_no_more_is_reported_and_compared_with_the_authors(tmp_path):
    runs = result("published", [0.6, 0.7], stage="busi"), result("nnunet", [0.6, 0.6], stage="busi")
    results = write_results(tmp_path, *runs)
    table = report.scores_table(results, "busi", 10, "validation")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| nnunet", "| published"]
    text = report.evidence_md(results)
    assert "IoU 0.673 to 0.681, Dice 0.758 to 0.766; ours, LGMSNet, the five published levels: IoU 0.650" in text
    section = report.readme_section(results)
    assert "| BUSI, breast ultrasound | not run | not run | 0.750 |" in section


def test_what_has_no_case_in_common_is_not_compared(tmp_path):
    ours, theirs = result("lgmsnet", [0.5, 0.6]), result("nnunet", [0.5, 0.6])
    scores = theirs["scores"]["validation"]
    theirs["scores"] = {
        name: scores | {"cases": {f"other_{case}": v for case, v in scores["cases"].items()}}
        for name in theirs["scores"]
    }
    table = report.scores_table(write_results(tmp_path, ours, theirs), "sets_busi", 10, "validation")
    (line,) = [line for line in table if line.startswith("| LGMSNet, nnU-Net's planned levels")]
    assert line.count(report.NOT_COMPARABLE) == 2 and "on these cases" not in line


def test_undefined_metrics_are_left_out():
    """No lesion and none predicted: nothing to score."""
    run = result("nnunet", [0.5, 0.7])
    run["scores"]["validation"]["cases"]["empty"] = {"lesion": {"IoU": None, "Dice": None, "HD95": None}}
    assert report.interval([run], "validation", "IoU")[0] == pytest.approx(0.6)


def test_readme_needs_its_markers(tmp_path):
    with pytest.raises(ValueError, match="once each"):
        report.readme_with("# No markers", tmp_path)


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_words_name_runs():
    names = [run.name for run in runs_of("sets_busi:published,nnunet:50")]
    assert names == ["sets_busi-published-50x100-s0", "sets_busi-nnunet-50x100-s0"]
    assert [(r.model, r.seed) for r in runs_of("sets_acdc:lgmsnet,nnunet::0,1")] == [
        ("lgmsnet", 0),
        ("nnunet", 0),
        ("lgmsnet", 1),
        ("nnunet", 1),
    ]
    assert {r.epochs for r in runs_of("sets_busi")} == {100}


@pytest.mark.parametrize("words", ["brain", ":unet", ":nnunet:ten", ":nnunet:0", ":nnunet:5:a"])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match="choose from|not understood"):
        runs_of(f"sets_busi{words}" if words.startswith(":") else words)


def test_scheduler_runs_stops_and_goes_on(tmp_path, monkeypatch):
    """A script in place of a training: one finishes, one fails, one is too slow, and one is not begun."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "run = json.loads(sys.argv[2]); work = pathlib.Path(sys.argv[sys.argv.index('--work') + 1])\n"
        "if run['seed'] == 1: sys.exit('no such data')\n"
        "if run['seed'] == 2: time.sleep(60)\n"
        "name = f\"{run['stage']}-{run['model']}-{run['epochs']}x{run['iterations']}-s{run['seed']}\"\n"
        "for file in json.loads((work / 'files.json').read_text()):\n"
        "    (work / 'runs' / name / file).write_text('{}')\n"
    )
    monkeypatch.setattr(scheduler, "SCRIPT", script)
    monkeypatch.setattr(scheduler, "TO_STOP", 0.5)
    runs = [Run("sets_busi", "nnunet", 5, seed) for seed in range(4)]
    (tmp_path / "files.json").write_text(json.dumps(["record.json", *(file_of(*p) for p in runs[0].predictions)]))
    state = scheduler.train_all(runs, tmp_path, "cpu", 1, 8)
    assert state["sets_busi-nnunet-5x100-s0"] == "finished" and "no such data" in state["sets_busi-nnunet-5x100-s1"]
    assert (
        "goes on when called again" in state["sets_busi-nnunet-5x100-s2"]
        and state["sets_busi-nnunet-5x100-s3"] == "not started"
    )
    assert scheduler.train_all(runs[:1], tmp_path, "cpu", 1, 4) == {"sets_busi-nnunet-5x100-s0": "finished before"}


def test_trainings_are_spread_over_the_gpus(tmp_path, monkeypatch):
    """Two at a time on each of two; a place that falls free is taken on its own GPU."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "seed = json.loads(sys.argv[2])['seed']; work = pathlib.Path(sys.argv[sys.argv.index('--work') + 1])\n"
        "(work / f'gpu-{seed}').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while seed < 4 and not (seed == 1 or (work / 'gpu-4').exists()): time.sleep(0.05)\n"
        "while seed == 1 and not all((work / f'gpu-{s}').exists() for s in (0, 2, 3)): time.sleep(0.05)\n"
    )
    monkeypatch.setattr(scheduler, "SCRIPT", script)
    monkeypatch.setattr(scheduler, "TO_STOP", 0.5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    runs = [Run("sets_busi", "nnunet", 5, seed) for seed in (0, 1, 0, 2, 3, 4)]  # one is named twice
    scheduler.train_all(runs, tmp_path, "cuda", 2, 60)
    gpus = [(tmp_path / f"gpu-{seed}").read_text() for seed in range(5)]
    assert gpus == ["GPU-a", "GPU-b", "GPU-a", "GPU-b", "GPU-b"]  # the last in the place of the second


# ---- what travels ----------------------------------------------------------------------------------------------------


def preprocessed_dataset(folder: Path, name: str, cases: list[str], model_plans: str) -> Path:
    """A flat dataset as nnU-Net preprocesses it, of images with a brighter disc."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    dataset = folder / name
    (dataset / "nnUNetPlans_2d").mkdir(parents=True)
    for i, case in enumerate(cases):
        mask = disc(i, SIZE, SIZE)
        save(dataset / "gt_segmentations" / f"{case}.png", grey(mask) // 255)
        image = picture(i, 1, SIZE, SIZE).astype(np.float32)[None, None]
        labels = mask.astype(np.int16)[None, None]
        properties = {
            "spacing": [999.0, 1.0, 1.0],
            "shape_before_cropping": (1, SIZE, SIZE),
            "bbox_used_for_cropping": [[0, 1], [0, SIZE], [0, SIZE]],
            "shape_after_cropping_and_before_resampling": (1, SIZE, SIZE),
            "class_locations": DefaultPreprocessor._sample_foreground_locations(labels, [1]),
        }
        sizes = {}
        for array, end in ((image, ""), (labels, "_seg")):
            sizes[f"blocks{end}"], sizes[f"chunks{end}"] = comp_blosc2_params(array.shape, (SIZE, SIZE), array.itemsize)
        image = (image - image.mean()) / image.std()
        nnUNetDatasetBlosc2.save_case(image, labels, properties, str(dataset / "nnUNetPlans_2d" / case), **sizes)
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = tiny_plans.configuration([SIZE, SIZE], batch_dice=False, data_identifier="nnUNetPlans_2d")
    for what in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = resampling | {"is_seg": what == "seg"}
    plans = tiny_plans.plans(**{"2d": configuration}) | {"dataset_name": name, "plans_name": model_plans}
    plans |= {"image_reader_writer": "NaturalImage2DIO"}
    (dataset / f"{model_plans}.json").write_text(json.dumps(plans))
    (dataset / "dataset.json").write_text(json.dumps(dataset_json(n_cases=len(cases))))
    (dataset / "dataset_fingerprint.json").write_text("{}")
    (dataset / "splits_final.json").write_text(json.dumps([{"train": TRAINING, "val": VALIDATION}]))
    return dataset


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


def test_a_packed_dataset_arrives_as_nnunet_wrote_it(tmp_path):
    import blosc2

    dataset = preprocessed_dataset(tmp_path / "here", BUSI, TRAINING, "nnUNetPlans_x")
    packs.pack_dataset(dataset, "nnUNetPlans_2d", ["nnUNetPlans_x"], tmp_path / "pack.tar.xz")
    packs.unpack_dataset(tmp_path / "pack.tar.xz", tmp_path / "there", workers=2)
    files = sorted(p.relative_to(dataset) for p in dataset.rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "there" / BUSI) for p in (tmp_path / "there").rglob("*") if p.is_file()
    )
    for file in files:
        here, there = dataset / file, tmp_path / "there" / BUSI / file
        if file.suffix == ".b2nd":
            a, b = blosc2.open(str(here)), blosc2.open(str(there))
            assert (a.dtype, a.chunks, a.blocks) == (b.dtype, b.chunks, b.blocks) and np.array_equal(a[:], b[:])
        elif file.suffix == ".pkl":
            assert equal(pickle.loads(here.read_bytes()), pickle.loads(there.read_bytes()))
        else:
            assert here.read_bytes() == there.read_bytes()


def test_results_come_back_in_pieces_and_models_as_far_as_there_is_room(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("small", 40_000), ("large", 4_000_000), ("smaller", 39_000)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "record.json").write_text("{}")
        (tmp_path / "runs" / name / "validation.npz").write_bytes(random.bytes(300_000))
        fold = tmp_path / "results" / name / "Dataset" / "Trainer__Plans__2d" / "fold_0"
        fold.mkdir(parents=True)
        (fold / "weights.pth").write_bytes(random.bytes(size))
        (fold.parent / "plans.json").write_text("{}")
    (tmp_path / "runs" / "small" / ".1.validation-mirrored.npz").write_bytes(b"half of it")
    out = tmp_path / "out"
    left_out = packs.bundle(tmp_path / "runs", tmp_path / "results", out, piece=2**20, pieces=4)
    assert left_out == ["large"] and 1 < len(list(out.iterdir())) <= 4
    assert all(file.stat().st_size <= 2**20 for file in out.iterdir())
    assert packs.join(out, "results.tar.xz", tmp_path / "back") and packs.join(out, "models.tar", tmp_path / "back")
    for name in ("small", "large"):
        file = f"runs/{name}/validation.npz"
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert not list((tmp_path / "back").rglob(".*"))  # what is still being written
    weights = (tmp_path / "back").glob("models/**/weights.pth")
    assert sorted(file.stat().st_size for file in weights) == [39_000, 40_000]
    left_out = packs.bundle(tmp_path / "runs", tmp_path / "results", tmp_path / "tight", piece=2**20 + 50_000, pieces=2)
    assert left_out == ["small", "large"]


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize("python", ["old", "new"])
@pytest.mark.parametrize(
    "members, said",
    [
        ([member("../out/x")], "'../out/x', which would be written outside"),
        ([member("runs/../../out/x")], "which would be written outside"),
        ([member("OUT/x")], "which would be written outside"),
        ([member("runs/link", tarfile.SYMTYPE, "../../out"), member("runs/link/x")], "'runs/link', a link or device"),
        ([member("runs/link", tarfile.SYMTYPE, "OUT"), member("runs/link/x")], "'runs/link', a link or device"),
        ([member("runs/x", tarfile.LNKTYPE, "../out/there")], "'runs/x', a link or device"),
        ([member("runs/x", tarfile.FIFOTYPE)], "'runs/x', a link or device"),
        ([member("there_already/x")], "which would be written outside"),
    ],
    ids=["parent", "parent in a path", "absolute", "link", "absolute link", "hard link", "fifo", "link in the folder"],
)
def test_nothing_is_unpacked_outside_the_folder(tmp_path, monkeypatch, members, said, python):
    out, target = tmp_path / "out", tmp_path / "target"
    out.mkdir(), target.mkdir()
    (out / "there").write_text("kept")
    (target / "there_already").symlink_to(out)
    if python == "old":  # before 3.10.12 and 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "pack.tar.xz", "w:xz") as tar:
        for info in (member("runs/first"), *members):
            info = copy.copy(info)
            info.name, info.linkname = (text.replace("OUT", str(out)) for text in (info.name, info.linkname))
            tar.addfile(info, io.BytesIO(b"evil") if info.size else None)
    packs.cut(tmp_path / "pack.tar.xz", tmp_path, 2**20)
    for unpack in (
        lambda: packs.unpack_dataset(tmp_path / "pack.tar.xz", target, workers=1),
        lambda: packs.join(tmp_path, "pack.tar.xz", target),
    ):
        with pytest.raises(ValueError, match=re.escape(said)) as error:
            unpack()
        assert "\n" not in str(error.value) and "pack.tar.xz holds" in str(error.value)
    assert [p.name for p in target.iterdir()] == ["there_already"]
    assert [p.name for p in out.iterdir()] == ["there"] and (out / "there").read_text() == "kept"


# ---- a rehearsal -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("monai") is None, reason="needs the extra [evaluation]")
def test_rehearsal_of_a_training(tmp_path, monkeypatch):
    """Two epochs of two steps, put aside after the first; then predictions, scores and tables."""
    from evidence_parts.scores import score_all
    from evidence_parts.training import OutOfTime, train_run

    run = Run("sets_busi", "published", epochs=2, iterations=2)
    preprocessed_dataset(tmp_path / "preprocessed", BUSI, TRAINING + VALIDATION, PUBLISHED)
    preprocessed_dataset(tmp_path / "preprocessed", STU, UNSEEN, "nnUNetPlans")
    folders = {"raw": "raw", "preprocessed": "preprocessed", "results": f"results/{run.name}"}
    for name, folder in folders.items():
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    with pytest.raises(OutOfTime):
        train_run(run, tmp_path, "cpu", until=0)
    assert json.loads((tmp_path / "runs" / run.name / "progress.json").read_text())["epoch"] == 1
    train_run(run, tmp_path, "cpu", until=float("inf"))

    written = json.loads((tmp_path / "runs" / run.name / "record.json").read_text())
    assert len(written["train_losses"]) == 2 and len(written["first_steps_s"]) == 2 and written["iterations"] == 4
    assert written["cases"] == {"training": 3, "validation": 2} and written["versions"]["torch"]
    for name, cases in (("validation", VALIDATION), (f"{STU}-mirrored", UNSEEN)):
        with np.load(tmp_path / "runs" / run.name / f"{name}.npz") as labels:
            assert labels.files == cases and all(labels[case].shape == (1, SIZE, SIZE) for case in cases)

    (model,) = (tmp_path / "results" / run.name / BUSI).iterdir()
    assert model.name == f"nnUNetTrainerLGMSNet__{PUBLISHED}__2d" and (model / "fold_0/weights.pth").is_file()
    assert score_all(tmp_path / "runs", tmp_path / "preprocessed", tmp_path / "out" / "evidence") == [run.name]
    results = report.Results(tmp_path / "out")
    assert set(results.runs[0]["scores"]["validation"]["cases"]) == set(VALIDATION)
    assert "Accuracy is **not measured yet**" in report.readme_section(results)  # without a U-Net beside it
    assert report.evidence_md(results).count(run.name) == 1
