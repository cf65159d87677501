"""A study on all GPUs of one host against one of its jobs alone: ``nnunet_lgms study run --profile gpus``.

    python benchmarks/study_gpus.py                            # as many folds as there are visible GPUs
    python benchmarks/study_gpus.py --cpu --epochs 3 --iterations 1     # a rehearsal, two jobs at a time, no times

Three studies of the hippocampus cases of the demo, each with results of its own:

- alone: one fold, on one GPU;
- all: a fold for each GPU at the same time; which GPU each had, and how long one job alone takes of what all take;
- killed: the same, and one training is killed after its first checkpoint; the same command goes on with it.

Everything is written below ``--work``, the figures to OUTPUT/study_gpus.json, beside those of other numbers of GPUs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from commands import measured_training, start, wait, wait_until, words_of
from record import ROOT, command_line, provenance, write
from training_sets import CONFIGURATION, HIPPOCAMPUS, PLAN, READER

TRAINER = "nnUNetTrainerLGMSNet_measured"
BEGIN = re.compile(r"^(\S+ \S+) \+ nnUNetv2_train", re.M)
GPU = re.compile(r"^On (.+)", re.M)


class Bench:
    """Studies of one data set, below ``work``."""

    def __init__(self, work: Path, n: int, cpu: bool):
        self.work, self.n, self.cpu = work, n, cpu
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(work / name)
            (work / name).mkdir(parents=True)
        raw = work / "raw" / HIPPOCAMPUS
        shutil.copytree(ROOT / "demo" / "data" / "hippocampus", raw)
        description = json.loads((raw / "dataset.json").read_text()) | READER
        (raw / "dataset.json").write_text(json.dumps(description))
        subprocess.run([*PLAN, "-d", "4", "-c", CONFIGURATION, "-np", "4"], check=True, stdout=subprocess.DEVNULL)
        preprocessed = work / "preprocessed" / HIPPOCAMPUS
        cases = sorted(file.name[: -len(".nii.gz")] for file in (raw / "labelsTr").glob("*.nii.gz"))
        splits = [{"train": [c for c in cases if c not in cases[k::n]], "val": cases[k::n]} for k in range(n)]
        (preprocessed / "splits_final.json").write_text(json.dumps(splits))

    def start(self, name: str, seed: int, folds: int) -> subprocess.Popen:
        """A study up to its trainings; its output goes to ``work/NAME.log``."""
        cores = (os.cpu_count() or 1) // self.n
        file = self.work / f"{name}.yaml"
        study = {
            "name": name,
            "device": "cpu" if self.cpu else "cuda",
            "threads": 1 if self.cpu else max(1, cores),
            "processes": 0 if self.cpu else max(1, cores - 1),
            "configurations": [CONFIGURATION],
            "trainer": TRAINER,
            "seeds": [seed],
            "folds": list(range(folds)),
            "datasets": {HIPPOCAMPUS: {}},
            "variants": {"LGMSNet": {}},
        }
        file.write_text(json.dumps(study))  # which is YAML, too
        snakemake = "--until train" + f" --cores {self.n}" * self.cpu
        command = [sys.executable, "-m", "nnunet_lgms", "study", "run", str(file), f"--snakemake={snakemake}"]
        return start([*command, "--profile", "local" if self.cpu else "gpus"], self.log(name))

    def run(self, name: str, seed: int, folds: int) -> int:
        """Its exit code."""
        return wait(self.start(name, seed, folds), self.log(name))

    def log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def jobs(self, name: str) -> list[dict]:
        """Fold, GPU, begin and end of every training that is done."""
        folder = self.work / "results" / "studies" / name
        found = []
        for done in sorted((folder / "train").rglob("fold_*.json")):
            log = (folder / "logs" / done.relative_to(folder)).with_suffix(".log").read_text()
            begin = time.mktime(time.strptime(BEGIN.findall(log)[-1], "%Y-%m-%d %H:%M:%S"))
            gpu = "".join(GPU.findall(log)[-1:])
            found.append({"fold": done.stem, "gpu": gpu, "begin": begin, "end": done.stat().st_mtime})
        return found

    def fold(self, seed: int, fold: int) -> Path:
        model = f"{TRAINER}__nnUNetPlans__{CONFIGURATION}"
        return self.work / "results" / f"seed_{seed}" / HIPPOCAMPUS / model / f"fold_{fold}"


def trained(bench: Bench, name: str, seed: int, folds: int) -> list[dict]:
    """The jobs of a study that nothing disturbs."""
    if code := bench.run(name, seed, folds):
        raise RuntimeError(f"{name} ended with {code}: see {bench.log(name)}")
    return bench.jobs(name)


def all_at_once(bench: Bench, seconds_alone: float) -> dict:
    jobs = trained(bench, "all", 2, bench.n)
    seconds = max(job["end"] for job in jobs) - min(job["begin"] for job in jobs)
    return {
        "jobs": len(jobs),
        "gpus": len({job["gpu"] for job in jobs}),
        "seconds": seconds,
        "seconds_of_each": [round(job["end"] - job["begin"], 1) for job in jobs],
        "one_alone_of_all": seconds_alone / seconds,
    }


def killed_and_continued(bench: Bench) -> dict:
    """SIGKILL to the training of the last fold, once it has a checkpoint."""
    last = bench.n - 1
    process = bench.start("killed", 3, bench.n)
    wait_until((bench.fold(3, last) / "checkpoint_latest.pth").is_file, process, bench.log("killed"))
    job = {"-m", "nnunet_lgms.study", "train", str(bench.work / "killed.yaml")}
    commands = {int(p.name): words_of(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    (pid,) = (pid for pid, words in commands.items() if job <= set(words) and words[-1] == str(last))
    os.kill(pid, signal.SIGKILL)
    first = wait(process, bench.log("killed"))
    done = len(bench.jobs("killed"))
    second = bench.run("killed", 3, bench.n)
    logs = sorted(bench.fold(3, last).glob("training_log_*.txt"))
    others = [len(list(bench.fold(3, fold).glob("training_log_*.txt"))) for fold in range(last)]
    return {
        "exit_codes": [first, second],
        "jobs_done_before_and_after": [done, len(bench.jobs("killed"))],
        "epochs_before_and_after": [len(re.findall(r"Epoch \d+", log.read_text())) for log in logs],
        "others_began_once": others == [1] * last,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=150, help="steps an epoch")
    parser.add_argument("--work", type=Path, default=Path("study_work"))
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without GPUs")
    args = parser.parse_args(arguments)
    n = 2 if args.cpu else torch.cuda.device_count()
    if n < 2:
        parser.error(f"{n} GPUs found, 2 needed; --cpu rehearses")
    work = args.work.resolve()
    if work.exists() and any(work.iterdir()):
        parser.error(f"--work: {args.work} is not empty: name another folder")
    os.environ.update(measured_training(args.epochs, args.iterations))
    bench = Bench(work, n, args.cpu)
    (alone,) = trained(bench, "alone", 1, 1)
    found = {"alone": {"seconds": alone["end"] - alone["begin"]}}
    found["all"] = all_at_once(bench, found["alone"]["seconds"])
    found["killed"] = killed_and_continued(bench)
    about = {**provenance("cpu" if args.cpu else "cuda"), "epochs": args.epochs, "iterations": args.iterations}
    print(json.dumps(found, indent=1))
    if args.cpu:
        return 0  # several jobs on the same cores: times mean nothing
    file = args.output / "study_gpus.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    write(args.output, "study_gpus", before | {f"{n} GPUs": {**found, "run": about}})
    good = found["all"]["gpus"] == n and found["killed"]["exit_codes"][1] == 0
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
