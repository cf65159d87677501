"""What LGMSNet is worth on real data: trainings beside nnU-Net's own, their scores, and the tables of the README.

    python benchmarks/evidence.py gather busi --data DATA --work WORK      # see docs/explanation/evidence.md
    python benchmarks/evidence.py prepare busi --work WORK
    python benchmarks/evidence.py train busi --models lgmsnet nnunet --epochs 50 --jobs 2 --seconds 500 --work WORK
    python benchmarks/evidence.py scores RUNS --work WORK       # writes benchmarks/results/evidence/*.json
    python benchmarks/evidence.py sizes busi --work WORK        # of the objects of gathered sets
    python benchmarks/evidence.py report                        # benchmarks/results/evidence.{md,png}, the README

Every step can be called again: finished trainings are not repeated, and those that ran out of time go on where they
were put aside. The data sets are in `evidence_parts/sets.py`, the models in `evidence_parts/runs.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from evidence_parts.runs import MODELS, STAGES, STEPS, Run, runs_of  # noqa: E402
from evidence_parts.sets import SETS, with_unseen  # noqa: E402
from record import RESULTS  # noqa: E402


def gather(args: argparse.Namespace) -> None:
    from evidence_parts import sets

    for row in with_unseen(args.sets):
        sets.gather(row, args.data, args.work / "raw", args.work / "preprocessed")


def prepare(args: argparse.Namespace) -> None:
    from evidence_parts import plans

    for row in with_unseen(args.sets):
        plans.prepare(row)


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


def sizes(args: argparse.Namespace) -> None:
    from evidence_parts.sizes import measure

    measure([SETS[name] for name in args.sets], args.work / "raw", RESULTS / "evidence" / "sizes.json")


def report(args: argparse.Namespace) -> None:
    from evidence_parts import sizes
    from evidence_parts.report import draw, evidence_md, readme_with

    draw(RESULTS)
    sizes.draw(RESULTS / "evidence" / "sizes.json", RESULTS / "evidence_sizes.png")
    _write(RESULTS / "evidence.md", evidence_md(RESULTS))
    readme = HERE.parent / "README.md"
    _write(readme, readme_with(readme.read_text("utf-8"), RESULTS))


def _add_to(file: Path, new: dict) -> None:
    """What became of runs, beside that of runs before."""
    before = json.loads(file.read_text()) if file.is_file() else {}
    _write(file, json.dumps(before | new, indent=1) + "\n")


def _write(file: Path, text: str) -> None:
    from nnunet_lgms.files import atomic_write

    with atomic_write(file) as temporary:
        temporary.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    commands = {f: subparsers.add_parser(f.__name__) for f in (gather, prepare, train, one, scores, sizes, report)}
    for function, command in commands.items():
        command.set_defaults(function=function)
        if function is not report:
            command.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of all these commands")
        if function in (gather, prepare, train, sizes):
            names = [stage.removeprefix("sets_") for stage in STAGES]
            command.add_argument("sets", nargs="+", choices=names, metavar="SET", help=", ".join(names))
        if function in (train, one):
            command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    commands[gather].add_argument("--data", type=Path, required=True, help="with a folder for each set")
    option = commands[train].add_argument
    option("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    option("--epochs", type=int, default=100)
    option("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    option("--iterations", type=int, default=STEPS, help="steps an epoch; few for a rehearsal")
    option("--jobs", type=int, default=1, help="trainings at a time, on each GPU")
    option("--seconds", type=float, default=1e9, help="after which trainings are put aside")
    commands[one].add_argument("run", help="in JSON, from `train`")
    commands[one].add_argument("--until", type=float, required=True, help="seconds since 1970")
    commands[scores].add_argument("runs", type=Path, help="WORK/runs, or what came back of it")
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
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
