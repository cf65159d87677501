"""How close each fused operator comes to the bandwidth of the GPU's memory.

    python benchmarks/operators.py          to benchmarks/results/operators.{json,md}
    python benchmarks/operators.py --only attention --out FOLDER

Every operator runs on the maps of LGMSNet's highest level (2 x 128^3 and 16 x 256^2, float16, channels-last), forward,
and forward with backward, in a CUDA graph, so that Python's part is not in the time. The bound is the time in which a
plain copy would move the bytes that must move: inputs, results and gradients once, and once more what a norm reads for
its statistics before it can write. The bandwidth is measured in the same run, on a copy of 1 GiB. Convolutions and the
bottleneck also multiply, so theirs is a bound that arithmetic may forbid.

Attention is bound by arithmetic, so it stands beside PyTorch's fused attention: heads of 8 channels, the tokens of the
highest level that has attention. Errors are relative to float64, the largest of result and gradients.
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
    attention,
    concatenate,
    kernels,
    linear_upsample,
    max_pool,
    multi_kernel_depthwise,
    norm_act,
    same_conv,
)
from nnunet_lgms.ops.memory_format import CHANNELS_LAST

MAPS = {"3d": (2, (128, 128, 128)), "2d": (16, (256, 256))}
ATTENTION = {"2d, 16 x 256^2": (64, 1024), "2d, 16 x 1024^2": (64, 16384), "3d, 2 x 128^3": (16, 4096)}
HEADS, HEAD_DIM = 4, 8
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


def measure_attention(case: str, shrink: int, device: torch.device) -> dict:
    """Sequences and tokens of the highest level with attention, with the kernels and with PyTorch's attention."""
    sequences, tokens = ATTENTION[case]
    tokens //= shrink**2
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    qkv = torch.randn((1, sequences, tokens, 3, HEADS, HEAD_DIM), device=device, dtype=dtype).requires_grad_()
    grad = torch.randn((1, sequences, tokens, HEADS * HEAD_DIM), device=device, dtype=dtype)
    exact = exact_attention(qkv[0, 0].detach(), grad[0, 0].unflatten(-1, (HEADS, HEAD_DIM)))
    row = {"case": case, "sequences": sequences, "tokens": tokens}
    repeats = 1 if tokens > 4096 else REPEATS

    def step() -> None:
        qkv.grad = None
        attention(qkv).backward(grad)

    for name, setting in (("kernels", "auto"), ("pytorch", "off")):
        with kernels(setting):
            with torch.no_grad():
                run = graphed(lambda: attention(qkv), repeats)
                forward_ms = median_ms(run, device, 0.1, 1, 3)[0] / repeats
                out = attention(qkv)[0, 0]
            step_ms = median_ms(graphed(step, repeats), device, 0.1, 1, 3)[0] / repeats
        found = [out.view(tokens, HEADS, HEAD_DIM), *qkv.grad[0, 0].unbind(1)]
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        row |= {f"{name}_forward_ms": forward_ms, f"{name}_step_ms": step_ms, f"{name}_error": max(errors)}
    return row


def exact_attention(qkv: Tensor, grad: Tensor) -> list[Tensor]:
    """(N, 3, heads, D) and (N, heads, D) -> the result and the gradients of queries, keys and values, in float64."""
    q, k, v = (t.transpose(0, 1) for t in qkv.double().unbind(1))
    grad, scale = grad.double().transpose(0, 1), HEAD_DIM**-0.5
    outs, of_queries, of_keys, of_values = [], [], torch.zeros_like(k), torch.zeros_like(v)
    for query, g in zip(q.split(1024, 1), grad.split(1024, 1), strict=True):
        weights = (scale * query @ k.mT).softmax(-1)
        outs.append(weights @ v)
        of_values += weights.mT @ g
        weights *= g @ v.mT - (g * outs[-1]).sum(-1, keepdim=True)
        of_queries.append(scale * weights @ k)
        of_keys += scale * weights.mT @ query
    return [t.transpose(0, 1) for t in (torch.cat(outs, 1), torch.cat(of_queries, 1), of_keys, of_values)]


def attention_table(rows: list[dict]) -> str:
    lines = [
        "| attention | tokens | forward ms, PyTorch | kernels | ratio | with backward ms, PyTorch | kernels | ratio "
        "| error, PyTorch | kernels |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["case"], f"{r['sequences']} x {r['tokens']}"]
        for what in ("forward", "step"):
            theirs, ours = r[f"pytorch_{what}_ms"], r[f"kernels_{what}_ms"]
            cells += [f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.2f}"]
        cells += [f"{r['pytorch_error']:.1e}", f"{r['kernels_error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--only", default="", help="operators whose name has this in it")
    parser.add_argument("--shrink", type=int, default=1, help="divide the voxels per axis, for a rehearsal")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bytes_per_ms = bandwidth(device)
    about = {
        **provenance(),
        "terabytes_per_s": bytes_per_ms / 1e9,
    }
    jobs = [(case, operator) for case in MAPS for operator in operators(int(case[0]), device)]
    rows, of_attention = [], []
    for case, operator in tqdm([job for job in jobs if args.only in job[1].name], desc="operators"):
        rows.append(measure(operator, case, args.shrink, device, bytes_per_ms))
        tqdm.write(json.dumps(rows[-1]))
    for case in ATTENTION if args.only in "attention" else ():
        of_attention.append(measure_attention(case, args.shrink, device))
        print(json.dumps(of_attention[-1]), flush=True)
    heading = "{date}, {device}, torch {versions[torch]}, a copy moves {terabytes_per_s:.2f} TB/s\n\n".format(**about)
    tables = table(rows) + "\n" + attention_table(of_attention)
    print(tables)
    write(args.out, "operators", {**about, "rows": rows, "attention": of_attention}, heading + tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
