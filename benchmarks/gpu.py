"""Time and memory of LGMSNet against nnU-Net's own networks on one GPU, side by side in one run.

    python benchmarks/gpu.py                      every row of the table, JSON + Markdown + plot to benchmarks/results/
    python benchmarks/gpu.py --only 3d --networks lgmsnet plain
    python benchmarks/gpu.py --worker 3d lgmsnet --profile    one network in this process, with its most expensive kernels

Every network runs in a process of its own with an empty compile cache, so that "first step" is what a user waits for. A
training step is what nnU-Net does: autocast to float16, loss, scaled backward pass, clipping at 12, SGD. Only the network is
compiled, as in nnU-Net. Times are medians of CUDA events after warm-up; ratios are against PlainConvUNet of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results"
CASES = {
    "3d": {"input": (2, 1, 128, 128, 128), "classes": 4},
    "2d": {"input": (16, 3, 256, 256), "classes": 1},
}


def build(name: str, dim: int, input_channels: int, classes: int) -> nn.Module:
    """The network by its name in the table."""
    if name == "lgmsnet":
        from nnunet_lgms import LGMSNet

        return LGMSNet.paper(input_channels, classes, dim=dim)

    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    # What nnU-Net plans for these patches: six stages for 128^3, seven for 256^2.
    n_stages = 6 if dim == 3 else 7
    conv_op = nn.Conv3d if dim == 3 else nn.Conv2d
    shared = {
        "input_channels": input_channels,
        "num_classes": classes,
        "n_stages": n_stages,
        "features_per_stage": [min(32 * 2**i, 320 if dim == 3 else 512) for i in range(n_stages)],
        "conv_op": conv_op,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (n_stages - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d if dim == 3 else nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    if name == "plain":
        network = PlainConvUNet(**shared, n_conv_per_stage=2, n_conv_per_stage_decoder=2)
    elif name == "resenc_m":
        blocks = [1, 3, 4, 6, 6, 6, 6][:n_stages]
        network = ResidualEncoderUNet(**shared, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1)
    else:
        raise ValueError(f"There is no network {name!r} in this benchmark: choose lgmsnet, plain or resenc_m.")
    network.apply(network.initialize)
    return network


def loss_function(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), target.float())
    return F.cross_entropy(logits, target)


def median_ms(step, seconds: float = 3.0, warmup: int = 5) -> tuple[float, float, float]:
    """Median, 5th and 95th percentile of a step in ms."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - begin < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    return statistics.median(times), times[len(times) // 20], times[-1 - len(times) // 20]


def measure(case: str, name: str, compiled: bool, profile: bool) -> dict:
    """All figures of one network on one input."""
    shape, classes = CASES[case]["input"], CASES[case]["classes"]
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    network = build(name, len(shape) - 2, shape[1], classes).cuda()
    parameters = sum(p.numel() for p in network.parameters())
    model = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.GradScaler("cuda")
    data = torch.randn(shape, device="cuda")
    target = torch.randint(0, max(classes, 2), (shape[0], *shape[2:]), device="cuda")

    def train():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda"):
            loss = loss_function(model(data), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()

    def infer():
        with torch.inference_mode(), torch.autocast("cuda"):
            model(data)

    begin = time.perf_counter()
    train()
    torch.cuda.synchronize()
    first_step = time.perf_counter() - begin
    train_ms = median_ms(train)
    torch.cuda.reset_peak_memory_stats()
    train()
    torch.cuda.synchronize()
    train_gib = torch.cuda.max_memory_allocated() / 2**30
    if profile:
        show_profile(train)

    optimizer.zero_grad(set_to_none=True)
    network.eval()
    infer_ms = median_ms(infer)
    if profile:
        show_profile(infer)
    return {
        "case": case,
        "network": name,
        "compiled": compiled,
        "parameters": parameters,
        "train_ms": train_ms,
        "infer_ms": infer_ms,
        "train_gib": train_gib,
        "first_step_s": first_step,
    }


def show_profile(step, rows: int = 45) -> None:
    """Prints the GPU's most expensive kernels of one step and how long it was busy."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as run:
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) * 1e3
    kernels = [e for e in run.key_averages() if e.self_device_time_total > 0]
    busy = sum(e.self_device_time_total for e in kernels) / 1e3
    print(f"profile: {wall:.1f} ms wall, {busy:.1f} ms busy, {sum(e.count for e in kernels)} kernels")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:rows]:
        print(f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:5d} x  {e.key[:110]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    print("RESULT", json.dumps(measure(*args.worker, compiled=not args.eager, profile=args.profile)), flush=True)
