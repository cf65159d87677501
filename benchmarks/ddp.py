"""LGMSNet on two GPUs of one host against one, through ``nnUNetv2_train -num_gpus 2``.

    python benchmarks/ddp.py    # or some of its --parts

One training after the other, on noise with patches of ``--synthetic`` (128) voxels per axis and on the hippocampus
cases of the demo:

- speed_synthetic, speed_hippocampus: throughput with the planned batch on one GPU, and with twice that batch on two
  (the same for each GPU); the loss curves with the planned batch on one GPU and on two.

Side by side, on the hippocampus cases:

- losses: the same curves, beside that of another seed on one GPU;
- continue: a training that was stopped on one GPU goes on with ``--c`` on two, and the other way round;
- kill: one of two processes is killed; the command ends, with an exit code that is not 0 and no process left, and
  ``--c`` goes on from its checkpoint.

NVLink multicast stays off. Everything is written below ``--work``, the figures to OUTPUT/ddp.json.
"""

from __future__ import annotations

import argparse
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
from record import RESULTS, provenance, write
from training_sets import CONFIGURATION, TRAIN, prepare, timings

from nnunet_lgms.files import atomic_write

HERE = Path(__file__).resolve().parent
TRAINER = "nnUNetTrainerLGMSNet_measured"
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
PATIENCE = 900  # seconds until a command counts as hanging
PATIENCE_AFTER_KILL = 120


class Bench:
    """Trainings of one dataset, each in a results folder of its own."""

    def __init__(self, dataset: str, work: Path, epochs: int, iterations: int):
        self.dataset, self.work = dataset, work
        self.epochs, self.iterations = epochs, iterations
        folder = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(dataset):03d}_*"))
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        self.name = folder.name
        self.batch = plans["configurations"][CONFIGURATION]["batch_size"]
        self.patch = plans["configurations"][CONFIGURATION]["patch_size"]
        for batch in (self.batch, 2 * self.batch):  # the preprocessed data is the same
            plans["plans_name"] = self.plans(batch)
            plans["configurations"][CONFIGURATION]["batch_size"] = batch
            with atomic_write(folder / f"{plans['plans_name']}.json") as temporary:
                temporary.write_text(json.dumps(plans))

    def plans(self, batch: int) -> str:
        return f"ddpPlansBatch{batch}"

    def start(self, run: str, n: int, batch: int, *args: str, **env: object) -> subprocess.Popen:
        """A training on ``n`` GPUs; its output goes to ``work/run/log.txt``."""
        folder = self.work / self.name / run
        folder.mkdir(parents=True, exist_ok=True)
        select = [self.dataset, CONFIGURATION, "0", "-tr", TRAINER, "-p", self.plans(batch), "-num_gpus", str(n), *args]
        measured = {"MEASURED_EPOCHS": self.epochs, "MEASURED_ITERATIONS": self.iterations, **env}
        environment = {
            **os.environ,
            **NO_MULTICAST,
            **{key: str(value) for key, value in measured.items()},
            "nnUNet_results": str(folder),
            "nnUNet_extTrainer": os.pathsep.join([str(HERE / "trainers"), os.environ.get("nnUNet_extTrainer", "")]),
        }
        print(f"{self.name}: {run}", *select, flush=True)
        with (folder / "log.txt").open("a") as log:
            # a group of its own, so that nothing outlives the benchmark
            return subprocess.Popen([*TRAIN, *select], env=environment, stdout=log, stderr=log, start_new_session=True)

    def train(self, run: str, n: int, batch: int, *args: str, stops: bool = False, **env: object) -> dict:
        """Runs a training to its end; what its trainer measured.

        Raises:
            RuntimeError: it fails, or does not end.
        """
        process = self.start(run, n, batch, *args, **env)
        begin = time.time()
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{run} hangs: see {self.work / self.name / run / 'log.txt'}") from None
        if (code != 0) != stops:
            log = self.work / self.name / run / "log.txt"
            raise RuntimeError(f"{run} ended with {code}: {log.read_text()[-1500:]}")
        return {**self.measured(run), "started": begin}

    def fold(self, run: str) -> Path:
        return next((self.work / self.name / run).glob("*/*/fold_0"))

    def measured(self, run: str) -> dict:
        return json.loads((self.fold(run) / "measured.json").read_text())


def mean_difference(first: dict, second: dict) -> float:
    """Of the loss curves of two trainings."""
    return float(np.abs(np.subtract(first["losses"], second["losses"])).mean())


def compare_speed(bench: Bench) -> dict:
    runs = {
        "one": bench.train("one", 1, bench.batch),
        "two": bench.train("two", 2, bench.batch),
        "double": bench.train("two_twice_the_batch", 2, 2 * bench.batch),
    }
    times = {name: timings(run, run["started"]) for name, run in runs.items()}
    speed = {name: run["batch_size"] * bench.iterations / times[name]["epoch_s"] for name, run in runs.items()}
    found = {
        "patch_size": bench.patch,
        "planned_batch": bench.batch,
        "losses": {name: runs[name]["losses"] for name in ("one", "two")},
        "mean_difference_one_two": mean_difference(runs["one"], runs["two"]),
        "first_epoch_and_start_s": {name: times[name]["first_epoch_s"] for name in ("one", "two")},
    }
    return found | {
        "samples_per_second": {
            "one, planned batch": speed["one"],
            "two, planned batch": speed["two"],
            "two, planned batch each": speed["double"],
        },
        "ratio_at_equal_batch_per_device": speed["double"] / speed["one"],
        "ratio_at_equal_global_batch": speed["two"] / speed["one"],
        "waiting_for_batches": {name: times[name]["waiting"] for name in ("one", "double")},
    }


def compare_losses(bench: Bench) -> dict:
    """How far the loss curves of one GPU and of two are from each other, and those of two seeds on one GPU."""
    with ThreadPoolExecutor() as side_by_side:
        runs = {
            "one": side_by_side.submit(bench.train, "losses_one", 1, bench.batch),
            "two": side_by_side.submit(bench.train, "losses_two", 2, bench.batch),
            "other seed": side_by_side.submit(bench.train, "losses_seed", 1, bench.batch, MEASURED_SEED=1),
        }
        done = {name: run.result() for name, run in runs.items()}
    return {
        "losses": {name: run["losses"] for name, run in done.items()},
        "mean_difference_one_two": mean_difference(done["one"], done["two"]),
        "mean_difference_one_other_seed": mean_difference(done["one"], done["other seed"]),
    }


def continue_on_another_number(bench: Bench) -> dict:
    """Stopped on one, continued on two, and the other way round, with the validation at the end of the former."""
    stop = bench.epochs // 2

    def continued(first: int, second: int) -> dict:
        run = f"from_{first}_to_{second}"
        stopped = bench.train(run, first, bench.batch, stops=True, MEASURED_STOP=stop)
        latest = torch.load(bench.fold(run) / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
        done = bench.train(run, second, bench.batch, "--c", MEASURED_VALIDATION=int(second == 2))
        final = torch.load(bench.fold(run) / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        result = {
            "stopped_after_epochs": stopped["epochs_done"],
            "epochs_of_the_second_run": len(done["seconds"]),
            "losses_go_on": done["losses"][:stop] == stopped["losses"],
            "same_names_in_both_checkpoints": list(latest["network_weights"]) == list(final["network_weights"]),
            "losses_are_finite": all(math.isfinite(loss) for loss in done["losses"]),
        }
        if second == 2:
            result["validated_cases"] = len(list((bench.fold(run) / "validation").glob("*.nii.gz")))
        return result

    with ThreadPoolExecutor() as side_by_side:
        there, back = side_by_side.map(continued, (1, 2), (2, 1))
    return {"from_1_to_2": there, "from_2_to_1": back}


def kill_one_process(bench: Bench) -> dict:
    """SIGKILL to the second of two processes in the middle of a training."""
    run = "killed"
    process = bench.start(run, 2, bench.batch, MEASURED_ITERATIONS=10 * bench.iterations)
    begin = time.monotonic()
    while not list((bench.work / bench.name / run).glob("*/*/fold_0/measured.json")):
        if process.poll() is not None or time.monotonic() - begin > PATIENCE:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError("the training that was to be killed ended or hangs in its first epoch")
        time.sleep(0.2)
    ranks = [pid for pid in children(process.pid) if "spawn_main" in command_line(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    begin = time.monotonic()
    try:
        code = process.wait(PATIENCE_AFTER_KILL)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return {"ended": False, "processes": len(ranks)}
    seconds = time.monotonic() - begin
    time.sleep(5)  # workers that prepare batches notice that their parent is gone
    left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    epochs = bench.measured(run)["epochs_done"]
    continued = bench.train(run, 2, bench.batch, "--c")
    return {
        "ended": True,
        "processes": len(ranks),
        "exit_code": code,
        "seconds_to_end": seconds,
        "processes_left": len(left),
        "epochs_before": epochs,
        "epochs_after_continuing": continued["epochs_done"],
    }


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


# the place of the dataset in what `prepare` returns, and what is done with it
ALONE = {"speed_synthetic": (1, compare_speed), "speed_hippocampus": (0, compare_speed)}
SIDE_BY_SIDE = {
    "losses": (0, compare_losses),
    "continue": (0, continue_on_another_number),
    "kill": (0, kill_one_process),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=int, default=128, metavar="SIZE", help="voxels per axis of the noise")
    names = [*ALONE, *SIDE_BY_SIDE]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50, help="steps an epoch")
    parser.add_argument("--work", type=Path, default=Path("ddp_work"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, {torch.cuda.device_count()} found")
    if args.epochs < 3:
        parser.error("--epochs must be 3 or more: the first one compiles, and half of them come before a stop")
    work = args.work.resolve()
    if work.exists() and any(work.iterdir()) and not (work / "data" / "prepared.json").is_file():
        parser.error(f"--work: {args.work} holds other things, some of which would be removed: name an empty folder")
    shutil.rmtree(work / "runs", ignore_errors=True)
    datasets = prepare(work / "data", args.synthetic)
    about = {**provenance(), "epochs": args.epochs, "iterations": args.iterations}
    results, file = {"backend": "nccl", "datasets": {}}, args.output / "ddp.json"
    benches = [Bench(dataset, work / "runs", args.epochs, args.iterations) for dataset in datasets]
    before = json.loads(file.read_text())["datasets"] if file.is_file() else {}
    found = results["datasets"] = {**before, **{bench.name: before.get(bench.name, {}) for bench in benches}}
    one_writes = Lock()

    def do(part: tuple[int, Callable[[Bench], dict]]) -> bool:
        dataset, measure = part
        bench = benches[dataset]
        try:
            result = {**measure(bench), "run": about}  # a part's own, as parts may be run on different days
        except Exception as error:  # the other parts go on, and what the part gave before stays
            result = {**found[bench.name].get(measure.__name__, {}), "failed": {"error": str(error), "run": about}}
        with one_writes:
            found[bench.name][measure.__name__] = result
            write(args.output, "ddp", results)
        print(f"{bench.name}: {measure.__name__}: {json.dumps(result)}", flush=True)
        return "failed" not in result

    good = [do(part) for name, part in ALONE.items() if name in args.parts]
    with ThreadPoolExecutor() as side_by_side:
        good += side_by_side.map(do, [part for name, part in SIDE_BY_SIDE.items() if name in args.parts])
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
