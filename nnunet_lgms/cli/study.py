"""`nnunet_lgms study run|check STUDY`: data sets × variants × folds, by the Snakemake workflow of this package."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

LOCK = ".study.lock"

if TYPE_CHECKING:
    from nnunet_lgms.study.graph import Graph
    from nnunet_lgms.study.profiles import Profile


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "study",
        help="data sets x variants x folds on this machine or a cluster, with one report",
        description="Convert, plan, preprocess, override, train, evaluate, test zero-shot and report, by Snakemake. "
        "Interrupted, the same command goes on. docs/how-to/study.md explains the study's file.",
    )
    parser.add_argument("action", choices=["check", "run"], help="check: say what would be done; run: do it")
    parser.add_argument("study", metavar="STUDY", help="a study.yaml, or one that comes along, such as kernels")
    parser.add_argument(
        "--profile",
        default="local",
        metavar="PROFILE",
        help="local, gpus (one job a GPU), slurm, or a folder with a Snakemake profile (default: local)",
    )
    parser.add_argument(
        "--snakemake", default="", metavar="OPTIONS", help="more of Snakemake's own, as in --snakemake='--until train'"
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.study.requirement import require_study_extra

    require_study_extra()
    from nnunet_lgms.study.checks import check_study
    from nnunet_lgms.study.graph import Graph
    from nnunet_lgms.study.profiles import Profile, check_command

    graph = Graph(args.study)
    profile = Profile.read(args.profile)
    command = snakemake_command(graph, profile, args)
    check_study(graph, profile)
    check_command(command)
    print(describe(graph), flush=True)
    if args.action == "run":
        return _become_snakemake(graph, command)
    if running := _owner_of_run(graph):
        print(f"\nIt is running now ({running}); until that has ended, another run is refused.")
        return 0
    own = ["nnunet_lgms", "study", "run", args.study]
    own += ["--profile", args.profile] * (args.profile != "local")
    own += [f"--snakemake={args.snakemake}"] * bool(args.snakemake)
    print(f"\nTo run it: {shlex.join(own)}, or {shlex.join(command)}")
    return 0


def describe(graph: Graph) -> str:
    """The plan: jobs that are done and to do, and what the trainings to do will cost."""
    from nnunet_lgms.study.estimate import estimate_hours
    from nnunet_lgms.study.results import Results

    done = dict(Results(graph).done)
    complete = (graph.folder / "report.html").is_file() and not any(missing for _, missing in done.values())
    done["report"] = (["report.html"], []) if complete else ([], ["report.html"])
    lines = [f"{graph.study.name}: {graph.path}", f"in {graph.folder}", "", f"  {'job':12} {'all':>6} {'to do':>6}"]
    lines += [f"  {rule:12} {len(d) + len(missing):>6} {len(missing):>6}" for rule, (d, missing) in done.items()]
    jobs, left = sum(len(d) + len(m) for d, m in done.values()), sum(len(m) for _, m in done.values())
    lines += [f"  {'together':12} {jobs:>6} {left:>6}", "  (Snakemake counts one more, `all`, which does nothing.)", ""]
    estimate = estimate_hours(graph)
    if estimate.known:
        hours = f"{estimate.hours:.1f}" if estimate.hours >= 1 else f"{estimate.hours:.3f}"
        unit = "GPU hours" if graph.study.device == "cuda" else "hours on the CPU"
        lines.append(f"{hours} {unit} of training steps for {estimate.known} trainings, from profiles")
    if estimate.unknown:
        first, *others = estimate.unknown
        more = f" and {len(others)} more" if others else ""
        lines.append(
            f"No estimate for {sum(estimate.unknown.values())} trainings ({first}{more}): measure steps first with "
            f"--snakemake='--until profile', and give epochs: where the trainer's name does not tell"
        )
    return "\n".join(lines)


def snakemake_command(graph: Graph, profile: Profile, args: argparse.Namespace) -> list[str]:
    """The command, which works as well when it is typed."""
    from nnunet_lgms.study.gpus import visible_gpus
    from nnunet_lgms.study.schema import packaged

    snakefile = packaged("workflow") / "Snakefile"
    command = ["snakemake", "--snakefile", str(snakefile), "--profile", str(profile.file.parent)]
    command += ["--config", f"study={graph.path}"]
    if args.profile == "gpus" and graph.study.device == "cuda":
        gpus = len(visible_gpus())
        if not gpus:
            raise ValueError("--profile gpus finds no GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES, or device: cpu.")
        command += ["--resources", f"gpu={gpus}"]
    try:
        return [*command, *shlex.split(args.snakemake)]
    except ValueError as error:
        raise ValueError(
            f"--snakemake={args.snakemake} is no list of options ({error}): every quotation mark needs its partner."
        ) from None


def _owner_of_run(graph: Graph) -> str:
    """Who runs the study now; empty if nobody does."""
    from nnunet_lgms.locks import acquired, file_lock, owner

    path = graph.folder / LOCK
    if not path.is_file():
        return ""
    lock = file_lock(path)
    said = owner(path)
    if not acquired(lock):
        return said
    path.unlink(missing_ok=True)  # a killed run left it
    lock.release()
    return ""


def _become_snakemake(graph: Graph, command: list[str]) -> int:
    """Snakemake takes this process over, once a study at a time.

    Its own lock stays when it is killed and has to be taken away by hand. Ours ends with the process, so Snakemake goes
    without.
    """
    import os

    from nnunet_lgms.locks import locked

    with locked(graph.folder / LOCK, f"run of the study {graph.study.name}", survives_exec=True):
        print(f"\n+ {shlex.join(command)}\n", flush=True)
        os.chdir(graph.folder)  # where Snakemake keeps its own log
        os.execv(sys.executable, [sys.executable, "-m", *command, "--nolock"])
