"""How close each fused operator comes to the bandwidth of the GPU's memory.

    python benchmarks/operators.py          to benchmarks/results/operators.{json,md}
    python benchmarks/operators.py --only attention --out FOLDER

Every operator runs on the maps of LGMSNet's highest level (2 x 128^3 and 16 x 256^2, float16, channels-last), forward,
and forward with backward, in a CUDA graph, so that Python's part is not in the time. The bound is the time in which a
plain copy would move the bytes that must move: inputs, results and gradients once, and once more what a norm reads for
its statistics before it can write. The bandwidth is measured in the same run, on a copy of 1 GiB. Convolutions and the
bottleneck also multiply, so theirs is a bound that arithmetic may forbid.

Attention and the depthwise convolution also stand beside PyTorch's: heads of 8 channels, the tokens of the highest
level that has attention; each kernel size alone, and the LMS blocks' at several levels. Errors are relative to float64,
the largest of result and gradients.
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
DEPTHWISE = {  # shape of x, kernels of equal channel groups
    **{f"3d, 4 channels, 2 x 128^3, kernel {k}": ((2, 4, 128, 128, 128), (k,)) for k in KERNELS},
    **{f"3d, {c} channels, 2 x {n}^3": ((2, c, n, n, n), KERNELS) for c, n in ((16, 128), (16, 64), (32, 32))},
    **{f"2d, 4 channels, 16 x 256^2, kernel {k}": ((16, 4, 256, 256), (k,)) for k in KERNELS},
    **{f"2d, {c} channels, 16 x {n}^2": ((16, c, n, n), KERNELS) for c, n in ((16, 256), (16, 128), (32, 64))},
}
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


def beside_pytorch(
    run: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, exact: Callable[[Tensor], list[Tensor]], repeats: int
) -> dict:
    """Times and errors of an operator with its kernels and with PyTorch's operators.

    Args:
        run: the operator on ``leaves``.
        leaves: what has gradients.
        grad: of the result.
        exact: result -> differences to float64, relative, of the result and of the gradients in ``leaves``.
        repeats: calls in a graph.
    """
    found, device = {}, grad.device

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().backward(grad)

    for name, setting in (("kernels", "auto"), ("pytorch", "off")):
        with kernels(setting):
            with torch.no_grad():
                found[f"{name}_forward_ms"] = median_ms(graphed(run, repeats), device, 0.1, 1, 3)[0] / repeats
                out = run()
            found[f"{name}_step_ms"] = median_ms(graphed(step, repeats), device, 0.1, 1, 3)[0] / repeats
            found[f"{name}_error"] = max(exact(out))
    return found


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def measure_attention(case: str, shrink: int, device: torch.device) -> dict:
    """Sequences and tokens of the highest level with attention; the errors are those of the first sequence."""
    sequences, tokens = ATTENTION[case]
    tokens //= shrink**2
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    qkv = torch.randn((1, sequences, tokens, 3, HEADS, HEAD_DIM), device=device, dtype=dtype).requires_grad_()
    grad = torch.randn((1, sequences, tokens, HEADS * HEAD_DIM), device=device, dtype=dtype)
    wanted = exact_attention(qkv[0, 0].detach(), grad[0, 0].unflatten(-1, (HEADS, HEAD_DIM)))

    def exact(out: Tensor) -> list[float]:
        return errors([out[0, 0].view(tokens, HEADS, HEAD_DIM), *qkv.grad[0, 0].unbind(1)], wanted)

    times = beside_pytorch(lambda: attention(qkv), [qkv], grad, exact, 1 if tokens > 4096 else REPEATS)
    return {"operator": "attention", "case": f"{case}, {sequences} x {tokens} tokens", **times}


def measure_depthwise(case: str, shrink: int, device: torch.device) -> dict:
    """The convolutions of an LMS block, or one of them; errors are those of a part of the map."""
    shape, sizes = DEPTHWISE[case]
    shape = (*shape[:2], *(n // shrink for n in shape[2:]))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    random = {"device": device, "dtype": dtype}
    axes, channels = len(shape) - 2, shape[1] // len(sizes)
    x, grad = (torch.randn(shape, **random) for _ in range(2))  # contiguous, as PyTorch's convolution likes it
    weights = [torch.randn(channels, 1, *[k] * axes, **random).div(k ** (axes / 2)).requires_grad_() for k in sizes]
    biases = [torch.randn(channels, **random).requires_grad_() for _ in sizes]
    leaves = [x.requires_grad_(), *weights, *biases]

    def exact(out: Tensor) -> list[float]:
        part = (slice(0, 1), slice(None), *(slice(48) for _ in range(axes)))
        small = [x.detach()[part].contiguous(), *(t.detach() for t in leaves[1:])]
        found = gradients(small, grad[part], sizes)
        return errors(found, gradients([t.double() for t in small], grad[part].double(), sizes))

    times = beside_pytorch(lambda: multi_kernel_depthwise(x, weights, biases), leaves, grad, exact, REPEATS)
    return {"operator": "depthwise", "case": case, **times}


def gradients(tensors: list[Tensor], grad: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Result and all gradients of the depthwise convolutions."""
    x, *rest = leaves = [t.detach().requires_grad_() for t in tensors]
    out = multi_kernel_depthwise(x, rest[: len(sizes)], rest[len(sizes) :])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


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


def beside_table(rows: list[dict]) -> str:
    lines = [
        "| operator | case | forward ms, PyTorch | kernels | ratio | with backward ms, PyTorch | kernels | ratio "
        "| error, PyTorch | kernels |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["operator"], r["case"]]
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
    rows, beside = [], []
    for case, operator in tqdm([job for job in jobs if args.only in job[1].name], desc="operators"):
        rows.append(measure(operator, case, args.shrink, device, bytes_per_ms))
        tqdm.write(json.dumps(rows[-1]))
    for name, cases, of in (("attention", ATTENTION, measure_attention), ("depthwise", DEPTHWISE, measure_depthwise)):
        for case in tqdm(cases if args.only in name else (), desc=f"{name} beside PyTorch's"):
            beside.append(of(case, args.shrink, device))
            tqdm.write(json.dumps(beside[-1]))
    heading = "{date}, {device}, torch {versions[torch]}, a copy moves {terabytes_per_s:.2f} TB/s\n\n".format(**about)
    tables = table(rows) + "\n" + beside_table(beside)
    print(tables)
    write(args.out, "operators", {**about, "rows": rows, "beside_pytorch": beside}, heading + tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
