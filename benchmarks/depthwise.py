"""Time and error of the multi-kernel depthwise operator beside PyTorch's own depthwise convolution, on one CUDA device.

    python benchmarks/depthwise.py [--output benchmarks/results] [--quick]

Each row is measured in this one run: forward, and forward with all gradients, on both sides, as replays of CUDA graphs
(so that launch gaps of a short kernel do not count) and also eagerly. Medians of CUDA event times. The bytes of the
bound are those that must move: x and y once in the forward pass, x, dy twice and dx in the backward pass. Errors are
against float64, relative, on a smaller map with the same kernels. Writes depthwise.json and depthwise.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from record import RESULTS, provenance, write
from timing import bandwidth, graphed, median_ms
from torch import Tensor
from tqdm import tqdm

from nnunet_lgms.ops import multi_kernel_depthwise

CONV = {2: F.conv2d, 3: F.conv3d}
PAPER = (3, 5, 7, 9)
# name: shape of x, kernels of equal channel groups
ROWS = {
    **{f"3D C4 128^3 b2, k{k}": ((2, 4, 128, 128, 128), (k,)) for k in PAPER},
    "3D LMS C16 128^3 b2, k3-9": ((2, 16, 128, 128, 128), PAPER),
    "3D LMS C16 64^3 b2, k3-9": ((2, 16, 64, 64, 64), PAPER),
    "3D LMS C32 32^3 b2, k3-9": ((2, 32, 32, 32, 32), PAPER),
    **{f"2D C4 256^2 b16, k{k}": ((16, 4, 256, 256), (k,)) for k in PAPER},
    "2D LMS C16 256^2 b16, k3-9": ((16, 16, 256, 256), PAPER),
    "2D LMS C16 128^2 b16, k3-9": ((16, 16, 128, 128), PAPER),
    "2D LMS C32 64^2 b16, k3-9": ((16, 32, 64, 64), PAPER),
}
QUICK = ["3D C4 128^3 b2, k3", "3D C4 128^3 b2, k9", "2D LMS C16 256^2 b16, k3-9"]


def pytorch(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """What users of PyTorch write: one depthwise convolution a group."""
    groups = zip(x.split([w.shape[0] for w in weights], 1), weights, biases)
    out = [CONV[x.dim() - 2](p, w, b, padding=w.shape[-1] // 2, groups=w.shape[0]) for p, w, b in groups]
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def ours(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return multi_kernel_depthwise(x, weights, biases)


def cold_ms(function: Callable[[], object]) -> float:
    return median_ms(function, torch.device("cuda"), 0.15, least=5, cold=True)[0]


def tensors(shape: tuple[int, ...], kernels: tuple[int, ...], dtype: torch.dtype):
    torch.manual_seed(0)
    axes, channels = len(shape) - 2, shape[1] // len(kernels)
    x, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weights = [torch.randn(channels, 1, *[k] * axes, device="cuda").div(k ** (axes / 2)).to(dtype) for k in kernels]
    biases = [torch.randn(channels, device="cuda").to(dtype) for _ in kernels]
    return x, weights, biases, grad


def both(side: Callable, x: Tensor, weights: list[Tensor], biases: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in [x, *weights, *biases]]
    n = len(weights)
    out = side(leaves[0], leaves[1 : n + 1], leaves[n + 1 :])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(side: Callable, shape: tuple[int, ...], kernels: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    small = (1, shape[1], *[min(s, 48) for s in shape[2:]])
    case = tensors(small, kernels, dtype)
    got = both(side, *case)
    x, weights, biases, grad = case
    want = both(pytorch, x.double(), [w.double() for w in weights], [b.double() for b in biases], grad.double())
    relative = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]
    n = len(kernels)
    return {"forward": relative[0], "input_grad": relative[1], "weight_grad": max(relative[2 : n + 2])}


def measure(shape: tuple[int, ...], kernels: tuple[int, ...], dtype: torch.dtype, copy: float) -> dict:
    x, weights, biases, grad = tensors(shape, kernels, dtype)
    row: dict = {"shape": shape, "kernels": kernels}
    for name, side in (("pytorch", pytorch), ("ours", ours)):

        def forward(side=side):
            with torch.no_grad():
                return side(x, weights, biases)

        def step(side=side):
            return both(side, x, weights, biases, grad)

        row[name] = {
            "forward_ms": cold_ms(graphed(forward)),
            "step_ms": cold_ms(graphed(step)),
            "eager_forward_ms": cold_ms(forward),
            "eager_step_ms": cold_ms(step),
            "error": errors(side, shape, kernels, dtype),
        }
    size = math.prod(shape) * x.element_size() / 1e6  # MB
    row["ratio_forward"] = row["pytorch"]["forward_ms"] / row["ours"]["forward_ms"]
    row["ratio_step"] = row["pytorch"]["step_ms"] / row["ours"]["step_ms"]
    row["ratio_eager_step"] = row["pytorch"]["eager_step_ms"] / row["ours"]["eager_step_ms"]
    row["forward_gbs"] = 2 * size / row["ours"]["forward_ms"]
    row["step_gbs"] = 7 * size / row["ours"]["step_ms"]
    row["share_of_copy_forward"] = row["forward_gbs"] / copy
    row["share_of_copy_step"] = row["step_gbs"] / copy
    return row


def markdown(result: dict) -> str:
    def error(side: dict) -> str:
        return " / ".join(f"{side['error'][k]:.1e}" for k in ("forward", "input_grad", "weight_grad"))

    lines = [
        "# Multi-kernel depthwise convolution against PyTorch's",
        "",
        f"{result['date']}, {result['device']}, torch {result['versions']['torch']}, "
        f"triton {result['versions']['triton']}, {result['dtype']}, "
        f"device copy {result['copy_gbs']:.0f} GB/s. Medians of CUDA graph replays; step = forward and all gradients. "
        "GB/s counts the bytes that must move; errors are forward / input gradient / weight gradient against float64.",
        "",
        "| case | PyTorch forward ms | ours | × | PyTorch step ms | ours | × | eager × | forward GB/s (of copy) | "
        "step GB/s (of copy) | our error | PyTorch's error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        p, o = row["pytorch"], row["ours"]
        lines.append(
            f"| {name} | {p['forward_ms']:.3f} | {o['forward_ms']:.3f} | {row['ratio_forward']:.1f} | "
            f"{p['step_ms']:.2f} | {o['step_ms']:.3f} | {row['ratio_step']:.1f} | {row['ratio_eager_step']:.1f} | "
            f"{row['forward_gbs']:.0f} ({row['share_of_copy_forward']:.0%}) | "
            f"{row['step_gbs']:.0f} ({row['share_of_copy_step']:.0%}) | {error(o)} | {error(p)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Depthwise operator against PyTorch, on a CUDA device.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument("--quick", action="store_true", help="three rows only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "This benchmark needs a CUDA device, and PyTorch sees none on this machine.\n")

    copy = bandwidth(torch.device("cuda")) / 1e6
    rows = {}
    for name in tqdm(QUICK if args.quick else list(ROWS), desc="depthwise"):
        rows[name] = measure(*ROWS[name], getattr(torch, args.dtype), copy)
        torch.cuda.empty_cache()
    result = {
        **provenance(),
        "dtype": args.dtype,
        "copy_gbs": copy,
        "rows": rows,
    }
    stem = "depthwise" if args.dtype == "float16" else f"depthwise_{args.dtype}"
    write(args.output, stem, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
