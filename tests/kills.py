"""kill -9 at random moments, then a restart: the same result, and no half-written file taken for a whole one?

    python tests/kills.py [--kills 20] [--seed 0] [TASK ...]

Tasks: training, training_with_workers (two of nnU-Net's processes prepare batches), preprocessing (of a plan variant),
conversion, evaluation. Each is run once undisturbed. Then it is started and killed until it was killed ``--kills``
times; whenever a run gets through, its result is compared and the task begins anew. Every second kill of a training is
aimed at the writing of a checkpoint, or hits one of the processes that prepare batches: then the training has to end by
itself, with one sentence about it. What lies on the disk after each kill is looked at as well, and that no process of
ours is left. Prints a line of JSON a task; exit code 1 if anything differed.

Runs are forked from this process, which has imported everything. Linux only. ``test_faults.py`` calls this with few
kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dataset_replicas
import numpy as np
import torch
from tqdm import tqdm
from workshop import Workshop, make_case, write

from nnunet_lgms import cli
from nnunet_lgms.evaluation.requirement import monai_metrics
from nnunet_lgms.nnunet.checks import check_cases
from nnunet_lgms.nnunet.workers import PROCESS_ENDED

TRAINER = "nnUNetTrainerLGMSNet_steady"
PATIENCE = 300  # seconds; a run that takes longer hangs
AFTERMATH = 60  # seconds until no process of a run is left; fractions of one on a machine with nothing else to do
FORK = multiprocessing.get_context("fork")


@dataclass
class Task:
    """Something that can be killed.

    Args:
        run: does the work; called in a process of its own, also after a kill.
        result: what it left behind, in a form that can be compared.
        reset: removes all of that.
        look: raises AssertionError if a file is there under its name but not whole; gets the undisturbed result.
        written: a pattern of files that are being written, to aim at.
        has_workers: whether it has processes of its own, which die as well or alone.
        may_leave_some: nnU-Net lists the cases of a dataset in it, with a pool of forked processes. Python ends such a
            pool by killing one after the other; a kill amid that leaves those that wait for a lock which a dead one
            held, about once in a hundred kills. They do nothing, and are not ours to end.
    """

    run: Callable[[], None]
    result: Callable[[], object]
    reset: Callable[[], None]
    look: Callable[[object], None]
    written: tuple[Path, str] | None = None
    has_workers: bool = False
    may_leave_some: bool = False


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


def training_with_workers(workshop: Workshop, dataset: str, folder: Path) -> Task:
    """Which batches there are is chance here, so what is compared is all the rest.

    Among it: epochs that were in a checkpoint when the training was killed are those of the final one.
    """
    fold = workshop.model(dataset, trainer=TRAINER) / "fold_0"
    epochs: dict[str, list[float]] = {}

    def load(name: str) -> dict:
        return torch.load(fold / name, weights_only=False)

    def check_epochs(checkpoint: dict) -> None:
        logged = {key: checkpoint["logging"][key] for key in ("train_losses", "val_losses", "ema_fg_dice")}
        for key, before in epochs.items():
            assert logged[key][: len(before)] == before, f"{key} was {before}, is {logged[key]}"
        epochs.update(logged)

    def result() -> dict:
        assert not list(fold.glob(".*.pth")), "a temporary checkpoint was left behind"
        final = load("checkpoint_final.pth")
        check_epochs(final)
        assert all(math.isfinite(value) for values in epochs.values() for value in values), epochs
        assert load("checkpoint_best.pth")["_best_ema"] == final["_best_ema"] == max(epochs["ema_fg_dice"])
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        return {
            "epochs": {key: len(values) for key, values in epochs.items()},
            "lrs": final["logging"]["lrs"],
            "weights": {name: (weight.shape, bool(weight.isfinite().all())) for name, weight in weights(final)},
            "validated": [Path(case["prediction_file"]).name for case in summary["metric_per_case"]],
        }

    def weights(checkpoint: dict) -> list[tuple[str, torch.Tensor]]:
        return sorted(checkpoint["network_weights"].items())

    def look(expected: object) -> None:
        there = {file.name: load(file.name) for file in fold.glob("checkpoint_*.pth")}
        for name in ("checkpoint_latest.pth", "checkpoint_final.pth"):
            if name in there:
                check_epochs(there[name])

    def reset() -> None:
        shutil.rmtree(fold.parent)
        epochs.clear()

    return Task(
        run=lambda: workshop.train(dataset, "-tr", TRAINER, "--c", nnUNet_n_proc_DA="2"),
        result=result,
        reset=reset,
        look=look,
        has_workers=True,
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
        may_leave_some=True,
    )


def conversion(workshop: Workshop, dataset: str, folder: Path) -> Task:
    source, converted = folder / "download", workshop.raw / "Dataset601_BUSI"
    dataset_replicas.busi(source)

    def run() -> None:
        with workshop.environment():
            assert cli.main(["convert", "busi", str(source), "--id", "601", "--workers", "1"]) == 0

    def look(expected: object) -> None:
        assert not converted.exists() or _tree(converted) == expected, "the dataset appeared before it was whole"

    return Task(run, lambda: _tree(converted), lambda: shutil.rmtree(converted), look, may_leave_some=True)


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


TASKS = {task.__name__: task for task in (training, training_with_workers, preprocessing, conversion, evaluation)}


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
        aims = bool(done % 2)
        at_file, at_worker = (task.written if aims else None), aims and task.has_workers
        if _run(task, rng.uniform(0, duration), at_file, at_worker, rng):
            _compare(name, task.result(), expected)
            compared += 1
            task.reset()
            continue
        done += 1
        aimed += at_file is not None or at_worker
        task.look(expected)
    assert _run(task, None), f"{name} fails after a kill"
    _compare(name, task.result(), expected)
    task.reset()  # another task may use the same folder
    return {
        "task": name,
        "kills": done,
        "aimed_at_a_worker" if task.has_workers else "aimed_at_a_checkpoint": aimed,
        "results_compared": compared + 1,
        "seconds_undisturbed": round(duration, 2),
        "same_result": True,
    }


def _run(
    task: Task,
    kill_after: float | None,
    at_file: tuple[Path, str] | None = None,
    at_worker: bool = False,
    rng: random.Random | None = None,
) -> bool:
    """Whether the run got through.

    It is killed after so many seconds, or soon after a file of ``at_file`` appears; if it is a task with processes, not
    before it has some, and with ``at_worker`` one of them in its place.
    """
    with tempfile.TemporaryFile("w+") as errors:
        child = FORK.Process(target=_work, args=(task, errors.fileno()))
        begin = time.monotonic()
        child.start()
        deadline = begin + (PATIENCE if kill_after is None or at_file else kill_after)
        while time.monotonic() < deadline and child.is_alive():
            if at_file and any(at_file[0].glob(at_file[1])):
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.001 if at_file else 0.005)
        workers = _workers(child) if task.has_workers and kill_after is not None else []
        lost_one = at_worker and bool(workers)
        if lost_one:
            os.kill(rng.choice(workers), signal.SIGKILL)
        elif kill_after is not None and not at_worker:
            child.kill()
        while child.is_alive() and time.monotonic() < begin + PATIENCE:  # join would wait for its processes as well
            time.sleep(0.005)
        said = errors.seek(0) or errors.read()
        assert child.exitcode is not None and time.monotonic() < begin + PATIENCE, f"a run hangs:\n{said[-3000:]}"
        _end_what_is_left(child.pid, task.may_leave_some)
        if lost_one and child.exitcode:
            assert child.exitcode == 1 and said.splitlines()[-1] == PROCESS_ENDED, said[-3000:]
        else:  # a kill may come when it has just ended by itself
            assert child.exitcode == 0 or (child.exitcode == -signal.SIGKILL and kill_after is not None), said[-3000:]
        return child.exitcode == 0


def _work(task: Task, errors: int) -> None:
    os.setsid()
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # tqdm's own lock is shared by all forked processes: killed with it in hand, one leaves the next waiting
    tqdm.set_lock(threading.RLock())
    task.run()


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that is alive."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session, *_ = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if state != "Z":
            found[int(file.parent.name)] = int(parent), int(session)
    return found


def _workers(child: multiprocessing.Process) -> list[int]:
    """Waits until it has some, or ends without."""
    while child.is_alive():
        if workers := sorted(pid for pid, (parent, _) in _processes().items() if parent == child.pid):
            return workers
        time.sleep(0.005)
    return []


def _end_what_is_left(session: int, allowed: bool) -> None:
    end = time.monotonic() + (1 if allowed else AFTERMATH)
    while left := [pid for pid, (_, of) in _processes().items() if of == session]:
        if time.monotonic() > end:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert allowed, f"{len(left)} processes were left behind"
        time.sleep(0.05)


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
