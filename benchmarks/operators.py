"""How close each fused operator comes to the bandwidth of the GPU's memory.

    python benchmarks/operators.py          to benchmarks/results/operators.{json,md}

Every operator runs on the maps of LGMSNet's highest level (2 x 128^3 and 16 x 256^2, float16, channels-last), forward,
and forward with backward, in a CUDA graph, so that Python's part is not in the time. The bound is the time in which a
plain copy would move the bytes that must move: inputs, results and gradients once, and once more what a norm reads for
its statistics before it can write. The bandwidth is measured in the same run, on a copy of 1 GiB. Convolutions and the
bottleneck also multiply, so theirs is a bound that arithmetic may forbid.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from record import RESULTS, provenance, write
from timing import bandwidth, graphed, median_ms
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nnunet_lgms.blocks.norm import BATCH_NORM, INSTANCE_NORM
from nnunet_lgms.ops import (
    concatenate,
    linear_upsample,
    max_pool,
    multi_kernel_depthwise,
    norm_act,
    same_conv,
)
from nnunet_lgms.ops.memory_format import CHANNELS_LAST

MAPS = {"3d": (2, (128, 128, 128)), "2d": (16, (256, 256))}
KERNELS = (3, 5, 7, 9)
REPEATS = 10  # calls in a graph, so that its launch does not count


class Operator(NamedTuple):
    """A call on maps of some channels, and how often its maps cross the bus.

    Attributes:
        run: maps -> result.
        maps: (channels, voxels per voxel of the result's level) of each input.
        forward: channels of the full map that must be read or written forward.
        backward: likewise in the backward pass.
    """

    name: str
    run: Callable[..., Tensor]
    maps: tuple[tuple[int, float], ...]
    forward: float
    backward: float


def operators(dim: int, device: torch.device) -> list[Operator]:
    if device.type == "cuda":
        from nnunet_lgms.ops.triton.bottleneck import inverted_bottleneck
    else:
        from nnunet_lgms.ops.cpu.bottleneck import inverted_bottleneck
    conv_op = {2: nn.Conv2d, 3: nn.Conv3d}[dim]
    norm = (lambda c: BATCH_NORM[2](c)) if dim == 2 else (lambda c: INSTANCE_NORM[3](c, affine=False))
    two, small = (2,) * dim, 1 / 2**dim
    depthwise = [conv_op(4, 4, k, groups=4) for k in KERNELS]
    up, point = conv_op(32, 16, 3), conv_op(16, 16, 1)
    norms = {c: norm(c) for c in (16, 32, 64)}
    expand, squeeze = conv_op(32, 64, 1), conv_op(64, 16, 1)
    nn.ModuleList([*depthwise, up, point, *norms.values(), expand, squeeze]).to(device)
    return [
        Operator(
            "depthwise 3, 5, 7, 9 + residual",
            lambda x: multi_kernel_depthwise(x, [c.weight for c in depthwise], [c.bias for c in depthwise], True),
            ((16, 1),),
            2 * 16,
            3 * 16,
        ),
        Operator("norm + SiLU", lambda x: norm_act(x, norms[16], "silu"), ((16, 1),), 3 * 16, 5 * 16),
        Operator("GELU + norm", lambda x: norm_act(x, norms[64], "gelu_first"), ((64, 1),), 3 * 64, 5 * 64),
        Operator(
            "inverted bottleneck 32, 64, 16",
            lambda x: inverted_bottleneck(x, norms[32], expand, norms[64], squeeze),
            ((32, 1),),
            3 * 32 + 16,  # three passes over x, and the result
            2 * (32 + 16) + 32 + 3 * 32,  # two over x and its gradient, then norm1's
        ),
        Operator("convolution 3, 32 to 16", lambda x: same_conv(x, up.weight, up.bias), ((32, 1),), 48, 2 * 48),
        Operator("convolution 1, 16 to 16", lambda x: same_conv(x, point.weight), ((16, 1),), 32, 2 * 32),
        Operator(
            "linear upsampling of 32",
            lambda x: linear_upsample(x, two, [2 * n for n in x.shape[2:]]),
            ((32, small),),
            32 + 32 * small,
            32 + 32 * small,
        ),
        Operator("max pooling of 16", lambda x: max_pool(x, two), ((16, 1),), 16 + 16 * small, 32 + 16 * small),
        Operator("concatenating 16 and 16", lambda x, y: concatenate([x, y]), ((16, 1), (16, 1)), 64, 64),
    ]


def measure(operator: Operator, case: str, shrink: int, device: torch.device, bytes_per_ms: float) -> dict:
    batch, size = MAPS[case]
    size = [n // shrink for n in size]
    dim = len(size)
    voxels = batch * torch.Size(size).numel()
    maps = []
    for channels, part in operator.maps:
        shape = (batch, channels, *(round(n * part ** (1 / dim)) for n in size))
        x = torch.randn(shape, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
        maps.append(x.contiguous(memory_format=CHANNELS_LAST[x.ndim]).requires_grad_())

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return operator.run(*maps)

    grad = torch.randn_like(forward())

    def step() -> None:
        for x in maps:
            x.grad = None
        forward().backward(grad)

    with torch.no_grad():
        forward_ms = median_ms(graphed(forward, REPEATS), device, 0.1)[0] / REPEATS
    step_ms = median_ms(graphed(step, REPEATS), device, 0.1)[0] / REPEATS
    bounds = [
        2 * voxels * channels / bytes_per_ms for channels in (operator.forward, operator.forward + operator.backward)
    ]
    return {
        "case": case,
        "operator": operator.name,
        "forward_ms": forward_ms,
        "forward_share": bounds[0] / forward_ms,
        "step_ms": step_ms,
        "step_share": bounds[1] / step_ms,
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| maps | operator | forward ms | of the bound | with backward ms | of the bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (
            f"{row['forward_ms']:.3f} | {row['forward_share']:.0%} | {row['step_ms']:.3f} | {row['step_share']:.0%}"
        )
        lines.append(f"| {row['case']} | {row['operator']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--shrink", type=int, default=1, help="divide the voxels per axis, for a rehearsal")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bytes_per_ms = bandwidth(device)
    about = {
        **provenance(),
        "terabytes_per_s": bytes_per_ms / 1e9,
    }
    jobs = [(case, operator) for case in MAPS for operator in operators(int(case[0]), device)]
    rows = []
    for case, operator in tqdm(jobs, desc="operators"):
        rows.append(measure(operator, case, args.shrink, device, bytes_per_ms))
        tqdm.write(json.dumps(rows[-1]))
    heading = "{date}, {device}, torch {torch}, a copy moves {terabytes_per_s:.2f} TB/s\n\n".format(**about)
    write(args.out, "operators", {**about, "rows": rows}, heading + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
