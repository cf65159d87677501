"""What the Triton kernels take of each generation of GPUs, compiled without one.

    nice python benchmarks/offline_kernels.py          to benchmarks/results/offline_kernels.{json,md}
    python benchmarks/offline_kernels.py sm_86 --output FOLDER

The first time it takes minutes a target; Triton keeps what it compiled, so later only what changed does. Launches of
training steps and predictions are noted on the meta device, where tensors have sizes and no numbers. The largest
version of every kernel, by the numbers in its tiles, and the widest convolutions are then compiled for every target
with Triton's own compiler. Shared memory is what a block takes; the stack, bytes of a thread, is where registers spill,
as `cuobjdump` tells it. tests/test_offline_kernels.py holds both under the bounds below.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from record import command_line, provenance, table, write
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.ops import backend, launch
from nnunet_lgms.ops.compiling import AbsentDriver, function_of
from nnunet_lgms.ops.triton import (
    attention,
    attention_kernels,
    bottleneck_kernels,
    conv_kernels,
    conv_weight_kernels,
    depthwise,
    device,
    norm_act_kernels,
    softmax_sums,
    sums,
)
from nnunet_lgms.planning.memory import OnGPU

SMALL_KERNELS = ("_conv_band_kernel", "_conv_weight_reduce_kernel", "_depthwise_band_kernel")  # whatever is convolved


class Card(NamedTuple):
    """A target of the compiler: bytes of shared memory that a block can have, and GPUs of that kind."""

    shared_memory: int
    examples: str


CARDS = {
    "sm_80": Card(163 << 10, "A100"),
    "sm_86": Card(99 << 10, "RTX 30, A10, A40"),
    "sm_89": Card(99 << 10, "RTX 40, L4, L40S"),
    "sm_90": Card(227 << 10, "H100, H200"),
    "sm_100": Card(227 << 10, "B200"),
    "sm_120": Card(99 << 10, "RTX 50"),
}
NETWORKS = (  # the published ones: dim, channels, classes, training batch
    (3, 1, 4, (2, 1, 128, 128, 128)),
    (2, 3, 2, (16, 3, 256, 256)),
)


class Version(NamedTuple):
    """A kernel with what its compilation depends on, as the table has them.

    Attributes:
        kernel: module:name.
        call: JSON of the arguments, where a tensor is the name of its dtype, and of the options.
    """

    kernel: str
    call: str

    @classmethod
    def of(cls, kernel: Any, arguments: tuple, options: tuple) -> Version:
        function = function_of(kernel)
        names = [str(a) if isinstance(a, torch.dtype) else a for a in arguments]
        return cls(f"{function.fn.__module__}:{function.fn.__name__}", json.dumps([names, options]))

    @property
    def name(self) -> str:
        return self.kernel.rpartition(":")[2]

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(self.kernel.partition(":")[0]), self.name)

    def read(self) -> tuple[list, dict[str, Any]]:
        """The arguments, dtypes among them, and the options."""
        arguments, options = json.loads(self.call)
        tensors = [isinstance(a, str) and a.startswith("torch.") for a in arguments]
        return [getattr(torch, a[6:]) if t else a for a, t in zip(arguments, tensors, strict=True)], dict(options)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor."""
        return next(a for a in self.read()[0] if isinstance(a, torch.dtype))

    @property
    def size(self) -> tuple[int, str]:
        """Grows with the tiles, which are constants to the compiler, and with the width of their numbers."""
        arguments, options = self.read()
        places = zip(self.function.params, arguments, strict=False)
        constants = {place.name: a for place, a in places if place.is_constexpr} | options
        tiles = [v for k, v in constants.items() if isinstance(v, int) and v > 1 and k != "num_warps"]
        return math.prod(tiles) * self.dtype.itemsize, self.call


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
def noting(shared_memory: int, major: int) -> Iterator[list[Version]]:
    """Inside, launches are noted in the list, as on a GPU of such capability and shared memory for a block."""
    versions: list[Version] = []
    with (
        patch.object(device, "sizes", lambda _: device.Device(108, shared_memory)),
        patch.object(bottleneck_kernels, "capability", lambda _: (major, 0)),
        patch.object(norm_act_kernels, "capability", lambda _: (major, 0)),
        patch.object(launch._here, "asked_for", {}) as asked_for,
    ):
        yield versions
    versions += dict.fromkeys(Version.of(*asked) for asked in asked_for)


def step_versions(
    network: LGMSNet, shape: tuple[int, ...], half: bool, shared_memory: int, major: int
) -> list[Version]:
    """What a training step in float16, or in float32, and a prediction launch."""
    with noting(shared_memory, major) as versions, backend.as_on_gpu(), _Following():
        for training in (True, False):
            network.train(training)
            x = torch.empty(shape if training else (1, *shape[1:]), device="meta")
            with torch.set_grad_enabled(training), OnGPU() if half else nullcontext():
                out = network(x)
            if training:
                out.float().sum().backward()
    return versions


def widest_versions(shared_memory: int, major: int) -> list[Version]:
    """Convolutions, attention and losses at the limits of their kernels, and what several processes launch."""
    with noting(shared_memory, major) as versions:
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
        for classes, dtype in ((3, torch.float16), (14, torch.float16), (105, torch.float16), (256, torch.float32)):
            contiguous = torch.empty((2, classes, 32, 128, 128), dtype=dtype, device="meta")
            for x in (contiguous, contiguous.to(memory_format=torch.channels_last_3d)):
                labels = torch.empty((2, 1, 32, 128, 128), dtype=torch.int16, device="meta")
                softmax_sums.softmax_sums(x.requires_grad_(), labels, classes).sum().backward()
        for channels, dtype in (
            (128, torch.float16),
            (128, torch.float32),
            (norm_act_kernels.MAX_CHANNELS, torch.float16),
        ):
            grad = torch.empty((2, channels, 32, 64, 64), dtype=dtype, device="meta")
            grad = grad.to(memory_format=torch.channels_last_3d)
            for x in (grad, grad.contiguous()):
                for activation in ("gelu_first", "silu"):
                    norm = norm_act_kernels.Norm(*norm_act_kernels.moments(x, "batch", 1, activation), None, None, 1e-5)
                    norm_act_kernels.backward(grad, x, norm, "batch", 1, activation)
                sums.sum_of_voxels(x)
        norm_act_kernels.merge_processes(torch.empty((8, 3, 256), device="meta"), 0)
    return [v for v in versions if v.name not in SMALL_KERNELS]


def largest(versions: list[Version]) -> list[Version]:
    """Of every kernel the largest version for each dtype of its first tensor."""
    best: dict[tuple, Version] = {}
    for version in sorted(versions, key=lambda version: version.size):
        best[version.name, version.dtype] = version
    return list(best.values())


@cache
def collect(shared_memory: int, major: int) -> list[Version]:
    """The versions that are compiled for GPUs of such capability, with so much shared memory for a block."""
    noted: list[Version] = []
    for dim, channels, classes, shape in NETWORKS:
        for half in (True, False):
            with torch.device("meta"):
                network = LGMSNet.paper(channels, classes, dim)
            noted += step_versions(network, shape, half, shared_memory, major)
    return list(dict.fromkeys([*largest(noted), *widest_versions(shared_memory, major)]))


def capability(target: str) -> int:
    """86 of "sm_86"."""
    return int(target.removeprefix("sm_"))


@contextmanager
def compiling_for(target: str) -> Iterator[None]:
    before = dict(vars(driver))
    driver.set_active(AbsentDriver(GPUTarget("cuda", capability(target), 32)))
    try:
        yield
    finally:
        vars(driver).update(before)


def needs(version: Version) -> dict[str, int]:
    """Bytes of shared memory of a block and of stack of a thread, for the target in force."""
    arguments, options = version.read()
    compiled = version.function.warmup(*arguments, grid=(1,), **options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {"shared": compiled.metadata.shared, "stack": int(re.search(r"STACK:(\d+)", said)[1])}


def markdown(report: dict[str, Any]) -> str:
    """A row a kernel, its largest shared memory and stack for each target."""
    compiled: dict[str, list[dict]] = {}  # what the versions of a kernel need
    for entry in report["compiled"]:
        compiled.setdefault(entry["kernel"].rpartition(":")[2], []).append(entry["needs"])
    rows = []
    for kernel, versions in sorted(compiled.items()):
        cells = [f"`{kernel}`"]
        for target in CARDS:
            here = [version[target] for version in versions if target in version]
            shared, spilt = (max((need[what] for need in here), default=0) for what in ("shared", "stack"))
            cells.append(f"{shared:,}" + (f" / {spilt}" if spilt else "") if here else "")
        rows.append(cells)
    rows.append(["**a block can have**", *(f"{card.shared_memory:,}" for card in CARDS.values())])
    lines = [
        "# Kernels compiled offline",
        "",
        f"`python benchmarks/offline_kernels.py`, Triton {report['versions']['triton']}. Bytes of shared memory of a "
        "block; behind a slash bytes of stack of a thread, into which registers spill. The most of a kernel's versions "
        "is shown; all are in the JSON.",
        "",
        *(f"- {target}: {card.examples}" for target, card in CARDS.items()),
        "",
        *table(" | ".join(["kernel", *CARDS]), rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(CARDS)}; all, if none is named")
    args = parser.parse_args()
    torch.set_num_threads(1)
    needed: dict[Version, dict[str, dict[str, int]]] = {}
    for target in args.targets or CARDS:
        began = time.monotonic()
        versions = collect(CARDS[target].shared_memory, capability(target) // 10)
        with compiling_for(target):
            for version in versions:
                needed.setdefault(version, {})[target] = needs(version)
        print(f"{target}: {len(versions)} versions in {time.monotonic() - began:.0f} s", flush=True)
    entries = [{"kernel": v.kernel, "call": v.call, "needs": n} for v, n in needed.items()]
    report = {**provenance("cpu"), "compiled": entries}
    write(args.output, "offline_kernels", report, markdown(report))


if __name__ == "__main__":
    main()
