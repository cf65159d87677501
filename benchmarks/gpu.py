"""Time and memory of training and inference steps on a GPU, LGMSNet beside nnU-Net's U-Net.

    python benchmarks/gpu.py                      every row, to benchmarks/results/gpu.{json,md}
    python benchmarks/gpu.py --networks lgmsnet plain --modes trained       each as its own trainer runs it
    python benchmarks/gpu.py --sweep              how the cost grows with the size, also as a picture
    python benchmarks/gpu.py --row 3d lgmsnet graphs                        one row, one line of JSON

A training step is that of the trainers: autocast to float16, loss, scaled backward pass, clipping at 12, and the SGD of
the network's own trainer. Networks run as nnU-Net's trainer runs them ("compiled"), as LGMSNet's trainers do on one GPU
("graphs": passes and update recorded as CUDA graphs), or as they are ("eager"). Times are medians of CUDA events after
warm-up, with the 5th and 95th percentile; the memory is what PyTorch allocated at the peak of a step, with what graphs
hold; the first step includes all that comes before it, compiling or recording; x is the ratio to PlainConvUNet,
compiled.

Every row runs in a process of its own with empty compiler caches. The rows of a batch (--jobs) compile side by side;
when all of them have, they are timed one after the other, so nothing else uses the GPU or the CPU then. The table is
written after every row, so a run that is cut short leaves what it has measured; rows of earlier runs stay until they
are measured again, and have no ratio to another run's.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from commands import last_json
from compared import NETWORKS, build, parameters, training_step
from matplotlib.figure import Figure
from record import command_line, provenance, table, write
from timing import median_ms, synchronize
from tqdm import tqdm

from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.graphs.step import autocast
from nnunet_lgms.planning.training_step import WARM_UP, peak_memory

CASES = {  # stages: what nnU-Net plans for the patch
    "3d": {"input": (2, 1, 128, 128, 128), "classes": 4, "n_stages": 6},
    "2d": {"input": (16, 3, 256, 256), "classes": 1, "n_stages": 7},
}
SIZES = {"3d": (64, 96, 128, 160, 192), "2d": (128, 256, 512, 1024)}
REFERENCE = ("plain", "compiled")
MODES = ("graphs", "compiled", "eager")
AS_TRAINED = {"lgmsnet": "graphs", "plain": "compiled"}  # how a network's own trainer runs it on one GPU


def peak_gib(step, device: torch.device) -> float | None:
    """GiB of PyTorch's tensors at the peak of a step, with what CUDA graphs keep to themselves."""
    for _ in range(WARM_UP):  # predictions record their graph in the third, the update of the weights is the last
        step()
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return peak_memory() / 2**30


def wait_for_turn() -> None:
    """Tells the process that started this one that all is compiled, and waits for its word."""
    print("ready", flush=True)
    sys.stdin.readline()


def measure(case: str, name: str, mode: str, size: int | None, turn: Callable[[], None]) -> dict:
    """All figures of one network on one input.

    Args:
        case: of ``CASES``.
        name: of the network.
        mode: how it runs.
        size: voxels per axis, if not those of the case.
        turn: returns when no other row is timed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, classes, n_stages = CASES[case].values()
    shape = shape if size is None else (*shape[:2], *(size,) * (len(shape) - 2))
    torch.backends.cudnn.benchmark = True
    if mode == "graphs":
        torch.manual_seed(0)
        network = GraphedLGMSNet.paper(shape[1], classes, len(shape) - 2)
    else:
        network = build(name, shape, classes, n_stages)
    train = training_step(network, shape, classes, device)

    def infer():
        with torch.inference_mode(), autocast(device):
            train.network(train.data)

    begin = time.perf_counter()
    if mode != "eager":
        train.make_fast()
    train()
    synchronize(device)
    row = {
        "case": case,
        "network": name,
        "mode": mode,
        "input": shape,
        "parameters": parameters(network),
        "first_step_s": time.perf_counter() - begin,
        **provenance(),
    }
    row["train_gib"] = peak_gib(train, device)
    train.optimizer.zero_grad(set_to_none=True)
    network.eval()
    if mode == "graphs":
        network.forget_graphs()  # the training's hold memory
        train.recorded_update = None
    infer()
    row["infer_gib"] = peak_gib(infer, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for those that are still compiling
    turn()
    row["infer_ms"] = median_ms(infer, device, warmup=WARM_UP)
    network.train()
    if mode == "graphs":
        train.make_fast()
    row["train_ms"] = median_ms(train, device, warmup=WARM_UP)
    return row


class Row:
    """A row in a process of its own, with empty compiler caches."""

    def __init__(self, case: str, name: str, mode: str, size: int | None, caches: Path):
        self.about = {"case": case, "network": name, "mode": mode, "size": size}
        self.ready = threading.Event()
        self.late = False
        command = [sys.executable, __file__, "--wait", "--row", case, name, mode]
        command += [] if size is None else ["--size", str(size)]
        caches.mkdir()
        self.log = caches / "log"
        folders = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w"), "text": True}
        self.process = subprocess.Popen(command, env=os.environ | folders, **pipes)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        self.process.stdout.readline()  # "ready", or the end of a process that failed
        self.ready.set()

    def compiled(self, seconds: float) -> None:
        """Waits until it is compiled, or has failed; longer than ``seconds`` is too late."""
        self.late = not self.ready.wait(max(seconds, 0))
        if self.late:
            self.process.kill()

    def result(self) -> dict:
        """Lets it run; its row, or what went wrong with it."""
        out, _ = self.process.communicate("go\n")
        if self.process.returncode == 0:
            return last_json(out, 0) | self.about
        said = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
        return {**self.about, "failed": "not compiled in time" if self.late else said[-1][:300]}


def earlier_rows(path: Path, jobs: list[tuple]) -> list[dict]:
    """Those that this run does not measure."""
    rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return [row for row in rows if (row["case"], row["network"], row["mode"], row["size"]) not in jobs]


def markdown(rows: list[dict]) -> str:
    """A table with ratios to nnU-Net's own U-Net, compiled, of the same size and run."""

    def same(row: dict) -> tuple:
        return row["case"], row["run"], row["size"]

    references = {same(row): row for row in rows if "failed" not in row and (row["network"], row["mode"]) == REFERENCE}
    lines = []
    for row in rows:
        cells = [row["case"], row["network"], row["mode"]]
        if "failed" in row:
            lines.append([*cells, row["failed"]])
            continue
        reference = references.get(same(row))
        cells += [f"{row['parameters'] / 1e6:.2f} M", row["input"][-1]]
        for key in ("train_ms", "infer_ms"):
            median, low, high = row[key]
            cells.append(f"{median:.1f} ({low:.1f} to {high:.1f})")
            cells.append(f"{median / reference[key][0]:.2f}" if reference else "")
        gib = row["train_gib"]
        cells += [f"{gib:.2f}", f"{gib / reference['train_gib']:.2f}" if reference else ""] if gib else ["", ""]
        lines.append([*cells, f"{row['first_step_s']:.0f}", row["run"]])
    times = "train ms (5 to 95 %) | × | infer ms (5 to 95 %) | ×"
    columns = f"case | network | | parameters | voxels per axis | {times} | GiB | × | first s | run"
    return "\n".join(table(columns, lines)) + "\n"


def draw_sweep(rows: list[dict], path: Path) -> None:
    """Three panels for each case: lines over the size, a colour for each network."""
    columns = {"train_ms": "training step, ms", "infer_ms": "inference, ms", "train_gib": "training, GiB"}
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    figure = Figure(figsize=(12, 3 * len(cases)), layout="tight")
    axes = figure.subplots(len(cases), len(columns), squeeze=False)
    for case, panels in zip(cases, axes):
        those = sorted((row for row in rows if row["case"] == case), key=lambda row: row["size"])
        sizes = sorted({row["size"] for row in those})
        for (key, title), axis in zip(columns.items(), panels):
            for network, mode in dict.fromkeys((row["network"], row["mode"]) for row in those):
                line = [row for row in those if row["network"] == network and row["mode"] == mode and row[key]]
                values = [row[key] if key == "train_gib" else row[key][0] for row in line]
                colour = "C1" if network == "lgmsnet" else "C0"
                axis.loglog(
                    [row["size"] for row in line], values, "o-", color=colour, label=f"{NETWORKS[network]}, {mode}"
                )
            axis.set_title(f"{case}: {title}", fontsize=9)
            axis.set_xlabel("voxels per axis", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.set_xticks(sizes, map(str, sizes))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120, format="png")


def write_rows(rows: list[dict], out: Path, name: str, sweep: bool) -> None:
    done = [row for row in rows if "failed" not in row]
    devices = sorted({f"{row['device']}, torch {row['versions']['torch']}" for row in done}) or ["no row"]
    latest = max(row["run"] for row in rows)
    heading = f"{'; '.join(devices)}; float16 autocast; latest run {latest}, × within a run\n\n"
    rows = sorted(rows, key=lambda row: (list(CASES).index(row["case"]), MODES.index(row["mode"])))
    picture = (lambda file: draw_sweep(done, file)) if done and sweep else None
    write(out, name, rows, heading + markdown(rows), picture)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "trained"], default=list(MODES))
    parser.add_argument("--jobs", type=int, default=20, help="rows that compile side by side (20, all)")
    parser.add_argument("--compile-seconds", type=float, default=400, help="given to a batch, then it is timed (400)")
    parser.add_argument("--sweep", action="store_true", help="sizes in place of modes")
    parser.add_argument("--row", nargs=3, metavar=("CASE", "NETWORK", "MODE"), help="measure this row alone")
    parser.add_argument("--size", type=int, help="with --row: voxels per axis")
    parser.add_argument("--wait", action="store_true", help="with --row: wait for a line of input before timing")
    args = parser.parse_args(arguments)
    if args.row:
        print(json.dumps(measure(*args.row, args.size, wait_for_turn if args.wait else lambda: None)))
        return 0
    if args.sweep:
        jobs = [(c, n, AS_TRAINED[n], size) for c in args.cases for size in SIZES[c] for n in args.networks]
    else:
        modes = [(n, AS_TRAINED[n] if m == "trained" else m) for m in args.modes for n in args.networks]
        jobs = [(c, *m, None) for m in dict.fromkeys(modes) if m != ("plain", "graphs") for c in args.cases]
    name = "gpu_sweep" if args.sweep else "gpu"
    run = datetime.datetime.now().isoformat(timespec="minutes")
    rows = earlier_rows(args.output / f"{name}.json", jobs)
    with tempfile.TemporaryDirectory() as caches, tqdm(total=len(jobs), desc="rows") as progress:
        for first in range(0, len(jobs), args.jobs):
            batch = [Row(*job, Path(caches) / "-".join(map(str, job))) for job in jobs[first : first + args.jobs]]
            compile_until = time.monotonic() + args.compile_seconds
            for row in batch:
                row.compiled(compile_until - time.monotonic())
            for row in batch:
                rows.append({"run": run, **row.result()})
                write_rows(rows, args.output, name, args.sweep)
                tqdm.write(json.dumps(rows[-1]))
                progress.update()
    return 0


if __name__ == "__main__":
    sys.exit(main())
