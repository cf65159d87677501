"""Peak memory of a training step: what the planner estimates beside what a GPU needs.

    python benchmarks/memory.py                        every plan, compiled and eager, to benchmarks/results/
    python benchmarks/memory.py --estimate-only        the estimates, without a GPU
    python benchmarks/memory.py --calibrate FILE.json  constants for nnunet_lgms/planning/memory.py from such a table

Every plan runs in a process of its own, several at a time: the memory that PyTorch allocates is counted per process. A
step is what nnU-Net does: batch to the GPU, autocast to float16, loss, scaled backward pass, clipping at 12, SGD with
momentum. As in nnU-Net, network and Dice are compiled and cuDNN searches for its fastest algorithms.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """One row: what nnU-Net would plan for this spacing, and the settings of LGMSNet."""

    name: str
    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    batch: int
    n_classes: int = 2
    max_pool: int = 99
    settings: dict = field(default_factory=dict)
    channels: int = 1

    def topology(self):
        """Strides and kernels as nnU-Net derives them."""
        from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

        from nnunet_lgms.config.resolve import Topology

        _, strides, kernels, patch, _ = get_pool_and_conv_props(self.spacing, self.patch, 4, self.max_pool)
        return Topology(tuple(int(p) for p in patch), strides, kernels, self.spacing)


PLANS = [
    Plan("2D, 4 levels", (56, 40), (1, 1), 35, 3),
    Plan("2D, 7 levels", (256, 256), (1, 1), 16, 2, channels=3),
    Plan("2D, 3 levels", (256, 256), (1, 1), 12, 4, max_pool=2),
    Plan("2D, anisotropic", (320, 192), (0.6, 1.3), 12, 4),
    Plan(
        "2D, 8 levels, large", (512, 512), (1, 1), 8, 2, settings={"widths": {"1": 32, "2": 64, "3+": 128, "4+": 256}}
    ),
    Plan("3D, 2 levels", (64, 64, 64), (1, 1, 1), 2, 2, max_pool=1),
    Plan("3D, 4 levels", (40, 56, 40), (1, 1, 1), 9, 3),
    Plan("3D, 5 levels", (96, 96, 96), (1, 1, 1), 2, 14, max_pool=4),
    Plan("3D, 6 levels", (128, 128, 128), (1, 1, 1), 2, 4),
    Plan("3D, thick slices", (20, 320, 256), (5, 0.6, 0.6), 2, 4),
    Plan("3D, thick slices, 2", (28, 256, 256), (3, 0.8, 0.8), 2, 2),
    Plan("3D, anisotropic patch", (160, 112, 128), (1, 1, 1), 2, 3),
    Plan("3D, kernels 5 to 11", (96, 96, 96), (1, 1, 1), 4, 2, settings={"lms_kernels": [5, 7, 9, 11]}),
    Plan("3D, small", (128, 128, 128), (1, 1, 1), 4, 2, settings={"widths": {"1": 8, "2": 16, "3+": 32, "4+": 64}}),
]


def estimate(plan: Plan) -> dict:
    """Counted bytes and the planner's estimate."""
    from nnunet_lgms.config import LGMSSettings
    from nnunet_lgms.planning.memory import needed_bytes, trace_training_step
    from nnunet_lgms.planning.override import build_on_meta

    topology = plan.topology()
    network = build_on_meta(LGMSSettings.from_plan(plan.settings), topology, plan.channels, plan.n_classes)
    counted = trace_training_step(network, (plan.batch, plan.channels, *topology.patch_size), plan.n_classes)
    return {"counted": asdict(counted), "estimate": needed_bytes(counted, topology.dim)}


def measure(plan: Plan, compiled: bool) -> dict:
    """Bytes that PyTorch allocated at the peak of a step, on this GPU."""
    from torch import nn

    from nnunet_lgms.architecture.lgmsnet import LGMSNet
    from nnunet_lgms.config import LGMSSettings
    from nnunet_lgms.config.resolve import network_kwargs
    from nnunet_lgms.planning.training_step import TrainingStep

    torch.backends.cudnn.benchmark = True
    topology = plan.topology()
    network = LGMSNet(
        plan.channels,
        plan.n_classes,
        conv_op=nn.Conv2d if topology.dim == 2 else nn.Conv3d,
        **network_kwargs(LGMSSettings.from_plan(plan.settings), topology),
    )
    shape = (plan.batch, plan.channels, *topology.patch_size)
    free_before = torch.cuda.mem_get_info()[0]
    step = TrainingStep(network, shape, plan.n_classes, torch.device("cuda"), compiled)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    first = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    return {
        "steady": torch.cuda.max_memory_allocated(),
        "first": first,
        "reserved": torch.cuda.max_memory_reserved(),
        "free_before": free_before,
    }


def work(index: int, modes: list[str]) -> tuple[int, dict]:
    """One row, in its own process."""
    torch.set_num_threads(1)
    plan = PLANS[index]
    row = {**asdict(plan), "patch": list(plan.topology().patch_size), "levels": plan.topology().n_levels}
    row.update(estimate(plan))
    for mode in modes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            row[mode] = measure(plan, mode == "compiled")
        except Exception as error:  # the other rows are still worth having
            row[mode] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return index, row


def table(rows: list[dict], heading: str) -> str:
    """The rows in Markdown, with the deviation of the estimate from the steady peak."""
    lines = [
        heading,
        "",
        "All in MiB; first: the peak of the first steps, when cuDNN tries algorithms; reserved: what PyTorch held.",
        "",
        "| plan | patch | batch | levels | estimate | compiled | deviation | eager | first | reserved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compiled, eager = row.get("compiled", {}), row.get("eager", {})
        measured = compiled.get("steady")
        cells = [
            row["name"],
            "x".join(map(str, row["patch"])),
            row["batch"],
            row["levels"],
            _mib(row["estimate"]),
            _mib(measured),
            f"{100 * (row['estimate'] / measured - 1):+.1f} %" if measured else "",
            _mib(eager.get("steady")),
            _mib(compiled.get("first")),
            _mib(compiled.get("reserved")),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _mib(n: int | None) -> str:
    return "" if n is None else f"{n / MIB:.0f}"


def calibrate(rows: list[dict]) -> None:
    """Prints the constants that make the largest relative deviation smallest, per dimension."""
    from scipy.optimize import linprog

    for dim in (2, 3):
        those = [r for r in rows if len(r["patch"]) == dim and r.get("compiled", {}).get("steady")]
        if not those:
            continue
        # |static + fixed + slope * activations - measured| <= worst * measured, in MiB
        a, b = [], []
        for r in those:
            static, counted, measured = (
                r["counted"]["static"] / MIB,
                r["counted"]["activations"] / MIB,
                r["compiled"]["steady"] / MIB,
            )
            a += [[counted, 1, -measured], [-counted, -1, -measured]]
            b += [measured - static, static - measured]
        slope, fixed, worst = linprog([0, 0, 1], a, b, bounds=[(0, None), (0, None), (0, None)]).x
        print(f"{dim}D: activations={slope:.3f}, fixed={fixed:.0f} MiB; largest deviation {100 * worst:.1f} %")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table (benchmarks/results)")
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--workers", type=int, default=7, help="plans at a time")
    parser.add_argument("--estimate-only", action="store_true")
    parser.add_argument("--calibrate", type=Path, metavar="FILE")
    args = parser.parse_args()

    if args.calibrate:
        calibrate(json.loads(args.calibrate.read_text())["rows"])
        return 0
    if args.estimate_only:
        rows = [
            {**asdict(p), "patch": p.topology().patch_size, "levels": p.topology().n_levels, **estimate(p)}
            for p in PLANS
        ]
        print(table(rows, "Estimates only"))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/memory.py measures on a GPU and finds none: add --estimate-only.", file=sys.stderr)
        return 2

    rows: dict[int, dict] = {}
    context = multiprocessing.get_context("spawn")
    # dearest first, so that no long one is left for the end
    order = sorted(range(len(PLANS)), key=lambda i: -PLANS[i].topology().n_levels)
    with ProcessPoolExecutor(args.workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(work, i, args.modes) for i in order]
        for done, future in enumerate(as_completed(futures), start=1):
            index, row = future.result()
            rows[index] = row
            print(f"[{done}/{len(PLANS)}] {row['name']}: {json.dumps({m: row[m] for m in args.modes})}", flush=True)
    ordered = [rows[i] for i in sorted(rows)]
    properties = torch.cuda.get_device_properties(0)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": properties.name,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    }
    heading = "Peak memory of a training step, " + ", ".join(f"{k} {v}" for k, v in about.items())
    args.out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps({**about, "rows": ordered}, indent=1)), (".md", table(ordered, heading))):
        temporary = args.out / f".memory{suffix}"
        temporary.write_text(text)
        os.replace(temporary, args.out / f"memory{suffix}")
    print(table(ordered, heading))
    calibrate(ordered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
