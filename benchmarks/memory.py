"""Peak memory of a training step: what the planner estimates beside what a GPU needs.

    python benchmarks/memory.py                       every plan, to benchmarks/results/memory.{json,md}
    python benchmarks/memory.py --missing             only what memory.json has no measurement of
    python benchmarks/memory.py --estimate-only       new estimates for the measured steps in memory.json, without a GPU
    python benchmarks/memory.py --calibrate           only what all of these print last, from memory.json as it is: the
                                                      constants for nnunet_lgms/planning/memory.py that fit best

A step is what nnU-Net does: batch to the GPU, autocast to float16, loss, scaled backward pass, clipping at 12, SGD with
momentum; cuDNN searches for its fastest algorithms. "trained" is CUDA graphs, as in the trainer on one GPU, "eager" is
without. Every step runs in a process of its own, several at a time: the memory that PyTorch allocates is counted per
process. memory.json is written after each of them, and what is not done in time, or fails, is said there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

import torch
from commands import last_json, start, stop
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from record import command_line, provenance, table, write
from scipy.optimize import linprog
from torch import nn

from nnunet_lgms.config import LGMSSettings
from nnunet_lgms.config.resolve import Topology, network_kwargs
from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.planning.memory import needed_bytes, trace_training_step
from nnunet_lgms.planning.override import build_on_meta
from nnunet_lgms.planning.training_step import peak_memory, planned_training_step

MODES = ("trained", "eager")
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """One row: what nnU-Net would plan for this spacing, and the settings of LGMSNet."""

    name: str
    patch: Sequence[int]
    spacing: Sequence[float]
    batch: int
    n_classes: int = 2
    max_pool: int = 99
    settings: dict = field(default_factory=dict)
    channels: int = 1

    def topology(self) -> Topology:
        """Strides and kernels as nnU-Net derives them."""
        _, strides, kernels, patch, _ = get_pool_and_conv_props(self.spacing, self.patch, 4, self.max_pool)
        return Topology(tuple(int(p) for p in patch), strides, kernels, tuple(self.spacing))


WIDE = {"widths": {"1": 32, "2": 64, "3+": 128, "4+": 256}}
NARROW = {"widths": {"1": 8, "2": 16, "3+": 32, "4+": 64}}
PLANS = [  # the most different ones first
    Plan("3D, 6 levels", (128, 128, 128), (1, 1, 1), 2, 4),
    Plan("2D, 7 levels", (256, 256), (1, 1), 16, 2, channels=3),
    Plan("3D, thick slices", (20, 320, 256), (5, 0.6, 0.6), 2, 4),
    Plan("3D, 5 levels", (96, 96, 96), (1, 1, 1), 2, 14, max_pool=4),
    Plan("3D, 2 levels", (64, 64, 64), (1, 1, 1), 2, 2, max_pool=1),
    Plan("2D, anisotropic", (320, 192), (0.6, 1.3), 12, 4),
    Plan("3D, 4 levels", (40, 56, 40), (1, 1, 1), 9, 3),
    Plan("2D, 4 levels", (56, 40), (1, 1), 35, 3),
    Plan("2D, 3 levels", (256, 256), (1, 1), 12, 4, max_pool=2),
    Plan("3D, anisotropic patch", (160, 112, 128), (1, 1, 1), 2, 3),
    Plan("2D, 8 levels, wide", (512, 512), (1, 1), 8, 2, settings=WIDE),
    Plan("3D, kernels 5 to 11", (96, 96, 96), (1, 1, 1), 4, 2, settings={"lms_kernels": [5, 7, 9, 11]}),
    Plan("3D, narrow", (128, 128, 128), (1, 1, 1), 4, 2, settings=NARROW),
    Plan("3D, thick slices, 2", (28, 256, 256), (3, 0.8, 0.8), 2, 2),
]


# --- one step, in a process of its own --------------------------------------------------------------------------------


def measure(plan: Plan, mode: str) -> dict:
    """Bytes at the peak of each of the first steps; before the first, cuDNN's algorithms are tried and graphs recorded.

    ``allocated`` and ``reserved`` are PyTorch's counts, the former with what CUDA graphs hold. The peak is the most of
    the steps but the first.
    """
    torch.backends.cudnn.benchmark = True
    topology = plan.topology()
    network = GraphedLGMSNet(
        plan.channels,
        plan.n_classes,
        conv_op=nn.Conv2d if topology.dim == 2 else nn.Conv3d,
        **network_kwargs(LGMSSettings.from_plan(plan.settings), topology),
    )
    shape = (plan.batch, plan.channels, *topology.patch_size)
    allocated, reserved, seconds, step = [], [], [], None
    for _ in range(4):
        begin = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        step = step or planned_training_step(network, shape, plan.n_classes, torch.device("cuda"), mode == "trained")
        step()
        torch.cuda.synchronize()
        allocated.append(peak_memory() if seconds else torch.cuda.max_memory_allocated())
        reserved.append(torch.cuda.max_memory_reserved())
        seconds.append(round(time.perf_counter() - begin, 3))
    return {"peak": max(allocated[1:]), "allocated": allocated, "reserved": reserved, "s": seconds}


# --- many of them -----------------------------------------------------------------------------------------------------


def run_all(commands: Mapping[Hashable, Sequence[str]], workers: int, seconds: float) -> Iterator[tuple]:
    """Runs commands, at most ``workers`` at a time; gives the key of each and the JSON that it printed last.

    One that fails, or is not done after ``seconds`` in all, gives ``{"failed": reason}``; with its children, it is
    stopped.
    """
    end, running = time.monotonic() + seconds, set()

    def run(command: Sequence[str]) -> dict:
        begin = time.monotonic()
        if begin >= end:
            return {"failed": f"not begun within {seconds:.0f} s"}
        with tempfile.NamedTemporaryFile() as log:
            process = start(command, Path(log.name))
            running.add(process)
            try:
                code = process.wait(end - begin)
            except TimeoutExpired:
                stop(process)
                return {"failed": f"not done after {time.monotonic() - begin:.0f} s"}
            finally:
                running.discard(process)
            return last_json(Path(log.name).read_text(errors="replace"), code)

    with ThreadPoolExecutor(workers) as pool:
        keys = {pool.submit(run, command): key for key, command in commands.items()}
        try:
            for done in as_completed(keys):
                yield keys[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                stop(process)


def measure_all(plans: Sequence[Plan], args: argparse.Namespace, file: Path) -> dict:
    """The table: every plan in every mode, written to ``file`` after each."""
    rows = [{**asdict(p), "patch": list(p.topology().patch_size), "levels": p.topology().n_levels} for p in plans]
    if args.missing and file.is_file():
        before = {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}
        for row in rows:
            steps = {mode: before.get(row["name"], {}).get(mode) for mode in MODES}
            row.update({mode: step for mode, step in steps.items() if step and "peak" in step})
    report = {**provenance(), "rows": rows}
    script = [sys.executable, str(Path(__file__).resolve())]
    commands = {
        (i, mode): [*script, "--row", json.dumps(asdict(plan)), "--modes", mode]
        for mode in args.modes
        for i, plan in enumerate(plans)
        if mode not in rows[i]
    }
    # all processes read and fill the same cache of compiled kernels; more threads than these would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, 2 * (os.cpu_count() or 1) // args.workers)))
    begin = time.monotonic()
    for (i, mode), result in run_all(commands, args.workers, args.seconds):
        rows[i][mode] = result
        said = result.get("failed") or f"{result['peak'] / MIB:.0f} MiB, first step {result['s'][0]:.0f} s"
        print(f"[{time.monotonic() - begin:.0f} s] {rows[i]['name']}, {mode}: {said}", flush=True)
        write(args.output, "memory", report)
    return report


# --- beside the estimates ---------------------------------------------------------------------------------------------


def estimate(row: dict) -> dict:
    """Counted bytes and the planner's estimate."""
    plan = Plan(**{name: row[name] for name in Plan.__dataclass_fields__})
    topology = plan.topology()
    network = build_on_meta(LGMSSettings.from_plan(plan.settings), topology, plan.channels, plan.n_classes)
    counted = trace_training_step(network, (plan.batch, plan.channels, *topology.patch_size), plan.n_classes)
    return {"counted": asdict(counted), "estimate": needed_bytes(counted, topology.dim)}


def markdown(report: dict) -> str:
    """The rows, with the deviation of the estimate from the peak of a step as the trainer runs it."""
    rows = []
    for row in report["rows"]:
        trained, eager = (row.get(mode, {}) for mode in MODES)
        measured = trained.get("peak")
        deviation = f"{100 * (row['estimate'] / measured - 1):+.1f} %" if measured else ""
        first, reserved = (trained["allocated"][0], max(trained["reserved"][1:])) if measured else (None, None)
        estimated, *others = map(_mib, (row["estimate"], measured, eager.get("peak"), first, reserved))
        plan = [row["name"], "x".join(map(str, row["patch"])), row["batch"], row["levels"]]
        rows.append([*plan, estimated, others[0], deviation, *others[1:]])
    lines = [
        f"Peak memory of a training step: {report['date']}, {report['device']}, "
        f"torch {report.get('versions', report)['torch']}.",
        "",
        "All in MiB, and without what CUDA holds beside PyTorch. Estimate: `nnunet_lgms plan`. Trained: the most that "
        "PyTorch's tensors and CUDA graphs took in a step of the trainer's on one GPU, after the first; eager: without "
        "graphs, empty where that was not measured; first: until the end of the first step, for which cuDNN tries "
        "algorithms; reserved: what PyTorch held.",
        "",
        *table("plan | patch | batch | levels | estimate | trained | deviation | eager | first | reserved", rows),
    ]
    return "\n".join(lines) + "\n"


def _mib(n: int | None) -> str:
    return "" if n is None else f"{n / MIB:.0f}"


def calibrate(rows: list[dict]) -> None:
    """Prints the constants that make the largest relative deviation smallest, per dimension."""
    for dim in (2, 3):
        those = [r for r in rows if len(r["patch"]) == dim and r.get("trained", {}).get("peak")]
        if not those:
            continue
        # |static + fixed + slope * activations - measured| <= worst * measured, in MiB
        a, b = [], []
        for r in those:
            static, counted = r["counted"]["static"] / MIB, r["counted"]["activations"] / MIB
            measured = r["trained"]["peak"] / MIB
            a += [[counted, 1, -measured], [-counted, -1, -measured]]
            b += [measured - static, static - measured]
        slope, fixed, worst = linprog([0, 0, 1], a, b, bounds=[(0, None), (0, None), (0, None)]).x
        print(f"{dim}D: activations={slope:.3f}, fixed={fixed:.0f} MiB; largest deviation {100 * worst:.1f} %")


def main(arguments: Sequence[str] | None = None, plans: Sequence[Plan] = PLANS) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--workers", type=int, default=12, help="steps at a time (12)")
    parser.add_argument("--seconds", type=float, default=420, help="after which what is not done is given up (420)")
    parser.add_argument("--missing", action="store_true", help="only what memory.json has no measurement of")
    parser.add_argument("--estimate-only", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.row:
        torch.set_num_threads(1)
        print(json.dumps(measure(Plan(**json.loads(args.row)), args.modes[0])))
        return 0
    file = args.output / "memory.json"
    measured_before = args.estimate_only or args.calibrate
    if measured_before and not file.is_file():
        parser.error(f"{file} does not exist: measure first, without --estimate-only and --calibrate")
    if not measured_before and not torch.cuda.is_available():
        parser.error("steps are measured on a GPU, and PyTorch finds none")
    report = json.loads(file.read_text("utf-8")) if measured_before else measure_all(plans, args, file)
    if not args.calibrate:
        for row in report["rows"]:
            row.update(estimate(row))
        write(args.output, "memory", report, markdown(report))
        print(markdown(report))
    calibrate(report["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
