"""Files that are written while the training goes on: what is in them, when they are waited for, and what goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainer import make_trainer

from nnunet_lgms.nnunet import aside, checkpoints
from nnunet_lgms.nnunet.aside import ProgressPicture, Writer
from nnunet_lgms.nnunet.errors import TrainingError

LOGGING = {
    "mean_fg_dice": [0.1, 0.2],
    "ema_fg_dice": [0.1, 0.11],
    "dice_per_class_or_region": [[0.1], [0.2]],
    "train_losses": [1.0, 0.5],
    "val_losses": [1.0, 0.6],
    "lrs": [0.02, 0.01],
    "epoch_start_timestamps": [0.0, 2.0],
    "epoch_end_timestamps": [1.0, 3.0],
}


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer whose epochs end with its latest checkpoint, and nothing else."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    trainer = make_trainer(patch_size=(16, 16))
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", lambda self: self.save_checkpoint(str(latest(self))))
    return trainer


def latest(trainer) -> Path:
    return Path(trainer.output_folder) / "checkpoint_latest.pth"


def first_weight(file: Path) -> float:
    return next(iter(torch.load(file, weights_only=False)["network_weights"].values())).flatten()[0].item()


def fill(trainer, value: float) -> None:
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(value)


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """Checkpoints are written when it is set."""
    goes_on, write = threading.Event(), checkpoints.write_checkpoint

    def slowly(*args) -> None:
        assert goes_on.wait(120)
        write(*args)

    monkeypatch.setattr(checkpoints, "write_checkpoint", slowly)
    return goes_on


def test_a_checkpoint_holds_what_was_at_the_epochs_end(trainer, slow_disk):
    trainer.writer = Writer()
    fill(trainer, 1.0)
    trainer.on_epoch_end()
    assert not latest(trainer).exists()
    fill(trainer, 2.0)  # the next epoch's steps
    slow_disk.set()
    trainer.writer.wait()
    assert first_weight(latest(trainer)) == 1.0


def test_at_most_the_checkpoints_of_one_epoch_are_unwritten(trainer, slow_disk):
    trainer.writer = Writer()
    trainer.on_epoch_end()
    second = threading.Thread(target=trainer.on_epoch_end)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    slow_disk.set()
    second.join(20)
    assert not second.is_alive()


def test_the_final_checkpoint_comes_after_those_that_are_unwritten(trainer, slow_disk):
    """nnU-Net removes the latest when it has saved the final one; it must not appear after that."""
    trainer.writer = Writer()
    trainer.on_epoch_end()
    threading.Timer(0.1, slow_disk.set).start()
    final = latest(trainer).with_name("checkpoint_final.pth")
    trainer.save_checkpoint(str(final))
    assert latest(trainer).is_file() and final.is_file()


def test_without_a_training_they_are_written_at_once(trainer):
    trainer.on_epoch_end()
    assert latest(trainer).is_file()


def test_an_error_surfaces_at_the_next_epochs_end(trainer, monkeypatch):
    def no_room(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.writer = Writer()
    trainer.on_epoch_end()
    trainer.writer.wait()
    before = latest(trainer).read_bytes()
    monkeypatch.setattr(os, "fsync", no_room)
    trainer.on_epoch_end()
    with pytest.raises(TrainingError, match="checkpoint_latest.pth cannot be written .No space left.*--c"):
        trainer.on_epoch_end()
    assert latest(trainer).read_bytes() == before
    assert not list(latest(trainer).parent.glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt("stopped"), RuntimeError("failed"), None])
def test_a_training_ends_when_all_is_written(trainer, slow_disk, monkeypatch, error):
    """Also one that fails: what it fails with is told, and what the epochs before left is there."""

    def run_training(self) -> None:
        self.on_epoch_end()
        threading.Timer(0.2, slow_disk.set).start()
        if error:
            raise error

    monkeypatch.setattr(nnUNetTrainer, "run_training", run_training)
    if error:
        with pytest.raises(type(error), match=str(error)):
            trainer.run_training()
    else:
        trainer.run_training()
    assert latest(trainer).is_file() and trainer.writer is None
    assert "plot_progress_png" not in vars(trainer.logger)


@pytest.mark.slow
def test_pictures_are_drawn_by_a_process(tmp_path):
    """In no time of this one, and without PyTorch; what cannot be written is an error of the next one."""
    picture = ProgressPicture()
    begin = time.perf_counter()
    for _ in range(20):
        picture.draw(str(tmp_path), LOGGING)
    assert time.perf_counter() - begin < 1  # one of them takes about that
    while not (tmp_path / "progress.png").exists():
        time.sleep(0.05)
    if sys.platform == "linux":
        assert "libtorch" not in Path(f"/proc/{picture._process.pid}/maps").read_text()
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    process = picture._process
    picture.draw(str(tmp_path / "nowhere"), LOGGING)
    with pytest.raises(OSError, match="No such file or directory"):
        picture.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["progress.png"]
    assert process.returncode == 0


def test_only_the_newest_picture_is_drawn_when_the_process_is_behind(monkeypatch):
    goes_on, drawn = threading.Event(), []

    def ask(self, content: bytes) -> None:
        assert goes_on.wait(120)
        drawn.append(aside.pickle.loads(content)[0])

    monkeypatch.setattr(ProgressPicture, "_ask", ask)
    picture = ProgressPicture()
    picture.draw("0", {})
    while picture._newest is not None:  # until it is being drawn
        time.sleep(0.01)
    for i in range(1, 5):
        picture.draw(str(i), {})
    goes_on.set()
    picture.finish()
    assert drawn == ["0", "4"]


@pytest.mark.parametrize("killed", [1, 2])
def test_another_process_takes_the_place_of_one_that_was_killed(killed, monkeypatch, capfd):
    """Once; a training goes on without the picture."""
    starts, popen = [], subprocess.Popen

    def start(command, **options) -> subprocess.Popen:
        starts.append(command)
        answers = "import os, sys; os.read(0, 9999); print('null', flush=True); sys.stdin.read()"
        return popen([sys.executable, "-S", "-c", "" if len(starts) <= killed else answers], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    picture = ProgressPicture()
    picture.draw("folder", LOGGING)
    picture.finish()
    said = capfd.readouterr().err
    assert len(starts) == 2 and said.count("was killed") == killed and said.count("takes its place") == 1
