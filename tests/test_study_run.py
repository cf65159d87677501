"""A whole study on this machine: a variant, two folds, killed, resumed with a part that fails, and completed.

The tests build on each other in the order of the file. ``tests/slurm/run.sh`` runs the same study on a real SLURM.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("snakemake", reason="the extra [study] needs Python 3.11")

from conftest import ROOT
from study_data import TRAINER, make_study

DATASET = "Dataset801_Disc"
KILLED = "kernels_5"  # the variant; its fold 1 is half-trained when everything is killed

pytestmark = pytest.mark.slow


class Study:
    """The study's folder and the command that runs it."""

    def __init__(self, folder: Path):
        self.variables = make_study(folder, [KILLED])  # one variant: each costs a minute
        self.yaml = folder / "study.yaml"
        self.folder = Path(self.variables["nnUNet_results"]) / "studies" / "discs"
        self.hold = folder / "hold"
        self.unseen_label = min((folder / "nnUNet_raw" / "Dataset802_Unseen" / "labelsTr").iterdir())
        base = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet")}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.env = {**base, **self.variables, "PYTHONPATH": path, "STUDY_TEST_HOLDS": str(self.hold)}

    def start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", *(words or ("nnunet_lgms", "study", "run", str(self.yaml)))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.env, start_new_session=True, **pipes)

    def run(self, *words: str, code: int) -> str:
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == code, output[-6000:]
        return output

    def fold(self, variant: str, fold: int) -> Path:
        model = f"{TRAINER}__nnUNetPlans_{variant}__2d"
        return Path(self.variables["nnUNet_results"]) / DATASET / model / f"fold_{fold}"

    def epochs(self, variant: str, fold: int) -> list[list[str]]:
        """The epochs that were trained, a list for every time that the training was started."""
        logs = sorted(self.fold(variant, fold).glob("training_log_*.txt"))
        return [re.findall(r"Epoch (\d+)", log.read_text()) for log in logs]

    @property
    def report(self) -> str:
        return (self.folder / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def finished_then(study: Study) -> dict[Path, int]:
    """Runs the study until one fold is finished and another half-trained, and kills everything.

    A label file of the unseen data set is damaged, so zero-shot tests fail.

    What was finished, and when it was written.
    """
    study.hold.write_text(KILLED)
    study.unseen_label.rename(study.unseen_label.with_suffix(".whole"))
    study.unseen_label.write_bytes(b"damaged")
    process = study.start()
    try:
        end = time.monotonic() + 900
        while not (
            list((study.folder / "train").rglob("fold_*.json"))
            and (study.fold(KILLED, 1) / "checkpoint_latest.pth").is_file()
        ):
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(1)  # until the checkpoint is written as a whole
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    study.hold.unlink()
    assert study.epochs(KILLED, 1) == [["0"]]
    done = [json.loads(file.read_text()) and file for file in (study.folder / "train").rglob("fold_*.json")]
    finals = [
        Path(study.fold("", 0).parents[1], *file.parts[-2:]).with_suffix("") / "checkpoint_final.pth" for file in done
    ]
    return {final: final.stat().st_mtime_ns for final in finals}


def test_killed_study_goes_on_and_what_fails_stops_nothing_else(study: Study, finished_then: dict[Path, int]) -> None:
    output = study.run(code=1)
    study.unseen_label.with_suffix(".whole").rename(study.unseen_label)

    assert f"{study.unseen_label} cannot be read" in output  # the reason of what failed, and all that did not is there
    assert re.search(r"<h2>Missing</h2>.*zeroshot: 1</summary>", study.report, re.S)
    assert "<summary>train" not in study.report and "<summary>evaluate" not in study.report
    assert finished_then and {final: final.stat().st_mtime_ns for final in finished_then} == finished_then
    assert study.epochs(KILLED, 1) == [["0"], ["1"]]  # from the checkpoint, not from the start
    assert all(len(list(final.parent.glob("training_log_*.txt"))) == 1 for final in finished_then)


def test_snakemake_called_directly_does_what_is_left(study: Study) -> None:
    said = study.run("nnunet_lgms", "study", "check", str(study.yaml), code=0)
    assert re.search(r"^ +train +2 +0$", said, re.M) and re.search(r"^ +zeroshot +1 +1$", said, re.M)
    command = shlex.split(said.rsplit(", or ", 1)[1])
    output = study.run(*command, "--quiet", "reason", code=0)
    rules = re.findall(r"^(?:local)?rule (\w+):", output, re.M)
    assert sorted(rules) == ["all", "report", "zeroshot"]
    assert "Missing" not in study.report and "missing" not in re.sub(r"<style>.*</style>", "", study.report, flags=re.S)


def test_report_has_the_numbers_of_nnunet(study: Study) -> None:
    with (study.folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    summaries = [study.fold(KILLED, fold) / "validation" / "summary.json" for fold in (0, 1)]
    dice = [json.loads(summary.read_text())["foreground_mean"]["Dice"] for summary in summaries]
    wanted = {"cases": "validation", "variant": KILLED, "label": "foreground mean", "metric": "Dice"}
    (row,) = (row for row in rows if wanted.items() <= row.items())
    assert float(row["mean"]) == pytest.approx(sum(dice) / 2)  # one case a fold
    assert (row["n"], row["folds"], row["folds_expected"]) == ("2", "2", "2")
    assert int(row["parameters"]) > 0 and float(row["gmac"]) > 0 and float(row["train_hours_per_fold"]) > 0
    assert f"{sum(dice) / 2:.3f}" in study.report
    assert {row["cases"] for row in rows} == {"validation", "test", "Dataset802_Unseen"}


def test_report_is_one_file_whose_links_lead_to_the_folds_reports(study: Study) -> None:
    assert study.report.count('src="data:image/png;base64,') == 2 and "http" not in study.report
    links = set(re.findall(r'href="([^"]+)"', study.report))
    assert len(links) == 1 + 2  # the numbers, and a report of every fold
    assert all((study.folder / link).is_file() for link in links)


def test_finished_study_has_nothing_to_do(study: Study) -> None:
    assert "Nothing to be done" in study.run(code=0)


def test_plans_that_changed_after_the_training_are_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_lgms.study.graph import Graph
    from nnunet_lgms.study.steps import train

    for name, value in study.variables.items():
        monkeypatch.setenv(name, value)
    file = Path(study.variables["nnUNet_preprocessed"]) / DATASET / f"nnUNetPlans_{KILLED}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["lgmsnet"]["lms_kernels"] = [7]
    file.write_text(json.dumps(plans))
    graph = Graph(study.yaml)
    model = graph.models(DATASET, KILLED)[0].name
    done = study.folder / graph.trained("unseeded", DATASET, model, 0)
    before = done.read_bytes()
    with pytest.raises(
        ValueError,
        match="was trained with lgmsnet.lms_kernels .5., and it is .7. now: put back what it was trained with",
    ):
        train(graph, done, "unseeded", DATASET, model, "0")
    assert done.read_bytes() == before
