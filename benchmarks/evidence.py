"""What LGMSNet is worth on real data: trainings beside nnU-Net's own, their scores, and the tables of the README.

    python benchmarks/evidence.py gather busi --data DATA --work WORK      # see docs/explanation/evidence.md
    python benchmarks/evidence.py prepare busi --work WORK
    python benchmarks/evidence.py train busi --models lgmsnet nnunet --epochs 50 --jobs 2 --seconds 500 --work WORK
    python benchmarks/evidence.py scores RUNS --work WORK       # writes benchmarks/results/evidence/*.json
    python benchmarks/evidence.py report                        # benchmarks/results/evidence.{md,png}, the README

Every step can be called again: finished trainings are not repeated, and those that ran out of time go on where they
were put aside. The data sets are in `evidence_parts/sets.py`, the models in `evidence_parts/runs.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from evidence_parts.runs import MODELS, STAGES, STEPS, Run, runs_of  # noqa: E402
from evidence_parts.sets import with_unseen  # noqa: E402
from record import RESULTS  # noqa: E402


def gather(args: argparse.Namespace) -> None:
    from evidence_parts import sets

    for row in with_unseen(args.sets):
        sets.gather(row, args.data, args.work / "raw")


def prepare(args: argparse.Namespace) -> None:
    from evidence_parts import plans

    for row in with_unseen(args.sets):
        plans.prepare(row, args.work / "raw", args.work / "preprocessed")


def train(args: argparse.Namespace) -> None:
    from evidence_parts.scheduler import train_all

    runs = runs_of(args.sets, args.models, args.seeds, epochs=args.epochs, iterations=args.iterations)
    if not runs:
        raise ValueError("The published levels are for flat images, the 3D recipe is for volumes: name another model.")
    state = train_all(runs, args.work, args.device, args.jobs, args.seconds)
    print(*(f"{name}: {what}" for name, what in state.items()), sep="\n")
    _add_to(args.work / "runs" / "state.json", state)


def one(args: argparse.Namespace) -> None:
    from evidence_parts.training import OutOfTime, train_run

    try:
        train_run(Run(**json.loads(args.run)), args.work, args.device, args.until)
    except OutOfTime:
        print("put aside")


def scores(args: argparse.Namespace) -> None:
    from evidence_parts.scores import score_all

    print(*score_all(args.runs, args.work / "raw", RESULTS / "evidence"), sep="\n")
    _add_to(RESULTS / "evidence" / "state.json", json.loads((args.runs / "state.json").read_text()))


def _add_to(file: Path, new: dict) -> None:
    """What became of runs, beside that of runs before."""
    from nnunet_lgms.files import atomic_write, read_json

    before = read_json(file) if file.is_file() else {}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(before | new, indent=1) + "\n")


def report(args: argparse.Namespace) -> None:
    from evidence_parts.report import draw, evidence_md, readme_with

    from nnunet_lgms.files import atomic_write

    draw(RESULTS)
    readme = HERE.parent / "README.md"
    for file, text in {
        RESULTS / "evidence.md": evidence_md(RESULTS),
        readme: readme_with(readme.read_text("utf-8"), RESULTS),
    }.items():
        with atomic_write(file) as temporary:
            temporary.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (gather, prepare, train, one, scores, report):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        if function in (gather, prepare, train):
            names = [stage.removeprefix("sets_") for stage in STAGES]
            command.add_argument("sets", nargs="+", choices=names, metavar="SET", help=", ".join(names))
        if function is gather:
            command.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="has a folder for each set")
        if function is train:
            command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
            command.add_argument("--epochs", type=int, default=100)
            command.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
            command.add_argument("--iterations", type=int, default=STEPS, help="steps an epoch; few for a rehearsal")
            command.add_argument("--jobs", type=int, default=1, help="trainings at a time, on each GPU")
            command.add_argument("--seconds", type=float, default=1e9, help="after which trainings are put aside")
        if function is one:  # what `train` calls
            command.add_argument("run", metavar="JSON")
            command.add_argument("--until", type=float, default=time.time() + 1e9)
        if function in (train, one):
            command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        if function is scores:
            command.add_argument("runs", type=Path, help="WORK/runs, or what came back of it")
        if function is not report:
            command.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of all these commands")
    args = parser.parse_args()
    if hasattr(args, "work"):
        args.work = args.work.resolve()
        for folder in ("raw", "preprocessed", "runs"):
            (args.work / folder).mkdir(parents=True, exist_ok=True)
        # before nnU-Net is imported; every run has results of its own
        os.environ |= {f"nnUNet_{folder}": str(args.work / folder) for folder in ("raw", "preprocessed")}
        os.environ.setdefault("nnUNet_results", str(args.work / "results"))
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
