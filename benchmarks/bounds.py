"""What bounds LGMSNet's steps: the bytes that their kernels must move, and how long the memory of an H200 takes for it.

    python benchmarks/bounds.py          to benchmarks/results/bounds.{json,md}; needs no GPU

A step runs on PyTorch's meta device as on a GPU. Every kernel is counted once for each of its tensors, read or written,
however small; what the backward pass makes again counts again. A map of less than the 50 MB of the second-level cache
may not reach the memory at all, and a kernel that reads a neighbourhood reads more, so this is a measure and no proof.
Measured times are those of gpu.json.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compared import training_step
from gpu import CASES
from record import RESULTS, command_line, provenance, table, write
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.utils._pytree import tree_leaves

from nnunet_lgms import LGMSNet
from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.planning.memory import OnGPU, Watched

BANDWIDTH = 4.3e12  # bytes a second that a copy on an H200 reads and writes
UPDATE = 5 * 4  # bytes of a parameter: gradient, weight and momentum are read, the last two written
MEMORY_ONLY = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
SHOWN = 6  # kernels of a step


class Traffic(Watched):
    """Counts the bytes of the tensors that each kernel inside is given and gives, by the kernel's name."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = self.launches.total()
        out = super().__torch_dispatch__(function, types, args, kwargs)
        is_custom = not isinstance(function, HigherOrderOperator) and function._schema.name in OPDEFS
        if is_custom and self.launches.total() == before:  # its description launches nothing
            self._count(function._schema.name, (args, kwargs, out))
        return out

    def see(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(function, HigherOrderOperator):
            self._count(kernel_side_table.get_kernel(kwargs["kernel_idx"]).fn.__name__, (args, kwargs))
            return
        name = function._schema.name
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in given]
        if name not in MEMORY_ONLY and (made or function._schema.is_mutable):  # no view
            self._count(name, (args, kwargs, made))

    def _count(self, name: str, tensors: Any) -> None:
        self.bytes[name] += sum(t.numel() * t.element_size() for t in _tensors(tensors))
        self.launches[name] += 1


def _tensors(tree: Any) -> list[Tensor]:
    """Each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def count(case: str) -> dict[str, dict]:
    """Bytes and launches of a prediction and of a training step of the published network, by kernel."""
    shape, classes, _ = CASES[case].values()
    with torch.device("meta"):
        network = LGMSNet.paper(shape[1], classes, len(shape) - 2)
    step = training_step(network, shape, classes, torch.device("meta"))
    steps = {}
    with as_on_gpu():
        network.eval()
        with torch.no_grad(), Traffic() as prediction, OnGPU():
            network(step.data)
        steps["prediction"] = prediction
        network.train()
        with Traffic() as training:
            with OnGPU():
                loss = step.loss_function(network(step.data), step.target)
            loss.backward()
        steps["training step"] = training
    training.bytes["update of the weights"] = UPDATE * sum(p.numel() for p in network.parameters())
    return {name: {"bytes": dict(t.bytes), "launches": t.launches.total()} for name, t in steps.items()}


def markdown(results: dict) -> str:
    rows, kernels = [], []
    for row in results["rows"]:
        total = sum(row["bytes"].values())
        bound = total / results["bandwidth"] * 1e3
        name = f"{row['case'].upper()} {row['step']}"
        rows.append(
            [name, row["launches"], f"{total / 1e9:.1f}", f"{bound:.1f}", row["ms"], f"{bound / row['ms']:.2f}"]
        )
        most = sorted(row["bytes"].items(), key=lambda item: -item[1])[:SHOWN]
        kernels.append([name, ", ".join(f"{kernel.strip('_')} {n / total:.0%}" for kernel, n in most)])
    return "\n".join(
        [
            f"What bounds LGMSNet's steps: bytes that kernels move, at the {results['bandwidth'] / 1e12:.1f} TB/s of a "
            "copy on an H200, counted without a GPU by `benchmarks/bounds.py`. Times are those of [gpu.md](gpu.md).",
            "",
            *table("step | kernels | GB | ms for these | ms measured | share", rows),
            "",
            *table("step | most bytes", kernels),
            "",
        ]
    )


def measured(file: Path, case: str, key: str) -> float:
    """The median in ms of the published network as graphs."""
    of_row = {(row["case"], row["network"], row["mode"]): row for row in json.loads(file.read_text())}
    return round(of_row[case, "lgmsnet", "graphs"][key][0], 1)


def main(arguments: Sequence[str] | None = None) -> int:
    args = command_line(__doc__).parse_args(arguments)
    results = {**provenance("cpu"), "bandwidth": BANDWIDTH, "rows": []}
    for case in CASES:
        for (step, counted), key in zip(count(case).items(), ("infer_ms", "train_ms"), strict=True):
            ms = measured(RESULTS / "gpu.json", case, key)
            results["rows"].append({"case": case, "step": step, "ms": ms, **counted})
    write(args.output, "bounds", results, markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
