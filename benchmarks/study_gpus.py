"""A study on all GPUs of one host against one of its jobs alone: ``nnunet_lgms study run --profile gpus``.

    python benchmarks/study_gpus.py                            # as many folds as there are visible GPUs
    python benchmarks/study_gpus.py --cpu --jobs 2 --epochs 3 --iterations 1     # a rehearsal, no times

Three studies of the hippocampus cases of the demo, each with results of its own:

- alone: one fold, on one GPU;
- all: a fold for each GPU at the same time; which GPU each had, and how long one job alone takes of what all take;
- killed: the same, and one training is killed after its first checkpoint; the same command goes on with it.

Everything is written below ``--work``, the figures to OUTPUT/study_gpus.json, beside those of other numbers of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from record import RESULTS, ROOT, provenance, write
from training_sets import CONFIGURATION, HIPPOCAMPUS, PLAN, READER

HERE = Path(__file__).resolve().parent
TRAINER = "nnUNetTrainerLGMSNet_measured"
STUDY = """
name: {name}
device: {device}
threads: {threads}
processes: {processes}
configurations: [{configuration}]
trainer: {trainer}
seeds: [{seed}]
folds: {folds}
datasets: {{{dataset}: {{}}}}
variants: {{LGMSNet: {{}}}}
"""
BEGIN = re.compile(r"^(\S+ \S+) \+ nnUNetv2_train", re.M)
GPU = re.compile(r"^On (.+)", re.M)
PATIENCE = 900  # seconds until a study counts as hanging


class Bench:
    """Studies of one data set, below ``work``."""

    def __init__(self, work: Path, n: int, cpu: bool, batch: int | None):
        self.work, self.n, self.cpu = work, n, cpu
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(work / name)
            (work / name).mkdir(parents=True)
        folders = (HERE / "trainers", ROOT / "trainers", os.environ.get("nnUNet_extTrainer", ""))
        os.environ["nnUNet_extTrainer"] = os.pathsep.join(filter(None, map(str, folders)))
        raw = work / "raw" / HIPPOCAMPUS
        shutil.copytree(ROOT / "demo" / "data" / "hippocampus", raw)
        description = json.loads((raw / "dataset.json").read_text()) | READER
        (raw / "dataset.json").write_text(json.dumps(description))
        select = ["-d", "4", "-c", CONFIGURATION, "-np", "4"]
        subprocess.run([*PLAN, *select], check=True, stdout=subprocess.DEVNULL)
        preprocessed = work / "preprocessed" / HIPPOCAMPUS
        cases = sorted(file.name[: -len(".nii.gz")] for file in (raw / "labelsTr").glob("*.nii.gz"))
        splits = [{"train": [c for c in cases if c not in cases[k::n]], "val": cases[k::n]} for k in range(n)]
        (preprocessed / "splits_final.json").write_text(json.dumps(splits))
        if batch:
            plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
            plans["configurations"][CONFIGURATION]["batch_size"] = batch
            (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))

    def start(self, name: str, seed: int, folds: int) -> subprocess.Popen:
        """A study up to its trainings; its output goes to ``work/NAME.log``."""
        cores = (os.cpu_count() or 1) // self.n
        file = self.work / f"{name}.yaml"
        file.write_text(
            STUDY.format(
                name=name,
                device="cpu" if self.cpu else "cuda",
                threads=1 if self.cpu else max(1, cores),
                processes=0 if self.cpu else max(1, cores - 1),
                configuration=CONFIGURATION,
                trainer=TRAINER,
                seed=seed,
                folds=list(range(folds)),
                dataset=HIPPOCAMPUS,
            )
        )
        options = "--until train" + f" --cores {self.n}" * self.cpu
        command = [sys.executable, "-m", "nnunet_lgms", "study", "run", str(file), f"--snakemake={options}"]
        command += ["--profile", "local" if self.cpu else "gpus"]
        with (self.work / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def run(self, name: str, seed: int, folds: int) -> int:
        """Its exit code."""
        process = self.start(name, seed, folds)
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{name} hangs: see {self.work / name}.log") from None

    def jobs(self, name: str) -> list[dict]:
        """Fold, GPU, begin and end of every training that is done."""
        folder = self.work / "results" / "studies" / name
        found = []
        for done in sorted((folder / "train").rglob("fold_*.json")):
            log = (folder / "logs" / done.relative_to(folder)).with_suffix(".log").read_text()
            begin = time.mktime(time.strptime(BEGIN.findall(log)[-1], "%Y-%m-%d %H:%M:%S"))
            gpu = GPU.findall(log)
            found.append(
                {"fold": done.stem, "gpu": gpu[-1] if gpu else "", "begin": begin, "end": done.stat().st_mtime}
            )
        return found

    def fold(self, seed: int, fold: int) -> Path:
        model = f"{TRAINER}__nnUNetPlans__{CONFIGURATION}"
        return self.work / "results" / f"seed_{seed}" / HIPPOCAMPUS / model / f"fold_{fold}"


def alone(bench: Bench) -> dict:
    if code := bench.run("alone", 1, 1):
        raise RuntimeError(f"alone ended with {code}: see {bench.work}/alone.log")
    (job,) = bench.jobs("alone")
    return {"seconds": job["end"] - job["begin"]}


def all_at_once(bench: Bench, seconds_alone: float) -> dict:
    if code := bench.run("all", 2, bench.n):
        raise RuntimeError(f"all ended with {code}: see {bench.work}/all.log")
    jobs = bench.jobs("all")
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
    last, begin = bench.n - 1, time.monotonic()
    process = bench.start("killed", 3, bench.n)
    while not (bench.fold(3, last) / "checkpoint_latest.pth").is_file():
        if process.poll() is not None or time.monotonic() - begin > PATIENCE:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"the training that was to be killed ended or hangs: see {bench.work}/killed.log")
        time.sleep(0.1)
    job = ["nnunet_lgms.study", "train", str(bench.work / "killed.yaml")]
    (pid,) = (int(p.name) for p in Path("/proc").glob("[0-9]*") if _is_job(p, job, str(last)))
    os.kill(pid, signal.SIGKILL)
    first = process.wait(PATIENCE)
    done = len(bench.jobs("killed"))
    second = bench.run("killed", 3, bench.n)
    logs = sorted(bench.fold(3, last).glob("training_log_*.txt"))
    return {
        "exit_codes": [first, second],
        "jobs_done_before_and_after": [done, len(bench.jobs("killed"))],
        "epochs_before_and_after": [len(re.findall(r"Epoch \d+", log.read_text())) for log in logs],
        "others_began_once": all(
            len(list(bench.fold(3, fold).glob("training_log_*.txt"))) == 1 for fold in range(bench.n - 1)
        ),
    }


def _is_job(process: Path, words: list[str], fold: str) -> bool:
    try:
        line = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return "-m" in line and all(word in line for word in words) and line[-2] == fold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=150, help="steps an epoch")
    parser.add_argument("--batch", type=int, metavar="N", help="(as planned)")
    parser.add_argument("--work", type=Path, default=Path("study_work"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without GPUs")
    parser.add_argument("--jobs", type=int, metavar="N", help="(with --cpu: at the same time)")
    args = parser.parse_args()
    n = (args.jobs or 2) if args.cpu else torch.cuda.device_count()
    if n < 2:
        parser.error(f"{n} GPUs found, 2 needed; --cpu rehearses")
    work = args.work.resolve()
    if work.exists() and any(work.iterdir()):
        parser.error(f"--work: {args.work} is not empty: name another folder")
    os.environ.update(MEASURED_EPOCHS=str(args.epochs), MEASURED_ITERATIONS=str(args.iterations))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    bench = Bench(work, n, args.cpu, args.batch)
    found = {"alone": alone(bench)}
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
