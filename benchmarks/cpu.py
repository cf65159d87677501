"""Training and inference step of LGMSNet against nnU-Net's own U-Net on the CPU, in turns in one process.

    python benchmarks/cpu.py [--threads 2] [--rounds 7] [--output benchmarks/results]

The networks take turns, so that other work on the machine slows both; a ratio is the median of the rounds' ratios. The
U-Net has the stages that nnU-Net plans for the patch. float32, no compilation, as nnU-Net does on the CPU; each with
the SGD of its own trainer. Writes cpu.json and cpu.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from compared import NETWORKS, build, parameters, training_step
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


def make_step(name: str, row: dict) -> TrainingStep | InferenceStep:
    """One network's step on one input."""
    device, about = torch.device("cpu"), (row["input"], row["classes"], row["n_stages"])
    if row["train"]:
        return training_step(build(name, *about), *about[:2], device)
    return InferenceStep(build(name, *about), row["input"], device)


def measure(row: dict, rounds: int) -> dict:
    """Seconds of the networks, round by round, and the ratio of LGMSNet's to the U-Net's."""
    steps = {name: make_step(name, row) for name in NETWORKS}
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
    rows = []
    for name, row in result["rows"].items():
        low, high = row["ratio_range"]
        ms = (f"{1e3 * row['median'][network]:.0f}" for network in NETWORKS)
        millions = " / ".join(f"{row['parameters'][network] / 1e6:.2f}" for network in NETWORKS)
        rows.append([name, *ms, f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", millions])
    lines = [
        "# LGMSNet against nnU-Net's PlainConvUNet on the CPU",
        "",
        f"{result['date']}, {result['threads']} threads of {result['cpu']}, torch "
        f"{result['versions']['torch']}, float32. Median of {result['rounds']} rounds in turns; the ratio's range in "
        "brackets.",
        "",
        *table("| LGMSNet ms | PlainConvUNet ms | ratio | parameters (M)", rows),
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
