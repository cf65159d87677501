"""Does a long training grow? Memory, open files and threads over many short epochs of a demo-like task.

    python benchmarks/soak.py [--epochs 200] [--device cpu] [--output benchmarks/results]

Trains ``nnUNetTrainerLGMSNet_demo``, shortened to ``--iterations`` steps an epoch, through nnU-Net's own
``run_training`` on the hippocampus cases of the demo, with batches from worker processes if ``--workers`` is not 0, and
a checkpoint and a progress plot in every epoch. After each epoch it collects garbage (nnU-Net's plot leaves some 65
MiB in reference cycles, which Python otherwise frees every ten epochs or so), notes the resident memory of this process
(MiB), its open files and threads, the number of its child processes, and on CUDA the allocated and reserved memory.
What counts as growth: the slope of a line through the second half of the epochs, times their number; memory may differ
by the ``--tolerance`` in MiB, files, threads and processes not at all. Writes soak_DEVICE.json; exit code 1 if
something grew. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import RESULTS, provenance, write

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "demo" / "data" / "hippocampus"
DATASET = "Dataset004_Hippocampus"
N_CASES = 5
#: MiB that a line through noise may rise
TOLERANCE = 40.0


def resources(device: str) -> dict[str, float]:
    """What this process holds now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = {
        "host_mib": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "processes": len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
    }
    if device == "cuda":
        held["allocated_mib"] = torch.cuda.memory_allocated() / 2**20
        held["reserved_mib"] = torch.cuda.memory_reserved() / 2**20
    return held


def prepare(folder: Path, device: str, workers: int) -> None:
    """nnU-Net's variables, and a few cases of the demo's dataset, planned and preprocessed."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
        (folder / name).mkdir()
    os.environ["nnUNet_extTrainer"] = str(HERE.parent / "demo" / "trainers")
    os.environ["nnUNet_def_n_proc"] = "2"
    raw = folder / "nnUNet_raw" / DATASET
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
        for file in sorted((DATA / sub).iterdir())[:N_CASES]:
            shutil.copy(file, raw / sub)
    description = json.loads((DATA / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": N_CASES}))

    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([4], num_processes=2, verbose=False, show_progress_bar=False)
    plan_experiments([4])
    file = folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    if device == "cpu":  # a smaller patch, so that an epoch takes seconds
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"]["patch_size"] = [24, 32, 24]
        file.write_text(json.dumps(plans))
    preprocess([4], configurations=["3d_fullres"], num_processes=[2], show_progress_bar=False)
    os.environ["nnUNet_n_proc_DA"] = str(workers)


def soak(epochs: int, iterations: int, device: str) -> list[dict[str, float]]:
    """Trains; what was held after every epoch."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("4", "3d_fullres", 0, "nnUNetTrainerLGMSNet_demo", device=torch.device(device))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, iterations, 1
    held, end_of_epoch, begin = [], trainer.on_epoch_end, time.monotonic()

    def on_epoch_end() -> None:
        end_of_epoch()
        held.append(resources(device))
        seconds = time.monotonic() - begin
        print(f"epoch {len(held)}/{epochs}, {seconds:.0f} s: {held[-1]}", file=sys.stderr, flush=True)

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    trainer.perform_actual_validation()
    return held


def growth(held: list[dict[str, float]]) -> dict[str, float]:
    """Rise of a line fitted to each quantity, over the second half of the epochs."""
    settled = held[len(held) // 2 :]
    epochs = np.arange(len(settled))
    return {key: float(np.polyfit(epochs, [h[key] for h in settled], 1)[0] * len(settled)) for key in settled[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=2, help="steps an epoch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare batches")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, metavar="MIB")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.epochs < 5:
        parser.error("--epochs must be 5 or more to show a trend")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.device, args.workers)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nnU-Net tells much about every epoch
        held = soak(args.epochs, args.iterations, args.device)
        sys.stdout = sys.__stdout__
    rises = growth(held)
    grew = [key for key, rise in rises.items() if rise > (args.tolerance if key.endswith("mib") else 0.5)]
    results = {
        **provenance(args.device),
        "epochs": args.epochs,
        "iterations": args.iterations,
        "workers": args.workers,
        "seconds": time.monotonic() - begin,
        "growth_in_second_half": rises,
        "tolerance_mib": args.tolerance,
        "grew": grew,
        "first": held[0],
        "middle": held[len(held) // 2],
        "last": held[-1],
        "held": {key: [round(h[key], 1) for h in held] for key in held[0]},
    }
    write(args.output, f"soak_{args.device}", results)
    print(json.dumps({key: results[key] for key in ("growth_in_second_half", "grew", "first", "last", "seconds")}))
    return int(bool(grew))


if __name__ == "__main__":
    sys.exit(main())
