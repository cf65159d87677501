"""Several trainings at a time on every GPU, until the time is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from commands import start, stop

from nnunet_lgms.files import read_json
from nnunet_lgms.study.gpus import visible_gpus

from .runs import Run

SCRIPT = Path(__file__).resolve().parents[1] / "evidence.py"
TO_STOP = 15  # seconds before the end at which trainings are put aside


def train_all(runs: Sequence[Run], work: Path, device: str, jobs: int, seconds: float) -> dict[str, str]:
    """Trains what is not finished yet, in this order.

    Args:
        runs: wanted.
        work: with ``preprocessed/``; results go to ``runs/`` and ``results/`` in it.
        device: cuda or cpu.
        jobs: trainings at a time, on each GPU.
        seconds: after which those that run are put aside.

    Returns:
        name of each run → what became of it.
    """
    begin, end = time.time(), time.time() + seconds
    state = {run.name: "not started" for run in runs}
    waiting = [run for run in runs if not (work / "runs" / run.name / "record.json").is_file()]
    state |= {run.name: "finished" for run in runs if run not in waiting}
    free = ((visible_gpus() if device == "cuda" else []) or [None]) * jobs
    at_a_time = len(free)
    active: list[tuple[Run, str | None, subprocess.Popen]] = []
    try:
        while time.time() < end:
            for run, gpu, process in [training for training in active if training[2].poll() is not None]:
                active.remove((run, gpu, process))
                free.append(gpu)
                state[run.name] = _outcome(work / "runs" / run.name, process.returncode)
                print(f"{time.time() - begin:5.0f} s {run.name}: {state[run.name]}", flush=True)
            while waiting and free and time.time() < end - 2 * TO_STOP:
                run, gpu = waiting.pop(0), free.pop(0)
                active.append((run, gpu, _start(run, work, device, gpu, at_a_time, end - TO_STOP)))
            if not active:
                break
            time.sleep(0.2)
    finally:  # also if the command is interrupted
        for run, _, process in active:
            stop(process)
            state[run.name] = "stopped while it compiled or predicted; goes on when called again"
    return state


def _start(run: Run, work: Path, device: str, gpu: str | None, at_a_time: int, until: float) -> subprocess.Popen:
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "nnUNet_results": str(work / "results" / run.name),
        "nnUNet_n_proc_DA": str(run.settings.workers),
        "nnUNet_def_n_proc": "2",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(4, (os.cpu_count() or 4) // at_a_time)),
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, str(SCRIPT), "one", json.dumps(asdict(run)), "--until", str(until)]
    return start([*command, "--work", str(work), "--device", device], folder / "log.txt", environment)


def _outcome(folder: Path, code: int) -> str:
    if code:
        last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        return f"failed: {' '.join(last)[:300]}"
    if (folder / "record.json").is_file():
        return "finished"
    progress = read_json(folder / "progress.json")
    said = f"epoch {progress['epoch']}/{progress['epochs']}, loss {progress['loss']:.3f}"
    return f"put aside, {said}; goes on when called again"
