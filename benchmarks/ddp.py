"""LGMSNet on two GPUs of one host against one, through ``nnUNetv2_train -num_gpus 2``.

    python benchmarks/ddp.py 4                        # a dataset that is planned and preprocessed
    python benchmarks/ddp.py --synthetic 128 4        # and one of noise with patches of 128^3, made first
    python benchmarks/ddp.py --gloo --synthetic 24    # a rehearsal: two processes on the CPU, no times

For each dataset:

- throughput with the planned batch on one GPU, and with twice that batch on two (the same for each GPU);
- the loss curve with the planned batch on one GPU and on two, beside that of another seed on one;
- a training that was stopped on one GPU goes on with ``--c`` on two, and the other way round;
- one of two processes is killed: the command ends, with an exit code that is not 0 and no process left, and ``--c``
  goes on from its checkpoint.

NVLink multicast stays off. Everything is written below ``--work``, the figures to OUTPUT/ddp.json (ddp_gloo.json).
nnU-Net's variables nnUNet_raw and nnUNet_preprocessed must be set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from nnunet_lgms.files import written_whole

HERE = Path(__file__).resolve().parent
TRAINER = "nnUNetTrainerLGMSNet_measured"
CONFIGURATION = "3d_fullres"
SYNTHETIC_ID = 990
PLAN = [sys.executable, "-m", "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"]
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
PATIENCE = 900  # seconds until a command counts as hanging
PATIENCE_AFTER_KILL = 120


class Bench:
    """Trainings of one dataset, each in a results folder of its own."""

    def __init__(self, dataset: str, work: Path, epochs: int, iterations: int, gloo: bool):
        self.dataset, self.work, self.gloo = dataset, work, gloo
        self.epochs, self.iterations = epochs, iterations
        folder = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(dataset):03d}_*"))
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        self.name = folder.name
        self.batch = plans["configurations"][CONFIGURATION]["batch_size"]
        self.patch = plans["configurations"][CONFIGURATION]["patch_size"]
        for batch in (self.batch, 2 * self.batch):  # the preprocessed data is the same
            plans["plans_name"] = self.plans(batch)
            plans["configurations"][CONFIGURATION]["batch_size"] = batch
            with written_whole(folder / f"{plans['plans_name']}.json") as temporary:
                temporary.write_text(json.dumps(plans))

    def plans(self, batch: int) -> str:
        return f"ddpPlansBatch{batch}"

    def start(self, run: str, n: int, batch: int, *args: str, **env: object) -> subprocess.Popen:
        """A training on ``n`` GPUs; its output goes to ``work/run/log.txt``."""
        folder = self.work / self.name / run
        folder.mkdir(parents=True, exist_ok=True)
        select = [self.dataset, CONFIGURATION, "0", "-tr", TRAINER, "-p", self.plans(batch), *args]
        train = [str(Path(sys.executable).with_name("nnUNetv2_train"))]
        if self.gloo and n > 1:
            train, select = [sys.executable, str(HERE / "gloo.py")], [*select, "-num_gpus", str(n)]
        elif self.gloo:
            select += ["-device", "cpu"]
        else:
            select += ["-num_gpus", str(n)]
        measured = {"MEASURED_EPOCHS": self.epochs, "MEASURED_ITERATIONS": self.iterations, **env}
        environment = {
            **os.environ,
            **NO_MULTICAST,
            **({"nnUNet_n_proc_DA": "0", "OMP_NUM_THREADS": "1"} if self.gloo else {}),
            **{key: str(value) for key, value in measured.items()},
            "nnUNet_results": str(folder),
            "nnUNet_extTrainer": os.pathsep.join([str(HERE / "trainers"), os.environ.get("nnUNet_extTrainer", "")]),
        }
        print(f"{self.name}: {run}", *train[-1:], *select, flush=True)
        with (folder / "log.txt").open("a") as log:
            # a group of its own, so that nothing outlives the benchmark
            return subprocess.Popen([*train, *select], env=environment, stdout=log, stderr=log, start_new_session=True)

    def train(self, run: str, n: int, batch: int, *args: str, stops: bool = False, **env: object) -> dict:
        """Runs a training to its end; what its trainer measured.

        Raises:
            RuntimeError: it fails, or does not end.
        """
        process = self.start(run, n, batch, *args, **env)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{run} hangs: see {self.work / self.name / run / 'log.txt'}") from None
        if (code != 0) != stops:
            raise RuntimeError(f"{run} ended with {code}: see {self.work / self.name / run / 'log.txt'}")
        return self.measured(run)

    def fold(self, run: str) -> Path:
        return next((self.work / self.name / run).glob("*/*/fold_0"))

    def measured(self, run: str) -> dict:
        return json.loads((self.fold(run) / "measured.json").read_text())

    def samples_per_second(self, measured: dict) -> float:
        """Median over epochs; the first one compiles."""
        seconds = statistics.median(measured["seconds"][1:])
        return measured["batch_size"] * self.iterations / seconds


def compare_speed_and_loss(bench: Bench) -> dict:
    one = bench.train("one", 1, bench.batch)
    again = bench.train("one_other_seed", 1, bench.batch, MEASURED_SEED=1)
    two = bench.train("two", 2, bench.batch)
    double = bench.train("two_twice_the_batch", 2, 2 * bench.batch)
    curves = {name: np.array(run["losses"]) for name, run in (("one", one), ("again", again), ("two", two))}
    speed = {name: bench.samples_per_second(run) for name, run in (("one", one), ("two", two), ("double", double))}
    found = {
        "patch_size": bench.patch,
        "planned_batch": bench.batch,
        "losses": {name: curve.tolist() for name, curve in curves.items()},
        "mean_difference_one_two": float(np.abs(curves["one"] - curves["two"]).mean()),
        "mean_difference_one_other_seed": float(np.abs(curves["one"] - curves["again"]).mean()),
    }
    if bench.gloo:  # two processes on the same cores: times mean nothing
        return found
    return found | {
        "samples_per_second": {
            "one, planned batch": speed["one"],
            "two, planned batch": speed["two"],
            "two, planned batch each": speed["double"],
        },
        "ratio_at_equal_batch_per_device": speed["double"] / speed["one"],
        "ratio_at_equal_global_batch": speed["two"] / speed["one"],
    }


def continue_on_another_number(bench: Bench) -> dict:
    """Stopped on one, continued on two, and the other way round, with the validation at the end of the former."""
    results = {}
    stop = bench.epochs // 2
    for first, second in ((1, 2), (2, 1)):
        run = f"from_{first}_to_{second}"
        stopped = bench.train(run, first, bench.batch, stops=True, MEASURED_STOP=stop)
        latest = torch.load(bench.fold(run) / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
        done = bench.train(run, second, bench.batch, "--c", MEASURED_VALIDATION=int(second == 2))
        final = torch.load(bench.fold(run) / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        results[run] = {
            "stopped_after_epochs": stopped["epochs_done"],
            "epochs_of_the_second_run": len(done["seconds"]),
            "losses_go_on": done["losses"][:stop] == stopped["losses"],
            "same_names_in_both_checkpoints": list(latest["network_weights"]) == list(final["network_weights"]),
            "losses_are_finite": all(math.isfinite(loss) for loss in done["losses"]),
        }
        if second == 2:
            results[run]["validated_cases"] = len(list((bench.fold(run) / "validation").glob("*.nii.gz")))
    return results


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


def make_synthetic(size: int) -> str:
    """Noise with two nested boxes, images of ``size`` voxels and more per axis; planned and preprocessed."""
    import SimpleITK as sitk

    raw = Path(os.environ["nnUNet_raw"]) / f"Dataset{SYNTHETIC_ID}_Synthetic"
    shutil.rmtree(raw, ignore_errors=True)
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(6):
        shape = tuple(size + int(n) for n in rng.integers(0, 1 + size // 8, 3))
        label = np.zeros(shape, np.uint8)
        for value, part in ((1, 0.3), (2, 0.15)):
            label[tuple(slice(int(n * (0.5 - part)), int(n * (0.5 + part))) for n in shape)] = value
        image = (rng.normal(100, 10, shape) + 40 * label).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"case_{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(raw / "labelsTr" / f"case_{case}.nii.gz"))
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    select = ["-d", str(SYNTHETIC_ID), "-c", CONFIGURATION, "-npfp", "2", "-np", "2"]
    subprocess.run([*PLAN, *select], check=True, stdout=subprocess.DEVNULL)
    return str(SYNTHETIC_ID)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="numbers of prepared datasets")
    parser.add_argument("--synthetic", type=int, metavar="SIZE", help="make a dataset with images of SIZE^3 and more")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=50, help="steps an epoch")
    parser.add_argument("--work", type=Path, default=Path("ddp_work"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--gloo", action="store_true", help="two processes on the CPU")
    args = parser.parse_args()
    if not args.gloo and torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, {torch.cuda.device_count()} found; --gloo rehearses on the CPU")
    if args.epochs < 3:
        parser.error("--epochs must be 3 or more: the first one compiles, and half of them come before a stop")
    datasets = [*args.datasets, *([make_synthetic(args.synthetic)] if args.synthetic else [])]
    shutil.rmtree(args.work, ignore_errors=True)
    results = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine() if args.gloo else torch.cuda.get_device_name(),
        "backend": "gloo" if args.gloo else "nccl",
        "versions": {name: version(name) for name in ("torch", "nnunetv2", "nnunet-lgms") if has(name)},
        "epochs": args.epochs,
        "iterations": args.iterations,
        "datasets": {},
    }
    file = args.output / ("ddp_gloo.json" if args.gloo else "ddp.json")
    for dataset in datasets:
        bench = Bench(dataset, args.work.resolve(), args.epochs, args.iterations, args.gloo)
        found = results["datasets"][bench.name] = {}
        for part in (compare_speed_and_loss, continue_on_another_number, kill_one_process):
            found[part.__name__] = part(bench)
            with written_whole(file) as temporary:
                temporary.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return 0


def has(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
