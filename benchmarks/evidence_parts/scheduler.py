"""Several trainings at a time on every GPU, until the time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunet_lgms.files import read_json
from nnunet_lgms.study.gpus import visible_gpus

from .runs import Run

SCRIPT = Path(__file__).resolve().parents[1] / "evidence.py"
TO_STOP = 15  # seconds before the end at which trainings are put aside
SAY_EVERY = 15


def train_all(
    runs: Sequence[Run],
    work: Path,
    device: str,
    jobs: int,
    seconds: float,
    finished: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Trains what is not finished yet, in this order.

    Args:
        runs: wanted; one that is named twice is trained once.
        work: with ``preprocessed/``; results go to ``runs/`` and ``results/`` in it.
        device: cuda or cpu.
        jobs: trainings at a time, on each GPU.
        seconds: after which those that run are put aside.
        finished: called whenever a training is over.

    Returns:
        name of each run → what became of it.
    """
    end = time.time() + seconds
    waiting = [run for i, run in enumerate(runs) if run.name not in {other.name for other in runs[:i]}]
    active, state, said = {}, {}, 0.0
    gpus = visible_gpus() if device == "cuda" else []
    places = (gpus or [None]) * jobs
    while waiting or active:
        for name, (process, run, _) in list(active.items()):
            if process.poll() is not None:
                state[name] = _outcome(run, work / "runs" / name, process.returncode)
                print(f"{_clock(end - seconds)} {name}: {state[name]}", flush=True)
                del active[name]
                finished()
        while waiting and len(active) < len(places) and time.time() < end - 2 * TO_STOP:
            run = waiting.pop(0)
            if run.is_finished(work / "runs" / run.name):
                state[run.name] = "finished before"
                continue
            gpu = emptiest(gpus, [taken for _, _, taken in active.values()])
            active[run.name] = _start(run, work, device, gpu, len(places), end - TO_STOP), run, gpu
        if time.time() > end - 2 * TO_STOP and not active:
            break
        if time.time() > end:
            for process, _, _ in active.values():
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that prepare its batches
                process.wait()
            state |= {name: "stopped while it compiled or predicted; goes on when called again" for name in active}
            break
        if time.time() - said > SAY_EVERY:
            said = time.time()
            for name in active:
                print(f"{_clock(end - seconds)} {name}: {_progress(work / 'runs' / name)}", flush=True)
        time.sleep(0.2)
    return state | {run.name: "not started" for run in waiting}


def emptiest(gpus: Sequence[str], taken: Sequence[str]) -> str | None:
    """The GPU with the fewest trainings, the first of equals; None where there is none to choose."""
    return min(gpus, key=taken.count, default=None)


def _start(run: Run, work: Path, device: str, gpu: str | None, places: int, until: float) -> subprocess.Popen:
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "nnUNet_raw": str(work / "raw"),
        "nnUNet_preprocessed": str(work / "preprocessed"),
        "nnUNet_results": str(work / "results" / run.name),
        "nnUNet_n_proc_DA": str(run.settings.workers),
        "nnUNet_def_n_proc": "2",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(4, (os.cpu_count() or 4) // places)),
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, str(SCRIPT), "one", json.dumps(run.as_dict()), "--until", str(until)]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [*command, "--work", str(work), "--device", device],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _outcome(run: Run, folder: Path, code: int) -> str:
    if run.is_finished(folder):
        return "finished"
    if code == 0:
        return f"put aside, {_progress(folder)}; goes on when called again"
    last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
    return f"failed: {' '.join(last)[:300]}"


def _progress(folder: Path) -> str:
    if not (folder / "progress.json").is_file():
        return "starting or compiling"
    progress = read_json(folder / "progress.json")
    if progress["epoch"] == progress["epochs"]:
        return f"{progress['epochs']} epochs done, predicting"
    return f"epoch {progress['epoch']}/{progress['epochs']}, loss {progress['loss']:.3f}"


def _clock(begin: float) -> str:
    return f"{time.time() - begin:5.0f} s"
