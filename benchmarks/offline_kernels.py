"""What the Triton kernels take of each generation of GPUs, compiled without one.

    nice python benchmarks/offline_kernels.py          to benchmarks/results/offline_kernels.{json,md}, minutes
    python benchmarks/offline_kernels.py sm_86 --out FOLDER
    python benchmarks/offline_kernels.py --missing     only what the table does not have: not after changes of a kernel

Launches of training steps and predictions are noted on the meta device, where tensors have sizes and no numbers. The
largest version of every kernel, by the numbers in its tiles, and the widest convolutions are then compiled for every
target with Triton's own compiler. Shared memory is what a block takes; the stack, bytes of a thread, is where registers
spill, as `cuobjdump` tells it. tests/test_offline_kernels.py holds both under the bounds below.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from record import RESULTS, provenance, write
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.ops import backend, launch
from nnunet_lgms.ops.triton import (
    attention,
    attention_kernels,
    conv_kernels,
    conv_weight_kernels,
    depthwise,
    norm_act_kernels,
)
from nnunet_lgms.planning.memory import OnGPU

SMALL, LARGE = "99 KiB", "163 KiB and more"  # of shared memory: the depthwise weight gradient has tiles for either

SMALL_KERNELS = ("_conv_band_kernel", "_conv_weight_reduce_kernel", "_depthwise_band_kernel")  # whatever is convolved


class Card(NamedTuple):
    """A target of the compiler: bytes of shared memory that a block can have, and GPUs of that kind."""

    shared_memory: int
    tiles: str
    examples: str


CARDS = {
    "sm_80": Card(163 << 10, LARGE, "A100"),
    "sm_86": Card(99 << 10, SMALL, "RTX 30, A10, A40"),
    "sm_89": Card(99 << 10, SMALL, "RTX 40, L4, L40S"),
    "sm_90": Card(227 << 10, LARGE, "H100, H200"),
    "sm_100": Card(227 << 10, LARGE, "B200"),
    "sm_120": Card(99 << 10, SMALL, "RTX 50"),
}


class Version(NamedTuple):
    """A kernel with what its compilation depends on; tensors are given by the name of their dtype."""

    kernel: str  # module:name
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, arguments: tuple, options: tuple) -> Version:
        function = kernel if hasattr(kernel, "fn") else kernel.kernel  # within what `wrap_triton` gives
        names = tuple(str(a) if isinstance(a, torch.dtype) else a for a in arguments)
        return cls(f"{function.fn.__module__}:{function.fn.__name__}", names, options)

    @classmethod
    def read(cls, kernel: str, call: str) -> Version:
        """From the table."""
        arguments, options = json.loads(call)
        return cls(kernel, tuple(arguments), tuple((name, value) for name, value in options))

    @property
    def call(self) -> str:
        """Arguments and options, for the table."""
        return json.dumps([self.arguments, self.options])

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]

    @property
    def function(self) -> Any:
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are known to the compiler: by keyword or in the places that are declared so."""
        parameters = self.function.params
        given = {p.name: a for p, a in zip(parameters, self.arguments, strict=False) if p.is_constexpr}
        return given | dict(self.options)

    @property
    def size(self) -> tuple[int, str]:
        """Grows with the tiles, and with the width of their numbers."""
        sizes = [v for k, v in self.constants.items() if isinstance(v, int) and v > 1 and k != "num_warps"]
        bits = [dtype.itemsize for a in self.arguments if (dtype := _dtype(a)) is not None]
        return math.prod(sizes) * max(bits[:1], default=1), repr(self)

    def compiled(self) -> Any:
        arguments = [argument if _dtype(argument) is None else _dtype(argument) for argument in self.arguments]
        return self.function.warmup(*arguments, grid=(1,), **dict(self.options))


def _dtype(argument: Any) -> torch.dtype | None:
    """The dtype of a tensor that is an argument; None of other arguments."""
    is_tensor = isinstance(argument, str) and argument.startswith("torch.")
    return getattr(torch, argument.removeprefix("torch.")) if is_tensor else None


class _Following(TorchDispatchMode):
    """Custom operators are run as on a GPU, so that the launches in them are seen; what is launched is only noted."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):
            return None
        definition = OPDEFS.get(function._schema.name)
        if definition is not None and function._schema.name.startswith("nnunet_lgms::"):
            with self:
                return definition._init_fn(*args, **kwargs)
        return function(*args, **kwargs)


@contextmanager
def noting(tiles: str) -> Iterator[list[Version]]:
    """Inside, launches are noted in the list, with the tiles of such GPUs."""
    versions: list[Version] = []
    device = depthwise._Device(108, 99 << 10 if tiles == SMALL else 163 << 10)
    with patch.object(depthwise, "_device", lambda _: device), patch.object(launch, "_asked_for", {}) as asked_for:
        yield versions
    versions += dict.fromkeys(Version.of(*asked) for asked in asked_for)


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """The published networks, with their training batches."""
    return {
        "3d": (lambda: LGMSNet.paper(1, 4, 3), (2, 1, 128, 128, 128)),
        "2d": (lambda: LGMSNet.paper(3, 2, 2), (16, 3, 256, 256)),
    }


def step_versions(make: Callable[[], nn.Module], shape: tuple[int, ...], half: bool, tiles: str) -> list[Version]:
    """What a training step in float16, or in float32, and a prediction launch."""
    with torch.device("meta"):
        network = make()
    with noting(tiles) as versions, backend.as_on_gpu(), _Following():
        for training in (True, False):
            network.train(training)
            x = torch.empty(shape if training else (1, *shape[1:]), device="meta")
            with torch.set_grad_enabled(training), OnGPU() if half else nullcontext():
                out = network(x)
            if training:
                out.float().sum().backward()
    return versions


def widest_versions(tiles: str) -> list[Version]:
    """Convolutions and attention at the limits of their kernels, and what several processes launch."""
    with noting(tiles) as versions:
        for kernel in ((3, 3, 3), (1, 3, 3), (3, 1, 3), (3, 3, 1), (1, 1, 1), (3, 3), (1, 1)):
            widest = 64 if kernel[-1] == 1 else 32
            size = (128,) * 3 if len(kernel) == 3 else (1024, 1024)
            for c_in, c_out in ((widest, widest), (widest, widest // 2), (widest // 2, widest), (16, 16)):
                x = torch.empty((2, *size, c_in), dtype=torch.float16, device="meta").movedim(-1, 1)
                weight = torch.empty((c_out, c_in, *kernel), dtype=torch.float16, device="meta")
                conv_kernels.convolve([x], weight, None, 1)
                grad = torch.empty((2, *size, c_out), dtype=torch.float16, device="meta").movedim(-1, 1)
                conv_weight_kernels.weight_gradient(grad, [x], weight, 1)
        with patch.object(depthwise, "_precision", lambda _: "tf32x3"):  # where PyTorch's users forbid tf32
            x = torch.empty((2, 16, 128, 128, 128), device="meta")
            depthwise.convolve(x, x.new_empty(16 * 9**3), [16], [9] * 3, False, False, False)
            depthwise.correlate(x, x, [16], [9] * 3)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            qkv = torch.empty((2, 4096, 3, 4, attention.MAX_CHANNELS), dtype=dtype, device="meta")
            mask = torch.empty((1, 4096), dtype=torch.bool, device="meta")
            out, lse = attention_kernels.forward(qkv, mask, "tf32x3")
            attention_kernels.backward(out, qkv, mask, out, lse, "tf32x3")
        norm_act_kernels.merge_processes(torch.empty((8, 3, 256), device="meta"), 0)
    return [v for v in versions if v.name not in SMALL_KERNELS]


def largest(versions: list[Version]) -> list[Version]:
    """Of every kernel the largest version for each dtype of its first tensor."""
    best: dict[tuple, Version] = {}
    for version in versions:
        key = version.name, next(filter(_dtype, version.arguments), None)
        best[key] = max(best.get(key, version), version, key=lambda v: v.size)
    return list(best.values())


def collect(tiles: str) -> list[Version]:
    """The versions that are compiled for GPUs with such tiles."""
    noted: list[Version] = []
    for make, shape in networks().values():
        for half in (True, False):
            noted += step_versions(make, shape, half, tiles)
    return list(dict.fromkeys([*largest(noted), *widest_versions(tiles)]))


class _Compiler:
    """Triton's driver for a GPU that is not there. Compiled kernels are kept by device: its number is the target's."""

    def __init__(self, target: str):
        self.capability = int(target.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    before = dict(vars(driver))
    driver.set_active(_Compiler(target))
    try:
        yield
    finally:
        vars(driver).update(before)


def needs(version: Version) -> dict[str, int]:
    """Bytes of shared memory and of stack of a version, for the target in force."""
    compiled = version.compiled()
    return {"shared": compiled.metadata.shared, "stack": stack(compiled.asm["cubin"])}


def stack(cubin: bytes) -> int:
    """Bytes of local memory of a thread."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row a kernel, its largest shared memory and stack for each target."""
    lines = ["| kernel | " + " | ".join(CARDS) + " |", "|---|" + "---:|" * len(CARDS)]
    for kernel in sorted({entry["kernel"] for entry in entries}, key=lambda kernel: kernel.rpartition(":")[2]):
        cells = []
        for target in CARDS:
            here = [e["needs"][target] for e in entries if e["kernel"] == kernel and target in e["needs"]]
            shared, spilt = (max((need[what] for need in here), default=0) for what in ("shared", "stack"))
            cells.append(f"{shared:,}" + (f" / {spilt}" if spilt else "") if here else "")
        lines.append(f"| `{kernel.rpartition(':')[2]}` | " + " | ".join(cells) + " |")
    lines.append("| **a block can have** | " + " | ".join(f"{c.shared_memory:,}" for c in CARDS.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(CARDS)}; all, if none is named")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--missing", action="store_true", help="only versions that the table does not have")
    args = parser.parse_args()
    torch.set_num_threads(1)
    collected = {tiles: collect(tiles) for tiles in (SMALL, LARGE)}
    needed: dict[Version, dict[str, dict[str, int]]] = {}
    if args.missing:
        before = json.loads((args.out / "offline_kernels.json").read_text("utf-8"))["compiled"]
        known = {(e["kernel"], e["call"]): e["needs"] for e in before}
        every = dict.fromkeys(version for versions in collected.values() for version in versions)
        needed = {v: dict(known[v.kernel, v.call]) for v in every if (v.kernel, v.call) in known}
    for target in args.targets or CARDS:
        began = time.monotonic()
        versions = collected[CARDS[target].tiles]
        with compiling_for(target):
            for version in versions:
                if target not in needed.setdefault(version, {}):
                    needed[version][target] = needs(version)
        print(f"{target}: {len(versions)} versions in {time.monotonic() - began:.0f} s", flush=True)
    entries = [{"kernel": v.kernel, "call": v.call, "needs": n} for v, n in needed.items()]
    write(args.out, "offline_kernels", {**provenance("cpu"), "compiled": entries}, markdown(entries))


def markdown(entries: list[dict[str, Any]]) -> str:
    kinds = "\n".join(f"- {target}: {card.examples}" for target, card in CARDS.items())
    return f"""# Kernels compiled offline

`python benchmarks/offline_kernels.py`, Triton {triton.__version__}. Bytes of shared memory of a block; behind a slash
bytes of stack of a thread, into which registers spill. The most of a kernel's versions is shown; all are in the JSON.

{kinds}

{table(entries)}
"""


if __name__ == "__main__":
    main()
