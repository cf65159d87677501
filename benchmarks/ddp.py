"""LGMSNet on several GPUs of one host against one, through ``nnUNetv2_train -num_gpus N``.

    python benchmarks/ddp.py    # on all visible GPUs; or --gpus N, or some of its --parts

One training after the other, on noise with patches of ``--synthetic`` (128) voxels per axis and on the hippocampus
cases of the demo:

- speed_synthetic, speed_hippocampus: throughput with the planned batch on one GPU and on each of all; the loss curves
  of one GPU and of all with the same global batch, the planned one or, where that is less, a sample for each.

Side by side, on the hippocampus cases:

- losses: the same curves, beside that of another seed on one GPU;
- continue: a training that was stopped on half of the GPUs goes on with ``--c`` on all, and the other way round;
- kill: one of the processes is killed; the command ends, with an exit code that is not 0 and no process left, and
  ``--c`` goes on from its checkpoint.

NVLink multicast stays off. Everything is written below ``--work``, the figures to OUTPUT/ddp.json, beside those of
other numbers of GPUs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from commands import children, measured_training, start, wait, wait_until, words_of
from record import command_line, provenance, write
from training_sets import CONFIGURATION, TRAIN, prepare, timings

from nnunet_lgms.files import atomic_write

TRAINER = "nnUNetTrainerLGMSNet_measured"
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
PATIENCE_AFTER_KILL = 120  # seconds


class Bench:
    """Trainings of one dataset on one GPU and on ``n``, each in a results folder of its own."""

    def __init__(self, dataset: str, work: Path, n: int, epochs: int, iterations: int):
        self.dataset, self.work, self.n = dataset, work, n
        self.epochs, self.iterations = epochs, iterations
        folder = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(dataset):03d}_*"))
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        self.name = folder.name
        self.batch = plans["configurations"][CONFIGURATION]["batch_size"]
        self.patch = plans["configurations"][CONFIGURATION]["patch_size"]
        self.shared = max(self.batch, n)  # a global batch with a sample for each
        for batch in {self.batch, self.shared, n * self.batch}:  # the preprocessed data is the same
            plans["plans_name"] = self.plans(batch)
            plans["configurations"][CONFIGURATION]["batch_size"] = batch
            with atomic_write(folder / f"{plans['plans_name']}.json") as temporary:
                temporary.write_text(json.dumps(plans))

    def plans(self, batch: int) -> str:
        return f"ddpPlansBatch{batch}"

    def start(self, run: str, n: int, batch: int, *args: str, **more: object) -> subprocess.Popen:
        """A training on ``n`` GPUs."""
        self.log(run).parent.mkdir(parents=True, exist_ok=True)
        select = [self.dataset, CONFIGURATION, "0", "-tr", TRAINER, "-p", self.plans(batch), "-num_gpus", str(n), *args]
        print(f"{self.name}: {run}", *select, flush=True)
        environment = NO_MULTICAST | measured_training(self.epochs, self.iterations, **more)
        environment["nnUNet_results"] = str(self.log(run).parent)
        return start([*TRAIN, *select], self.log(run), environment)

    def train(self, run: str, n: int, batch: int, *args: str, stops: bool = False, **more: object) -> dict:
        """Runs a training to its end; what its trainer measured.

        Raises:
            RuntimeError: it fails, or does not end.
        """
        begin = time.time()
        code = wait(self.start(run, n, batch, *args, **more), self.log(run))
        if (code != 0) != stops:
            raise RuntimeError(f"{run} ended with {code}: {self.log(run).read_text()[-1500:]}")
        return {**self.measured(run), "started": begin}

    def log(self, run: str) -> Path:
        return self.work / self.name / run / "log.txt"

    def files(self, run: str, pattern: str) -> list[Path]:
        """In the folder of the training's fold."""
        return list(self.log(run).parent.glob(f"*/*/fold_0/{pattern}"))

    def measured(self, run: str) -> dict:
        return json.loads(self.files(run, "measured.json")[0].read_text())

    def weights(self, run: str, checkpoint: str) -> list[str]:
        """Their names."""
        (file,) = self.files(run, checkpoint)
        return list(torch.load(file, map_location="cpu", weights_only=False)["network_weights"])


def mean_difference(first: dict, second: dict) -> float:
    """Of the loss curves of two trainings."""
    return float(np.abs(np.subtract(first["losses"], second["losses"])).mean())


def compare_speed(bench: Bench) -> dict:
    runs = {
        "one": bench.train("one", 1, bench.shared),
        "all": bench.train("all", bench.n, bench.shared),
        "each": bench.train("all_planned_batch_each", bench.n, bench.n * bench.batch),
    }
    runs["planned"] = runs["one"] if bench.shared == bench.batch else bench.train("one_planned", 1, bench.batch)
    times = {name: timings(run, run["started"]) for name, run in runs.items()}
    speed = {name: run["batch_size"] * bench.iterations / times[name]["epoch_s"] for name, run in runs.items()}
    return {
        "patch_size": bench.patch,
        "planned_batch": bench.batch,
        "shared_batch": bench.shared,
        "losses": {name: runs[name]["losses"] for name in ("one", "all")},
        "mean_difference_one_all": mean_difference(runs["one"], runs["all"]),
        "first_epoch_and_start_s": {name: times[name]["first_epoch_s"] for name in ("one", "all")},
        "samples_per_second": {
            "one, planned batch": speed["planned"],
            "one, shared batch": speed["one"],
            "all, shared batch": speed["all"],
            "all, planned batch each": speed["each"],
        },
        "ratio_at_equal_batch_per_device": speed["each"] / speed["planned"],
        "ratio_at_equal_global_batch": speed["all"] / speed["one"],
        "waiting_for_batches": {name: times[name]["waiting"] for name in ("planned", "each")},
    }


def compare_losses(bench: Bench) -> dict:
    """How far the loss curves of one GPU and of all are from each other, and those of two seeds on one GPU."""
    with ThreadPoolExecutor() as side_by_side:
        runs = {
            "one": side_by_side.submit(bench.train, "losses_one", 1, bench.shared),
            "all": side_by_side.submit(bench.train, "losses_all", bench.n, bench.shared),
            "other seed": side_by_side.submit(bench.train, "losses_seed", 1, bench.shared, MEASURED_SEED=1),
        }
        done = {name: run.result() for name, run in runs.items()}
    return {
        "losses": {name: run["losses"] for name, run in done.items()},
        "mean_difference_one_all": mean_difference(done["one"], done["all"]),
        "mean_difference_one_other_seed": mean_difference(done["one"], done["other seed"]),
    }


def continue_on_another_number(bench: Bench) -> dict:
    """Stopped on half, continued on all, and the other way round, with the validation at the end of the former."""
    stop, half = bench.epochs // 2, bench.n // 2

    def continued(first: int, second: int) -> dict:
        run = f"from_{first}_to_{second}"
        stopped = bench.train(run, first, bench.shared, stops=True, MEASURED_STOP=stop)
        latest = bench.weights(run, "checkpoint_latest.pth")
        validates = second == bench.n
        done = bench.train(run, second, bench.shared, "--c", MEASURED_VALIDATION=int(validates))
        result = {
            "stopped_after_epochs": stopped["epochs_done"],
            "epochs_of_the_second_run": len(done["seconds"]),
            "losses_go_on": done["losses"][:stop] == stopped["losses"],
            "same_names_in_both_checkpoints": latest == bench.weights(run, "checkpoint_final.pth"),
            "losses_are_finite": all(math.isfinite(loss) for loss in done["losses"]),
        }
        if validates:
            result["validated_cases"] = len(bench.files(run, "validation/*.nii.gz"))
        return result

    with ThreadPoolExecutor() as side_by_side:
        there, back = side_by_side.map(continued, (half, bench.n), (bench.n, half))
    return {f"from_{half}_to_{bench.n}": there, f"from_{bench.n}_to_{half}": back}


def kill_one_process(bench: Bench) -> dict:
    """SIGKILL to the last of the processes in the middle of a training."""
    run = "killed"
    process = bench.start(run, bench.n, bench.shared, MEASURED_ITERATIONS=10 * bench.iterations)
    wait_until(lambda: bench.files(run, "measured.json"), process, bench.log(run))
    ranks = [pid for pid in children(process.pid) if "spawn_main" in " ".join(words_of(pid))]
    os.kill(ranks[-1], signal.SIGKILL)
    begin = time.monotonic()
    try:
        code = wait(process, bench.log(run), PATIENCE_AFTER_KILL)
    except RuntimeError:
        return {"ended": False, "processes": len(ranks)}
    seconds = time.monotonic() - begin
    time.sleep(5)  # workers that prepare batches notice that their parent is gone
    left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    epochs = bench.measured(run)["epochs_done"]
    continued = bench.train(run, bench.n, bench.shared, "--c")
    return {
        "ended": True,
        "processes": len(ranks),
        "exit_code": code,
        "seconds_to_end": seconds,
        "processes_left": len(left),
        "epochs_before": epochs,
        "epochs_after_continuing": continued["epochs_done"],
    }


# the place of the dataset in what `prepare` returns, and what is done with it
ALONE = {"speed_synthetic": (1, compare_speed), "speed_hippocampus": (0, compare_speed)}
SIDE_BY_SIDE = {
    "losses": (0, compare_losses),
    "continue": (0, continue_on_another_number),
    "kill": (0, kill_one_process),
}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--synthetic", type=int, default=128, metavar="SIZE", help="voxels per axis of the noise")
    names = [*ALONE, *SIDE_BY_SIDE]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50, help="steps an epoch")
    parser.add_argument("--work", type=Path, default=Path("ddp_work"))
    parser.add_argument("--gpus", type=int, metavar="N", help="(all that are visible)")
    args = parser.parse_args(arguments)
    there = torch.cuda.device_count()
    n = there if args.gpus is None else args.gpus
    if not 2 <= n <= there:
        parser.error(f"--gpus {n}: give 2 to {there}, which are here" if there > 1 else f"{there} GPUs found, 2 needed")
    if args.epochs < 3:
        parser.error("--epochs must be 3 or more: the first one compiles, and half of them come before a stop")
    work = args.work.resolve()
    if work.exists() and any(work.iterdir()) and not (work / "data" / "prepared.json").is_file():
        parser.error(f"--work: {args.work} holds other things, some of which would be removed: name an empty folder")
    shutil.rmtree(work / "runs", ignore_errors=True)
    datasets = prepare(work / "data", args.synthetic)
    about = {**provenance(), "epochs": args.epochs, "iterations": args.iterations}
    file = args.output / "ddp.json"
    results = json.loads(file.read_text()) if file.is_file() else {"backend": "nccl", "datasets": {}}
    benches = [Bench(dataset, work / "runs", n, args.epochs, args.iterations) for dataset in datasets]
    one_writes = Lock()

    def do(part: tuple[int, Callable[[Bench], dict]]) -> bool:
        dataset, measure = part
        bench = benches[dataset]
        try:
            result = {**measure(bench), "run": about}  # a part's own, as parts may be run on different days
        except Exception as error:  # the other parts go on
            result = {"failed": {"error": str(error), "run": about}}
        with one_writes:
            found = results["datasets"].setdefault(bench.name, {}).setdefault(f"{n} GPUs", {})
            before = found.get(measure.__name__, {}) if "failed" in result else {}  # what it gave stays
            found[measure.__name__] = before | result
            write(args.output, "ddp", results)
        print(f"{bench.name}: {measure.__name__}: {json.dumps(result)}", flush=True)
        return "failed" not in result

    good = [do(part) for name, part in ALONE.items() if name in args.parts]
    with ThreadPoolExecutor() as side_by_side:
        good += side_by_side.map(do, [part for name, part in SIDE_BY_SIDE.items() if name in args.parts])
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
