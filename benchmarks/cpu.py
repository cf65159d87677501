"""Training and inference step of LGMSNet against nnU-Net's own U-Net on the CPU, in turns in one process.

    python benchmarks/cpu.py [--threads 2] [--rounds 7] [--output benchmarks/results]

The networks take turns, so that other work on the machine slows all; a ratio is the median of the rounds' ratios. For
inference, nnU-Net's ResEnc M takes part as well. U-Nets have the number of stages that nnU-Net plans for the patch.
float32, no compilation, as nnU-Net does on the CPU; each with the SGD of its own trainer. Writes cpu.json and cpu.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from compared import build, loss_function, parameters
from record import command_line, processor, provenance, table, write
from timing import milliseconds
from tqdm import tqdm

from nnunet_lgms.planning.training_step import InferenceStep, TrainingStep

ROWS = {
    "training step, 3D 2 x 32^3": {"input": (2, 1, 32, 32, 32), "classes": 3, "n_stages": 4, "train": True},
    "training step, 2D 16 x 64^2": {"input": (16, 3, 64, 64), "classes": 1, "n_stages": 5, "train": True},
    "inference, 3D 96^3": {"input": (1, 1, 96, 96, 96), "classes": 14, "n_stages": 6, "train": False},
    "inference, 2D 256^2": {"input": (1, 3, 256, 256), "classes": 1, "n_stages": 7, "train": False},
}
COMPARED, BESIDE = ("lgmsnet", "plain"), ("resenc_m",)


def make_step(name: str, row: dict) -> TrainingStep | InferenceStep:
    """One network's step on one input."""
    shape, device = row["input"], torch.device("cpu")
    torch.manual_seed(0)
    network = build(name, len(shape) - 2, shape[1], row["classes"], row["n_stages"])
    if not row["train"]:
        return InferenceStep(network, shape, device)
    target = torch.randint(0, max(row["classes"], 2), (shape[0], *shape[2:]))
    return TrainingStep(network.train(), loss_function, torch.randn(shape), target)


def measure(row: dict, rounds: int) -> dict:
    """Seconds of the networks, round by round, and the ratio of LGMSNet's to the U-Net's."""
    steps = {name: make_step(name, row) for name in COMPARED + (() if row["train"] else BESIDE)}
    for step in steps.values():
        step()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, torch.device("cpu")) / 1e3)
    ratios = [a / b for a, b in zip(times["lgmsnet"], times["plain"], strict=True)]
    return {
        "seconds": times,
        "median": {name: statistics.median(t) for name, t in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "parameters": {name: parameters(step.network) for name, step in steps.items()},
    }


def markdown(result: dict) -> str:
    measured = dict.fromkeys(name for row in result["rows"].values() for name in row["median"])
    beside = [name for name in measured if name not in COMPARED]
    rows = []
    for name, row in result["rows"].items():
        ms = {network: f"{1e3 * seconds:.0f}" for network, seconds in row["median"].items()}
        low, high = row["ratio_range"]
        cells = [name, *(ms[n] for n in COMPARED), f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        cells += [ms.get(n, "") for n in beside]
        rows.append([*cells, " / ".join(f"{n / 1e6:.2f}" for n in row["parameters"].values())])
    columns = " | ".join([*(f"{n} ms" for n in COMPARED), "ratio", *(f"{n} ms" for n in beside), "parameters (M)"])
    lines = [
        "# LGMSNet against nnU-Net's PlainConvUNet on the CPU",
        "",
        f"{result['date']}, {result['threads']} threads of {result['cpu']}, torch "
        f"{result['versions']['torch']}, float32. Median of {result['rounds']} rounds in turns; the ratio's range in "
        "brackets.",
        "",
        *table(f"| {columns}", rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    result = {
        "threads": args.threads,
        "rounds": args.rounds,
        "cpu": processor(),
        **provenance("cpu"),
        "rows": {name: measure(row, args.rounds) for name, row in tqdm(ROWS.items(), unit="row")},
    }
    write(args.output, "cpu", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
