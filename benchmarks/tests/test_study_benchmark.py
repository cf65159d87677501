"""The benchmark of a study on all GPUs, with a short script in place of the study."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import study_gpus
from record import ROOT

STUDY = """
import json, os, pathlib, subprocess, sys, time
file = pathlib.Path(sys.argv[1])
study = json.loads(file.read_text())
results = pathlib.Path(os.environ["nnUNet_results"])
folder, (seed,) = results / "studies" / study["name"], study["seeds"]
assert os.environ["MEASURED_EPOCHS"] == "3" and study["device"] == "cuda"
code = 0
for fold in study["folds"]:
    done = folder / "train" / f"fold_{fold}.json"
    if done.exists():
        continue
    model = f"{study['trainer']}__nnUNetPlans__{study['configurations'][0]}"
    trained = results / f"seed_{seed}" / list(study["datasets"])[0] / model / f"fold_{fold}"
    trained.mkdir(parents=True, exist_ok=True)
    again = len(list(trained.glob("training_log_*")))
    (trained / f"training_log_{again}.txt").write_text("Epoch 0\\nEpoch 1\\n")
    (folder / "logs" / "train").mkdir(parents=True, exist_ok=True)
    log = time.strftime("%Y-%m-%d %H:%M:%S") + f" + nnUNetv2_train x\\nOn a card, {fold}\\n"
    (folder / "logs" / "train" / f"fold_{fold}.log").write_text(log)
    if study["name"] == "killed" and fold == study["folds"][-1] and not again:
        words = ["-m", "nnunet_lgms.study", "train", str(file), str(fold)]
        job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
        (trained / "checkpoint_latest.pth").write_text("")
        code = int(job.wait() != 0)
        continue
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text("")
sys.exit(code)
"""


@pytest.fixture
def three_gpus(tmp_path, monkeypatch):
    """The words of a run on them."""
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    start, plan = study_gpus.start, subprocess.run

    def start_script(command, log):
        assert command[1:5] == ["-m", "nnunet_lgms", "study", "run"] and command[-2:] == ["--profile", "gpus"]
        return start([sys.executable, str(script), command[5]], log)

    def plan_nothing(command, **options):
        if command[:3] != study_gpus.PLAN:
            return plan(command, **options)
        (tmp_path / "work" / "preprocessed" / study_gpus.HIPPOCAMPUS).mkdir()

    monkeypatch.setattr(study_gpus, "start", start_script)
    monkeypatch.setattr(study_gpus.subprocess, "run", plan_nothing)
    monkeypatch.setattr(study_gpus.torch.cuda, "device_count", lambda: 3)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "PYTHONPATH"):
        monkeypatch.setenv(name, "")  # what the benchmark sets ends with the test
    for name in ("MEASURED_EPOCHS", "MEASURED_ITERATIONS"):
        monkeypatch.setenv(name, "1")
    return ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--epochs", "3"]


def test_a_study_on_all_gpus_and_one_that_is_killed(three_gpus, tmp_path):
    (tmp_path / "study_gpus.json").write_text('{"8 GPUs": "of an earlier run"}')
    assert study_gpus.main(three_gpus) == 0
    content = json.loads((tmp_path / "study_gpus.json").read_text())
    assert content["8 GPUs"] == "of an earlier run"
    found = content["3 GPUs"]
    assert found["all"]["jobs"] == found["all"]["gpus"] == len(found["all"]["seconds_of_each"]) == 3
    killed = found["killed"]
    assert killed["exit_codes"] == [1, 0] and killed["jobs_done_before_and_after"] == [2, 3]
    assert killed["epochs_before_and_after"] == [2, 2] and killed["others_began_once"]
    splits = json.loads((tmp_path / "work" / "preprocessed" / study_gpus.HIPPOCAMPUS / "splits_final.json").read_text())
    labels = len(list((ROOT / "demo" / "data" / "hippocampus" / "labelsTr").glob("*.nii.gz")))
    assert len(splits) == 3 and sum(len(split["val"]) for split in splits) == labels


def test_what_would_be_overwritten_is_refused(three_gpus, tmp_path, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "x").write_text("")
    with pytest.raises(SystemExit):
        study_gpus.main(three_gpus)
    assert "is not empty: name another folder" in capsys.readouterr().err
