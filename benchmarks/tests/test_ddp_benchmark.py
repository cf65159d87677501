"""The benchmark of several GPUs, with a short script in place of nnU-Net's training."""

from __future__ import annotations

import json
import sys

import ddp
import pytest

TRAINING = """
import json, os, pathlib, subprocess, sys, time
words, env = sys.argv[1:], os.environ
n, goes_on = int(words[words.index("-num_gpus") + 1]), "--c" in words
assert n > 1 or goes_on or env["NCCL_NVLS_ENABLE"] == "0" and "trainers" in env["nnUNet_extTrainer"]
epochs, iterations = int(env["MEASURED_EPOCHS"]), int(env["MEASURED_ITERATIONS"])
stop = int(env.get("MEASURED_STOP", epochs))
fold = pathlib.Path(env["nnUNet_results"], "Dataset004_Hippocampus", "trainer", "fold_0")
fold.mkdir(parents=True, exist_ok=True)
file = fold / "measured.json"
done = json.loads(file.read_text())["epochs_done"] if goes_on else 0
seconds = [iterations / n] * (stop - done)  # n GPUs are n times as fast
losses = [1 / (epoch + 1) + 0.01 * int(env.get("MEASURED_SEED", 0)) for epoch in range(stop)]
record = {"epochs_done": stop, "seconds": seconds, "waiting": [0.0] * len(seconds), "times": [time.time()]}
if iterations > 10:  # the training that is to be killed
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "spawn_main"])
    file.write_text(json.dumps(record | {"epochs_done": 1, "losses": losses[:1], "batch_size": 0}))
    rank.wait()
    sys.exit(1)
batch = int(words[words.index("-p") + 1].removeprefix("ddpPlansBatch"))
if goes_on or "MEASURED_STOP" in env:
    import torch
    name = "checkpoint_final.pth" if goes_on else "checkpoint_latest.pth"
    torch.save({"network_weights": {"a": 0, "b": 0}}, fold / name)
if env.get("MEASURED_VALIDATION") == "1":
    (fold / "validation").mkdir()
    (fold / "validation" / "case.nii.gz").write_text("")
file.write_text(json.dumps(record | {"losses": losses, "batch_size": batch}))
sys.exit(int("MEASURED_STOP" in env))
"""


@pytest.fixture
def four_gpus(tmp_path, monkeypatch):
    """Words for a run on four of them."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)

    def prepare(folder, synthetic):
        preprocessed = folder / "nnUNet_preprocessed"
        monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
        (preprocessed / "Dataset004_Hippocampus").mkdir(parents=True)
        configuration = {"batch_size": 2, "patch_size": [40, 56, 40]}
        plans = {"plans_name": "nnUNetPlans", "configurations": {ddp.CONFIGURATION: configuration}}
        (preprocessed / "Dataset004_Hippocampus" / "nnUNetPlans.json").write_text(json.dumps(plans))
        return ["4", "4"]

    monkeypatch.setattr(ddp, "TRAIN", [sys.executable, str(script)])
    monkeypatch.setattr(ddp, "prepare", prepare)
    monkeypatch.setattr(ddp.torch.cuda, "device_count", lambda: 4)
    return ["--work", str(tmp_path / "work"), "--output", str(tmp_path), "--epochs", "4", "--iterations", "8"]


@pytest.mark.slow
def test_every_part_is_measured(four_gpus, tmp_path):
    assert ddp.main(four_gpus) == 0
    found = json.loads((tmp_path / "ddp.json").read_text())["datasets"]["Dataset004_Hippocampus"]["4 GPUs"]
    speed = found["compare_speed"]
    assert (speed["planned_batch"], speed["shared_batch"]) == (2, 4)
    assert speed["samples_per_second"]["one, planned batch"] == 2 and speed["ratio_at_equal_batch_per_device"] == 16
    assert speed["ratio_at_equal_global_batch"] == 4 and speed["mean_difference_one_all"] == 0
    assert found["compare_losses"]["mean_difference_one_other_seed"] == pytest.approx(0.01)
    for way, validated in (("from_2_to_4", 1), ("from_4_to_2", None)):
        went_on = found["continue_on_another_number"][way]
        assert went_on["losses_go_on"] and went_on["same_names_in_both_checkpoints"]
        assert went_on["stopped_after_epochs"] == went_on["epochs_of_the_second_run"] == 2
        assert went_on.get("validated_cases") == validated
    killed = found["kill_one_process"]
    assert killed["ended"] and killed["processes"] == 1 and killed["exit_code"] == 1 and killed["processes_left"] == 0
    assert killed["epochs_before"] == 1 and killed["epochs_after_continuing"] == 4


def test_a_part_that_fails_is_told_and_stops_no_other(four_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ddp, "TRAIN", [sys.executable, "-c", "raise SystemExit('no such GPU')"])
    assert ddp.main([*four_gpus, "--gpus", "2", "--parts", "speed_hippocampus", "losses"]) == 1
    found = json.loads((tmp_path / "ddp.json").read_text())["datasets"]["Dataset004_Hippocampus"]["2 GPUs"]
    assert found.keys() == {"compare_speed", "compare_losses"}
    for part in found.values():
        assert "ended with 1: no such GPU" in part["failed"]["error"] and part["failed"]["run"]["epochs"] == 4


def test_too_few_gpus_are_refused(four_gpus, monkeypatch, capsys):
    for there, words in ((1, []), (4, ["--gpus", "5"])):
        monkeypatch.setattr(ddp.torch.cuda, "device_count", lambda there=there: there)
        with pytest.raises(SystemExit):
            ddp.main([*four_gpus, *words])
    said = capsys.readouterr().err
    assert "1 GPUs found, 2 needed" in said and "--gpus 5: give 2 to 4" in said
