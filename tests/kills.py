"""kill -9 at random moments, then a restart: the same result, and no half-written file taken for a whole one?

    python tests/kills.py [--kills 20] [--seed 0] [TASK ...]

Tasks: training, preprocessing (of a plan variant), conversion, evaluation. Each is run once undisturbed. Then it is
started and killed until it was killed ``--kills`` times; whenever a run gets through, its result is compared and the
task begins anew. Every second kill of a training is aimed at the writing of a checkpoint. What lies on the disk after
each kill is looked at as well. Prints a line of JSON a task; exit code 1 if anything differed.

Runs are forked from this process, which has imported everything, and use no worker processes, which would survive.
Linux only. ``test_faults.py`` calls this with few kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dataset_replicas
import numpy as np
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from tqdm import tqdm
from workshop import Workshop, make_case, write

from nnunet_lgms import cli
from nnunet_lgms.evaluation.requirement import monai_metrics
from nnunet_lgms.nnunet.checks import check_cases

TRAINER = "nnUNetTrainerLGMSNet_steady"
PATIENCE = 300  # seconds; a run that takes longer hangs


@dataclass
class Task:
    """Something that can be killed.

    Args:
        run: does the work; called in a process of its own, also after a kill.
        result: what it left behind, in a form that can be compared.
        reset: removes all of that.
        look: raises AssertionError if a file is there under its name but not whole; gets the undisturbed result.
        written: a pattern of files that are being written, to aim at.
    """

    run: Callable[[], None]
    result: Callable[[], object]
    reset: Callable[[], None]
    look: Callable[[object], None]
    written: tuple[Path, str] | None = None


def training(workshop: Workshop, dataset: str, folder: Path) -> Task:
    fold = workshop.model(dataset, trainer=TRAINER) / "fold_0"

    def load(name: str) -> dict:
        return torch.load(fold / name, weights_only=False)

    def digest(checkpoint: dict) -> dict:
        logged = checkpoint["logging"]
        momentum = [state["momentum_buffer"] for state in checkpoint["optimizer_state"]["state"].values()]
        return {
            "weights": _hash(*(w.numpy().tobytes() for w in checkpoint["network_weights"].values())),
            "momentum": _hash(*(m.numpy().tobytes() for m in momentum)),
            "best": checkpoint["_best_ema"],
            **{key: [float(x) for x in logged[key]] for key in ("train_losses", "val_losses", "ema_fg_dice", "lrs")},
        }

    def result() -> dict:
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        assert not list(fold.glob(".*.pth")), "a temporary checkpoint was left behind"
        return {name: digest(load(f"checkpoint_{name}.pth")) for name in ("final", "best")} | {"mean": summary["mean"]}

    def look(expected: object) -> None:
        for file in fold.glob("checkpoint_*.pth"):
            load(file.name)

    return Task(
        run=lambda: workshop.train(dataset, "-tr", TRAINER, "--c"),
        result=result,
        reset=lambda: shutil.rmtree(fold.parent),
        look=look,
        written=(fold, ".*.checkpoint_*.pth"),
    )


def preprocessing(workshop: Workshop, dataset: str, folder: Path) -> Task:
    base = workshop.preprocessed / dataset
    plans = json.loads((base / "nnUNetPlans.json").read_text()) | {"plans_name": "variantPlans"}
    plans["configurations"]["3d_fullres"].update(spacing=[1.3, 1.1, 1.2], data_identifier="variantPlans_3d_fullres")
    (base / "variantPlans.json").write_text(json.dumps(plans))
    output = base / "variantPlans_3d_fullres"

    def arrays() -> dict:
        import blosc2

        return {file.name: _hash(blosc2.open(str(file))[:].tobytes()) for file in sorted(output.glob("*.b2nd"))}

    def look(expected: object) -> None:
        try:
            check_cases(output, [f"case_{i}" for i in range(5)], "")
        except ValueError:
            return  # a training would refuse it
        assert arrays() == expected, "half of the data was taken for all of it"

    return Task(
        run=lambda: workshop("preprocess", "-d", 501, "-plans_name", "variantPlans", "-c", "3d_fullres", "-np", 1),
        result=arrays,
        reset=lambda: shutil.rmtree(output),
        look=look,
    )


def conversion(workshop: Workshop, dataset: str, folder: Path) -> Task:
    source, converted = folder / "download", workshop.raw / "Dataset601_BUSI"
    dataset_replicas.busi(source)

    def run() -> None:
        with workshop.environment():
            assert cli.main(["convert", "busi", str(source), "--id", "601", "--workers", "1"]) == 0

    def look(expected: object) -> None:
        assert not converted.exists() or _tree(converted) == expected, "the dataset appeared before it was whole"

    return Task(run, lambda: _tree(converted), lambda: shutil.rmtree(converted), look)


def evaluation(workshop: Workshop, dataset: str, folder: Path) -> Task:
    predictions, references = folder / "predictions", folder / "references"
    for number in range(3):
        for place, seed in ((predictions, number), (references, number)):
            place.mkdir(parents=True, exist_ok=True)
            label = np.roll(make_case(seed, (20, 24, 22), 1)[1], number * (place is predictions), axis=1)
            write(place / f"case_{number}", label, (1.0, 1.0, 1.0), ".nii.gz")
    output = predictions / "evaluation"
    monai_metrics()  # its import takes longer than the evaluation

    def run() -> None:
        command = ["evaluate", predictions, references, "--labels", "1", "2", "--workers", "1", "--bootstrap", "200"]
        assert cli.main([str(word) for word in command]) == 0

    def look(expected: dict) -> None:
        for name, content in (_tree(output) if output.exists() else {}).items():
            assert name.startswith(".") or content == expected[name], f"{name} is not whole"

    def result() -> dict:
        return {name: content for name, content in _tree(output).items() if not name.startswith(".")}

    return Task(run, result, lambda: shutil.rmtree(output), look)


TASKS = {task.__name__: task for task in (training, preprocessing, conversion, evaluation)}


def check(name: str, task: Task, kills: int, rng: random.Random) -> dict:
    """Kills ``task`` so many times; what was seen.

    Raises:
        AssertionError: a result differs, a file is not whole, or a run fails or hangs.
    """
    begin = time.monotonic()
    assert _run(task, None), f"{name} fails undisturbed"
    duration = time.monotonic() - begin
    expected = task.result()
    task.reset()
    done = aimed = compared = 0
    while done < kills:
        aim = task.written if done % 2 else None
        if _run(task, rng.uniform(0, duration), aim, rng):
            _compare(name, task.result(), expected)
            compared += 1
            task.reset()
            continue
        done += 1
        aimed += aim is not None
        task.look(expected)
    assert _run(task, None), f"{name} fails after a kill"
    _compare(name, task.result(), expected)
    return {
        "task": name,
        "kills": done,
        "aimed_at_a_checkpoint": aimed,
        "results_compared": compared + 1,
        "seconds_undisturbed": round(duration, 2),
        "same_result": True,
    }


def _run(task: Task, kill_after: float | None, aim: tuple[Path, str] | None = None, rng=None) -> bool:
    """Whether the run got through; it is killed after so many seconds, or soon after a file of ``aim`` appears."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # tqdm's own lock is shared by all forked processes: killed with it in hand, one leaves the next waiting
            tqdm.set_lock(threading.RLock())
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                if kill_after is not None:
                    os.dup2(nothing.fileno(), 2)
                task.run()
            status = 0
        finally:
            os._exit(status)
    begin = time.monotonic()
    deadline = begin + (PATIENCE if kill_after is None or aim else kill_after)
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, "a run failed"
            return True
        if aim and any(aim[0].glob(aim[1])):
            time.sleep(rng.uniform(0, 0.02))
            break
        time.sleep(0.001 if aim else 0.005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert time.monotonic() < begin + PATIENCE, "a run hangs"
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0  # it may have ended by itself just then


def _compare(name: str, result: object, expected: object) -> None:
    assert result == expected, f"{name}: another result after a kill:\n{result}\ninstead of\n{expected}"


def _tree(folder: Path) -> dict:
    return {
        str(file.relative_to(folder)): _hash(file.read_bytes()) for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    MetaLogger.plot_progress_png = lambda self, folder: None  # most of the time of such short epochs
    torch.set_num_threads(1)  # a forked process must not wait for threads that were not forked
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder, "nnunet"))
        stdout = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        dataset = workshop.dataset(501, "Organs")
        os.dup2(stdout, 1)
        for name in args.tasks or TASKS:
            place = Path(folder, name)
            place.mkdir()
            try:
                seen = check(name, TASKS[name](workshop, dataset, place), args.kills, random.Random(args.seed))
            except AssertionError as error:
                seen, failed = {"task": name, "problem": str(error)}, 1
            print(json.dumps(seen), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
