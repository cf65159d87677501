"""Time and memory of one network's training and inference step on a GPU.

    python benchmarks/gpu.py 3d lgmsnet [--eager] [--profile]
    python benchmarks/gpu.py 3d plain

A training step is what nnU-Net does: autocast to float16, loss, scaled backward pass, clipping at 12, SGD. Only the
network is compiled, as in nnU-Net. Times are medians of CUDA events after warm-up, with the 5th and 95th percentile;
the first step includes compilation. `--profile` lists the most expensive kernels. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from networks import NETWORKS, build, loss_function, parameters

CASES = {  # stages: what nnU-Net plans for the patch
    "3d": {"input": (2, 1, 128, 128, 128), "classes": 4, "n_stages": 6},
    "2d": {"input": (16, 3, 256, 256), "classes": 1, "n_stages": 7},
}


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
    network = build(name, len(shape) - 2, shape[1], classes, CASES[case]["n_stages"]).cuda()
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
        "parameters": parameters(network),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one network on a GPU.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--profile", action="store_true", help="list the most expensive kernels")
    args = parser.parse_args()
    print(json.dumps(measure(args.case, args.network, not args.eager, args.profile)))


if __name__ == "__main__":
    main()
