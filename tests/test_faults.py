"""What goes wrong around a training: one sentence, an exit code that is not 0, and nothing destroyed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from another_process import another_process_holds
from conftest import ROOT
from nnunetv2.run.run_training import get_trainer_from_args
from tiny_trainer import make_trainer
from workshop import TRAINER, Workshop, make_case, write

import nnunet_lgms
from nnunet_lgms import cli
from nnunet_lgms.inference import load_predictor
from nnunet_lgms.nnunet.checks import check_room
from nnunet_lgms.nnunet.errors import TrainingError
from nnunet_lgms.nnunet.workers import PROCESS_ENDED


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def organs(workshop) -> str:
    """A trained dataset; tests leave it as it is."""
    name = workshop.dataset(501, "Organs")
    workshop.train(name)
    return name


@pytest.fixture
def model(workshop, organs, tmp_path, monkeypatch) -> Path:
    """A copy of the trained model, in a results folder of its own."""
    results = tmp_path / "results"
    shutil.copytree(workshop.results, results)
    monkeypatch.setitem(workshop.env, "nnUNet_results", str(results))
    return results / workshop.model(organs).relative_to(workshop.results)


@pytest.fixture
def data(workshop, organs, tmp_path, monkeypatch) -> Path:
    """A copy of the preprocessed dataset, in a folder of its own."""
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(workshop.preprocessed, preprocessed)
    monkeypatch.setitem(workshop.env, "nnUNet_preprocessed", str(preprocessed))
    return preprocessed / organs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB that can be remounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # an exception may still hold a file


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and error.value.code == text  # what Python prints for a SystemExit; its exit code is 1
    return text


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(0)  # kills.py stops what hangs
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that have imported PyTorch")
def test_killed_at_random_moments(clean_env):
    """A few kills of each; NNUNET_LGMS_KILLS=20 for more (docs/reference/features.md has that run)."""
    kills = os.environ.get("NNUNET_LGMS_KILLS", "2")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kills.py"), "--kills", kills],
        env={**clean_env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    seen = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["training", "training_with_workers", "preprocessing", "conversion", "evaluation"]
    assert [task["task"] for task in seen] == names
    assert all(task["same_result"] and task["kills"] == int(kills) for task in seen)


HANGS = """
import multiprocessing, os, signal, sys, threading
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunet_lgms.nnunet.workers import end_if_one_ends

class Loader:
    def set_thread_id(self, number): pass
    def __next__(self): return {}

batches = NonDetMultiThreadedAugmenter(Loader(), None, 1, wait_time=0.002)
next(batches)
(worker,) = multiprocessing.active_children()
ended = threading.Event()
end_if_one_ends([worker], ended, grace=0.5)
if sys.argv[1] == "ended":
    ended.set()
else:
    batches.abort_event._cond.acquire()  # as a process does that is killed while it looks at it
os.kill(worker.pid, signal.SIGKILL)
worker.join()
if ended.wait(2):
    threading.Event().wait(2)
    sys.exit("it may go on")
next(batches)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize(("training", "said"), [("waits", PROCESS_ENDED), ("ended", "it may go on")])
def test_a_training_does_not_wait_for_ever_for_a_killed_process(clean_env, training, said):
    """Seen once in 1,200 kills: the event that nnU-Net's training looks at stays locked."""
    result = subprocess.run(
        [sys.executable, "-c", HANGS, training],
        env={**clean_env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == said, result.stderr


def test_datasets_go_to_processes_that_are_spawned(workshop, organs):
    """Pickled, as on systems without fork."""
    with workshop.environment():
        trainer = get_trainer_from_args(organs, "3d_fullres", 0, TRAINER, device=torch.device("cpu"))
        trainer.initialize()
        datasets = trainer.get_tr_and_val_datasets()
    for dataset, n in zip(datasets, (4, 1), strict=True):
        again = pickle.loads(pickle.dumps(dataset))
        assert again.identifiers == dataset.identifiers and len(again.identifiers) == n
        image, expected = (d.load_case(dataset.identifiers[0])[0][:] for d in (again, dataset))
        assert np.array_equal(image, expected)


SPAWNS = """
import multiprocessing
import os
import sys

from nnunet_lgms import locks
from open_files import WindowsDisk

let_go = locks._let_go


def let_go_in_windows(*arguments):
    os.name = "nt"
    try:
        let_go(*arguments)
    finally:
        os.name = "posix"


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    locks._let_go = let_go_in_windows
    os.__dict__.update(WindowsDisk().functions())
    command, *sys.argv[1:] = sys.argv[1:]
    if command == "train":
        from nnunetv2.run.run_training import run_training_entry
        run_training_entry()
    else:
        from nnunet_lgms.cli import main
        sys.exit(main([command, *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which files are open")
def test_a_training_and_a_prediction_as_on_windows(workshop, organs, tmp_path, clean_env):
    """Processes are spawned, and no file is replaced or removed while the process that does it has it open."""
    script = tmp_path / "spawns.py"
    script.write_text(SPAWNS)
    env = {**clean_env, **workshop.env, "nnUNet_n_proc_DA": "1", "nnUNet_results": str(tmp_path / "results")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])

    def run(*words: object) -> None:
        done = subprocess.run([sys.executable, script, *map(str, words)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run("train", organs, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu")
    folder = tmp_path / "results" / organs / f"{TRAINER}__nnUNetPlans__3d_fullres"
    assert (folder / "fold_0/validation/summary.json").is_file() and (folder / "fold_0/progress.png").is_file()
    images, ours = workshop.raw / organs / "imagesTs", tmp_path / "ours"
    run("predict", "-i", images, "-o", ours, "-m", folder, "-device", "cpu", "--save_probabilities")
    run("predict", "-i", images, "-o", ours, "-m", folder, "-device", "cpu", "--save_probabilities")  # replaces them
    assert {"case_0.nii.gz", "case_0.npz", "case_0.pkl"} <= {file.name for file in ours.iterdir()}


def test_best_checkpoint_after_a_kill_between_latest_and_best(workshop, tmp_path):
    """nnU-Net saves the latest checkpoint of an epoch first, and looks then whether that epoch was the best."""
    with workshop.environment():
        trainer = make_trainer()
        trainer.output_folder, trainer.was_initialized = str(tmp_path), True
        for key, values in {"mean_fg_dice": [0.3, 0.5], "train_losses": [1.0, 0.9]}.items():
            for epoch, value in enumerate(values):
                trainer.logger.log(key, value, epoch)
        trainer.current_epoch, trainer._best_ema = 1, 0.3
        trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))

        continued = make_trainer()
        continued.output_folder, continued.was_initialized = str(tmp_path), True
        continued.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    best = torch.load(tmp_path / "checkpoint_best.pth", weights_only=False)
    assert continued._best_ema == best["_best_ema"] == pytest.approx(0.9 * 0.3 + 0.1 * 0.5)
    assert continued.current_epoch == best["current_epoch"] == 2
    for name, weight in trainer.network.state_dict().items():
        assert torch.equal(best["network_weights"][name], weight)


# --- the disk --------------------------------------------------------------------------------------------------------


def assert_checkpoint_survives(trainer, folder: Path, break_the_disk) -> None:
    file = folder / "checkpoint_latest.pth"
    trainer.output_folder = str(folder)
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    break_the_disk()
    with pytest.raises(TrainingError, match="cannot be written.*--c") as error:
        trainer.save_checkpoint(str(file))
    assert str(file) in sentence(error)
    assert file.read_bytes() == before
    assert not list(folder.glob(".*.pth"))


def test_disk_full_while_a_checkpoint_is_written(workshop, small_disk):
    with workshop.environment():
        trainer = make_trainer()

    def fill() -> None:
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - 100_000))

    assert_checkpoint_survives(trainer, small_disk, fill)


def no_room(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_error_while_a_checkpoint_is_written(workshop, tmp_path, monkeypatch):
    """The same without the right to mount: all is written, then the system says no."""
    with workshop.environment():
        trainer = make_trainer()
    assert_checkpoint_survives(trainer, tmp_path, lambda: monkeypatch.setattr(os, "fsync", no_room))


def test_disk_full_at_the_start(workshop, organs, model, monkeypatch):
    """nnU-Net writes plans.json in place when a training starts: it must not get so far."""
    plans = (model / "plans.json").read_bytes()
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"MiB left.*checkpoints.*need .* MiB"):
        workshop.train(organs)
    assert (model / "plans.json").read_bytes() == plans


def test_shared_memory_of_a_container(workshop, organs, model, monkeypatch):
    """Processes that prepare batches would fail one batch after the other, and the training wait for ever."""
    usage = shutil.disk_usage
    small = shutil._ntuple_diskusage(65536, 0, 65536)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small if str(path) == "/dev/shm" else usage(path))
    with pytest.raises(
        TrainingError, match="/dev/shm has 0.1 MiB left, and the processes that prepare batches"
    ) as error:
        workshop.train(organs, nnUNet_n_proc_DA="2")
    sentence(error)
    workshop.train(organs, nnUNet_n_proc_DA="0")


def test_disk_full_in_the_validation(workshop, organs, model, small_disk):
    folder = model / "fold_0" / "validation"
    shutil.rmtree(folder)
    (small_disk / "validation").mkdir()
    folder.symlink_to(small_disk / "validation")
    weights = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    filler = small_disk / "filler"
    for options in ([], ["--npz"]):
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        with pytest.raises(TrainingError, match="validation has no room left.*with --val") as error:
            workshop.train(organs, "--val", *options)
        sentence(error)
        filler.unlink()
    assert (model / "fold_0" / "checkpoint_final.pth").read_bytes() == weights
    workshop.train(organs, "--val", "--npz")
    assert {"case_0.nii.gz", "case_0.npz", "summary.json"} <= {file.name for file in folder.iterdir()}


def test_preprocessed_data_that_is_read_only(workshop, organs, small_disk, monkeypatch):
    """nnU-Net writes its split there when it trains for the first time."""
    shutil.copytree(workshop.preprocessed, small_disk, dirs_exist_ok=True)
    (small_disk / organs / "splits_final.json").unlink()
    monkeypatch.setitem(workshop.env, "nnUNet_preprocessed", str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TrainingError, match="splits_final.json cannot be read or written .Read-only") as error:
        workshop.train(organs, fold=1)
    sentence(error)


@pytest.mark.slow
def test_progress_picture_that_cannot_be_written(workshop, organs, model, monkeypatch):
    monkeypatch.setattr(workshop, "pictures", True)
    (model / "fold_0" / "progress.png" / "in the way").mkdir(parents=True)
    with pytest.raises(TrainingError, match="fold_0 cannot be written .*Is a directory.*continue with --c"):
        workshop.train(organs)
    assert torch.load(model / "fold_0" / "checkpoint_best.pth", weights_only=False)["current_epoch"] == 1


def test_read_only_results(workshop, organs, small_disk, monkeypatch):
    monkeypatch.setitem(workshop.env, "nnUNet_results", str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TrainingError, match="nnUNet_results cannot be written.*Read-only") as error:
        workshop.train(organs)
    sentence(error)
    with pytest.raises(ValueError, match="cannot be written.*Read-only"):
        check_room(small_disk, 0)  # where the folder of the fold was there already


def test_results_folder_that_is_a_file(workshop, organs, tmp_path, monkeypatch):
    (tmp_path / "results").write_text("")
    monkeypatch.setitem(workshop.env, "nnUNet_results", str(tmp_path / "results"))
    with pytest.raises(TrainingError, match="nnUNet_results cannot be written"):
        workshop.train(organs)


def evaluation_folders(folder: Path) -> list[str]:
    """Predictions and references of two cases, as arguments of ``nnunet_lgms evaluate``."""
    pytest.importorskip("monai")
    folders = [folder / "predictions", folder / "references"]
    for each in folders:
        each.mkdir()
        for seed in (0, 1):
            write(each / f"case_{seed}", make_case(seed, (20, 24, 22), 1)[1], (1.0, 1.0, 1.0), ".nii.gz")
    return [*map(str, folders), "--labels", "1", "2", "--workers", "1", "--bootstrap", "50"]


def test_disk_full_while_an_evaluation_is_written(small_disk, tmp_path, capsys):
    arguments = evaluation_folders(tmp_path)
    output = small_disk / "evaluation"
    assert cli.main(["evaluate", *arguments, "-o", str(output)]) == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert sorted(before) == ["cases.csv", "report.html", "summary.json"]
    capsys.readouterr()
    # room for the lock and the first file beside the old one, or for the first two
    for pages, file in ((2, "summary.json"), (2 + -(-len(before["summary.json"]) // 4096), "report.html")):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096 * pages))
        assert cli.main(["evaluate", *arguments, "-o", str(output), "--bootstrap", "60"]) == 2
        said = f"nnunet_lgms: {output / file}: No space left on device; free some space, or name another folder."
        assert capsys.readouterr().err.splitlines()[-1] == said
        assert {file.name: file.read_bytes() for file in output.iterdir()} == before
        filler.unlink()


@pytest.mark.parametrize("file", ["summary.json", "report.html"])
def test_error_while_an_evaluation_is_written(tmp_path, monkeypatch, capsys, file):
    """The same without the right to mount, and with no evaluation there before."""
    arguments = evaluation_folders(tmp_path)
    write_text = Path.write_text

    def full(self, *args, **options) -> int:
        if not self.name.endswith(file):
            return write_text(self, *args, **options)
        write_text(self, "half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    output = tmp_path / "evaluation"
    assert cli.main(["evaluate", *arguments, "-o", str(output)]) == 2
    said = f"nnunet_lgms: {output / file}: No space left on device; free some space, or name another folder."
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not output.exists()  # nor the folder, which was made for them


# --- the data --------------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


FAULTS = {
    "no case": ("nnUNetPlans_3d_fullres/case_2.b2nd", Path.unlink, "Case case_2 has no case_2.b2nd"),
    "no labels": ("nnUNetPlans_3d_fullres/case_2_seg.b2nd", Path.unlink, "Case case_2 has no case_2_seg.b2nd"),
    "no properties": ("nnUNetPlans_3d_fullres/case_2.pkl", Path.unlink, "Case case_2 has no case_2.pkl"),
    "cut image": ("nnUNetPlans_3d_fullres/case_2.b2nd", cut, "case_2.b2nd is damaged or was cut short"),
    "cut labels": ("nnUNetPlans_3d_fullres/case_2_seg.b2nd", cut, "case_2_seg.b2nd is damaged or was cut short"),
    "cut properties": ("nnUNetPlans_3d_fullres/case_2.pkl", cut, "case_2.pkl is damaged or was cut short"),
    "empty properties": ("nnUNetPlans_3d_fullres/case_2.pkl", lambda f: f.write_bytes(b""), "case_2.pkl is damaged"),
    "no reference": ("gt_segmentations/case_0.nii.gz", Path.unlink, "gt_segmentations has no reference of 1 case"),
    "no data": ("nnUNetPlans_3d_fullres", shutil.rmtree, "There is no preprocessed data"),
    "cut splits": ("splits_final.json", cut, "splits_final.json cannot be read.*remove it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_preprocessed_data(workshop, organs, data, fault):
    path, change, message = FAULTS[fault]
    change(data / path)
    before = sorted(data.rglob("*"))
    with pytest.raises(TrainingError, match=message) as error:
        workshop.train(organs)
    assert fault == "cut splits" or "run nnUNetv2_preprocess -d 501 -plans_name nnUNetPlans -c 3d_fullres" in sentence(
        error
    )
    assert sorted(data.rglob("*")) == before


def test_damage_in_the_middle_that_a_process_finds(workshop, organs, data, capfd):
    """It prints nnU-Net's traceback; the training ends with the sentence."""
    random = np.random.default_rng(0)
    smooth = np.linspace(-1, 1, 20 * 24 * 22, dtype=np.float32).reshape(1, 20, 24, 22)
    for file in (data / "nnUNetPlans_3d_fullres").glob("case_?.b2nd"):
        file.unlink()
        blosc2.asarray(smooth, urlpath=str(file), chunks=smooth.shape, blocks=(1, 8, 8, 8))
        content = file.read_bytes()
        for _ in range(50):  # some damage is read as other numbers
            start = int(random.integers(len(content) // 10, len(content) // 2))
            file.write_bytes(content[:start] + random.bytes(400) + content[start + 400 :])
            opened = blosc2.open(urlpath=str(file), mode="r")
            try:
                opened[:]
            except RuntimeError:
                break
        else:
            pytest.fail("no damage was found")
    with pytest.raises(TrainingError) as error:
        workshop.train(organs, nnUNet_n_proc_DA="1")
    assert sentence(error) == PROCESS_ENDED
    assert "Exception in background worker" in capfd.readouterr().out


def test_half_preprocessed_dataset_is_not_split(workshop, organs, data):
    """Without a split on file nnU-Net would take the cases that are there for all, for ever."""
    (data / "splits_final.json").unlink()
    for file in (data / "nnUNetPlans_3d_fullres").glob("case_3*"):
        file.unlink()
    for fold in (0, "all"):
        with pytest.raises(TrainingError, match="Case case_3 has no"):
            workshop.train(organs, fold=fold)
    assert not (data / "splits_final.json").exists()


def test_too_few_cases_for_five_folds(workshop, organs, data):
    (data / "splits_final.json").unlink()
    for file in [*data.rglob("case_3*"), *data.rglob("case_4*")]:
        file.unlink()
    with pytest.raises(TrainingError, match="cannot make five folds.*train fold all"):
        workshop.train(organs)
    assert not (data / "splits_final.json").exists()


def test_cascade_without_its_first_stage(workshop, organs, data):
    def cascade(plans: dict) -> None:
        plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    edit(data / "nnUNetPlans.json", cascade)
    with pytest.raises(TrainingError, match="5 case.s. have no segmentation from 3d_lowres, such as case_0: train all"):
        workshop.train(organs, configuration="3d_cascade_fullres")


def test_damaged_images(workshop, model, tmp_path, capsys):
    image = tmp_path / "case_0000.nii.gz"
    write(tmp_path / "case", make_case(0, (20, 24, 22), 1)[0], (1.0, 1.0, 1.0), ".nii.gz")
    image.write_bytes(image.read_bytes()[:-3000])
    with workshop.environment(), pytest.raises(ValueError, match="case_0000.nii.gz cannot be read") as error:
        nnunet_lgms.predict(model, image, device="cpu")
    assert "\n" not in str(error.value)

    pytest.importorskip("monai")
    for folder in ("predictions", "references"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "case", make_case(0, (20, 24, 22), 1)[1], (1.0, 1.0, 1.0), ".nii.gz")
    damaged = tmp_path / "predictions" / "case.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    folders = [str(tmp_path / "predictions"), str(tmp_path / "references")]
    assert cli.main(["evaluate", *folders, "--labels", "1", "--workers", "1"]) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "predictions" / "evaluation").exists()


# --- checkpoints and plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_checkpoint_cut_short(workshop, organs, model, size):
    """--c refuses it; without it the next best is taken."""
    fold = model / "fold_0"
    final = fold / "checkpoint_final.pth"
    final.write_bytes(final.read_bytes()[:size])
    short = final.read_bytes()
    with pytest.raises(TrainingError, match="checkpoint_final.pth cannot be read.*remove it") as error:
        workshop.train(organs, "--c")
    sentence(error)
    assert final.read_bytes() == short
    with workshop.environment(), pytest.raises(ValueError, match="cut short"):
        load_predictor(model, device="cpu")
    final.unlink()
    workshop.train(organs, "--c")
    assert final.is_file()


def test_checkpoint_of_other_plans(workshop, organs, model, data):
    """Also where the model's folder says that it was trained with them."""
    for file in (data / "nnUNetPlans.json", model / "plans.json"):
        edit(file, lambda p: p["configurations"]["3d_fullres"].update(lgmsnet={"widths": [8, 8, 8]}))
    before = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    with pytest.raises(TrainingError, match="of another network than these plans describe"):
        workshop.train(organs, "--c")
    assert (model / "fold_0" / "checkpoint_final.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "fold"), [(["--c"], 0), (["--val"], 0), ([], 1)], ids=["continued", "validated", "another fold"]
)
def test_weights_are_not_left_with_the_plans_of_others(workshop, organs, model, data, options, fold):
    """A network takes images of any spacing, so nothing else would notice."""
    edit(data / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(spacing=[2.0, 1.0, 1.0]))
    before = {file: file.read_bytes() for file in [*model.glob("*.json"), *model.glob("fold_0/checkpoint_*.pth")]}
    with pytest.raises(TrainingError, match=r"was trained with spacing \[1.0, .* and it is \[2.0, .* now") as error:
        workshop.train(organs, *options, fold=fold)
    sentence(error)
    assert {file: file.read_bytes() for file in before} == before


def test_the_only_fold_may_be_trained_anew_with_other_plans(workshop, organs, model, data):
    edit(data / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(spacing=[2.0, 1.0, 1.0]))
    workshop.train(organs)
    assert json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["spacing"][0] == 2


@pytest.mark.parametrize("options", [[], ["--c"], ["--val"]])
def test_a_fold_is_trained_once_at_a_time(workshop, organs, model, options):
    fold = model / "fold_0"
    with another_process_holds(fold / ".training.lock") as other:
        before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file() and "log" not in file.name}
        with pytest.raises(TrainingError, match=rf"Another training of fold_0 of .* \(process {other.pid}\)") as error:
            workshop.train(organs, *options)
        sentence(error)
        assert {file: file.read_bytes() for file in before} == before


def test_names_in_plans_lead_nowhere_else(workshop, organs, model, data, tmp_path):
    edit(data / "nnUNetPlans.json", lambda p: p.update(dataset_name=str(tmp_path / "outside")))
    with pytest.raises(TrainingError, match="The plans file has the dataset_name '/"):
        workshop.train(organs)
    assert not (tmp_path / "outside").exists()


INVALID = {
    "setting": ({"lgmsnet": {"width": [8, 8, 8]}}, "has no setting 'width'; did you mean 'widths'"),
    "value": ({"lgmsnet": {"heads": 0}}, "lgmsnet.heads is 0: allowed is"),
    "newer": ({"lgmsnet": {"requires": "99.0"}}, "These plans need nnunet_lgms 99.0 or newer"),
    "stages": ({"architecture": {"arch_kwargs": {"n_stages": 3, "strides": [1], "kernel_sizes": [3] * 3}}}, "strides"),
    "no network": ({"architecture": {}}, "plan again"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_plans_that_became_invalid(workshop, organs, model, data, tmp_path, fault):
    change, message = INVALID[fault]
    for file in (model / "plans.json", data / "nnUNetPlans.json"):
        edit(file, lambda plans: plans["configurations"]["3d_fullres"].update(change))
    before = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    for command in (workshop.train, lambda name: workshop.predict(name, tmp_path / "out")):
        with pytest.raises(TrainingError, match=message) as error:
            command(organs)
        sentence(error)
    assert (model / "fold_0" / "checkpoint_final.pth").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.slow
def test_commands_say_one_sentence(workshop, organs, model, data, tmp_path, clean_env):
    """As the user sees it: no traceback, one line, exit code 1."""
    for file in (model / "plans.json", data / "nnUNetPlans.json"):
        edit(file, lambda plans: plans["configurations"]["3d_fullres"].update(lgmsnet={"requires": "99.0"}))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    select = ["-tr", TRAINER, "-device", "cpu"]
    images = ["-i", workshop.raw / organs / "imagesTs", "-o", tmp_path / "out"]
    for command in (
        ["train", organs, "3d_fullres", 0, *select],
        ["predict", *images, "-d", organs, "-c", "3d_fullres", "-f", 0, *select],
    ):
        program = Path(sys.executable).with_name(f"nnUNetv2_{command[0]}")
        result = subprocess.run(
            [str(program), *map(str, command[1:])],
            env={**clean_env, **workshop.env, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert "Traceback" not in result.stdout + result.stderr
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("These plans need nnunet_lgms 99.0 or newer, but")


def test_own_commands_treat_it_as_bad_input(monkeypatch, capsys):
    from nnunet_lgms.cli import doctor

    def run(args) -> int:
        raise TrainingError("what is wrong, and the way out")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "nnunet_lgms: what is wrong, and the way out\n"
