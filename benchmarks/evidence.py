"""What LGMSNet is worth on real data: trainings beside nnU-Net's own, their scores, and the tables of the README.

    python benchmarks/evidence.py gather --data DATA          # with nnU-Net's folders set; see docs/explanation/
    python benchmarks/evidence.py pack --data DATA --out PACKS
    python benchmarks/evidence.py unpack PACKS --work WORK
    python benchmarks/evidence.py train sets_busi:lgmsnet,nnunet:50 --jobs 2 --seconds 500 --work WORK
    python benchmarks/evidence.py bundle --work WORK --out OUT
    python benchmarks/evidence.py scores OUT...               # writes benchmarks/results/evidence/*.json
    python benchmarks/evidence.py report                      # benchmarks/results/evidence.{md,png}, the README

Every step can be called again: finished trainings are not repeated, and those that ran out of time go on where they
were put aside. What a stage trains is in `evidence_parts/runs.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from evidence_parts.runs import STAGES, Run, runs_of  # noqa: E402
from evidence_parts.sets import SETS  # noqa: E402
from record import RESULTS  # noqa: E402

MIB = 2**20


def gather(args: argparse.Namespace) -> int:
    from evidence_parts import sets

    for name in args.sets:
        sets.gather(sets.SETS[name], args.data, Path(os.environ["nnUNet_raw"]))
        print(f"{sets.SETS[name].name}: {sets.SETS[name].configuration}")
    return 0


def pack(args: argparse.Namespace) -> int:
    from evidence_parts.packs import pack_dataset
    from evidence_parts.plans import write_plans, write_splits

    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    args.out.mkdir(parents=True, exist_ok=True)
    for row in (SETS[name] for name in args.sets):
        plans = ["nnUNetPlans"]
        if row.rule:
            plans = write_plans(preprocessed, row.name)
            write_splits(preprocessed, row.name, args.data)
        images = {case: image for case, (image, _) in row.files(args.data).items()} if args.data else None
        folder, identifier = preprocessed / row.name, f"nnUNetPlans_{row.configuration}"
        pack_dataset(folder, identifier, plans, args.out / f"{row.name}.tar.xz", images)
    return 0


def unpack(args: argparse.Namespace) -> int:
    from evidence_parts.packs import unpack_dataset

    for file in sorted(args.packs.glob("Dataset*.tar.xz")):
        if not (args.work / "preprocessed" / file.name.split(".")[0]).is_dir():
            with tempfile.TemporaryDirectory(dir=args.work) as folder:
                unpack_dataset(file, Path(folder), os.cpu_count() or 1)
                (args.work / "preprocessed").mkdir(exist_ok=True)
                for dataset in Path(folder).iterdir():
                    dataset.rename(args.work / "preprocessed" / dataset.name)
    return 0


def train(args: argparse.Namespace) -> int:
    from evidence_parts.packs import bundle as make
    from evidence_parts.scheduler import train_all

    def finished() -> None:
        if args.out:
            make(args.work / "runs", args.work / "results", args.out, 15 * MIB, 4, models_too=False)

    runs = [run for words in args.stages for run in runs_of(words, args.iterations)]
    state = train_all(runs, args.work, args.device, args.jobs, args.seconds, finished)
    file = args.work / "runs" / "state.json"
    file.parent.mkdir(exist_ok=True)
    _add_to(file, state)
    for name, what in state.items():
        print(f"{name}: {what}")
    finished()
    return 0


def one(args: argparse.Namespace) -> int:
    from evidence_parts.training import OutOfTime, train_run

    try:
        train_run(Run(**json.loads(args.run)), args.work, args.device, args.until)
    except OutOfTime:
        print("put aside")
    return 0


def bundle(args: argparse.Namespace) -> int:
    from evidence_parts.packs import bundle as make

    left_out = make(args.work / "runs", args.work / "results", args.out, int(args.piece * MIB), args.pieces)
    print(*(f"no room for the model of {name}" for name in left_out), sep="\n")
    return 0


def scores(args: argparse.Namespace) -> int:
    from evidence_parts.packs import join
    from evidence_parts.scores import score_all

    from nnunet_lgms.files import read_json

    preprocessed = Path(os.environ["nnUNet_preprocessed"])
    for folder in args.bundles:
        target = args.unpacked or folder / "unpacked"
        if not join(folder, "results.tar.xz", target):
            raise ValueError(f"{folder} holds no results.tar.xz.00: give a folder that `bundle` wrote.")
        join(folder, "models.tar", target)
        for weights in target.glob("models/**/weights.pth"):
            weights.rename(weights.with_name("checkpoint_final.pth"))
        print(*score_all(target / "runs", preprocessed, args.results / "evidence"), sep="\n")
        state = target / "runs" / "state.json"
        if state.is_file():  # not yet if the bundle was made while trainings ran
            _add_to(args.results / "evidence" / "state.json", read_json(state))
    return 0


def _add_to(file: Path, new: dict) -> None:
    """What became of runs, beside that of runs before."""
    from nnunet_lgms.files import atomic_write, read_json

    before = read_json(file) if file.is_file() else {}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(before | new, indent=1) + "\n")


def report(args: argparse.Namespace) -> int:
    from evidence_parts.pictures import draw
    from evidence_parts.report import readme_with, write_report

    from nnunet_lgms.files import atomic_write

    draw(args.results)
    write_report(args.results)
    readme = HERE.parent / "README.md"
    with atomic_write(readme) as temporary:
        temporary.write_text(readme_with(readme.read_text("utf-8"), args.results), "utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, **folders: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__)
        sub.set_defaults(function=function)
        for name, what in folders.items():
            sub.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER", help=what)
        return sub

    for sub in (command(gather), command(pack, out="of the packs")):
        needed = sub.prog.endswith("gather")
        sub.add_argument("--data", type=Path, metavar="FOLDER", required=needed, help="with a folder for each set")
        sub.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help=", ".join(SETS))
    command(unpack, work="to unpack into").add_argument("packs", type=Path, metavar="PACKS")
    sub = command(train, work="with what `unpack` unpacked")
    words = f"STAGE[:MODELS[:EPOCHS[:SEEDS]]], such as sets_busi:lgmsnet,nnunet:50; stages: {', '.join(STAGES)}"
    sub.add_argument("stages", nargs="+", metavar="STAGE", help=words)
    sub.add_argument("--iterations", type=int, help="steps an epoch in place of a pass: a rehearsal")
    sub.add_argument("--jobs", type=int, default=1, help="trainings at a time, on each GPU")
    sub.add_argument("--seconds", type=float, default=1e9, help="after which trainings are put aside")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="bundle what is finished there, again and again")
    sub.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    sub = command(one, work="as for `train`, which calls this")
    sub.add_argument("run")
    sub.add_argument("--until", type=float, default=time.time() + 1e9)
    sub.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    sub = command(bundle, work="as for `train`", out="of the pieces")
    sub.add_argument("--piece", type=float, default=15, metavar="MIB", help="of a piece (15)")
    sub.add_argument("--pieces", type=int, default=4, help="at most (4)")
    sub = command(scores)
    sub.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    sub.add_argument("--unpacked", type=Path, metavar="FOLDER", help="where its files go (BUNDLE/unpacked)")
    command(report)
    for sub in (commands.choices[name] for name in ("scores", "report")):
        sub.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="(benchmarks/results)")
    args = parser.parse_args()
    if hasattr(args, "work"):
        args.work = args.work.resolve()
        args.work.mkdir(parents=True, exist_ok=True)
    try:
        return args.function(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
