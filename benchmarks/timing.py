"""The timer of the benchmarks: medians of a step on a GPU, by events, or on a CPU, by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms(
    step: Callable[[], object],
    device: torch.device,
    seconds: float = 1.5,
    warmup: int = 2,
    least: int = 10,
    cold: bool = False,
) -> tuple[float, float, float]:
    """Median, 5th and 95th percentile of a step in ms.

    Args:
        step: what is timed.
        device: where it works.
        seconds: how long to go on.
        warmup: calls that do not count.
        least: calls that count at least.
        cold: whether the GPU's L2 cache is overwritten before each.
    """
    for _ in range(warmup):
        step()
    synchronize(device)
    flush = torch.empty(1 << 26, dtype=torch.int32, device=device) if cold and device.type == "cuda" else None
    times, begin = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        if flush is not None:
            flush.zero_()
        times.append(milliseconds(step, device))
    times.sort()
    return statistics.median(times), times[len(times) // 20], times[-1 - len(times) // 20]


def graphed(function: Callable[[], object], times: int = 1) -> Callable[[], object]:
    """The replay of a CUDA graph of so many calls, without Python's part; on a CPU the calls themselves."""

    def calls() -> None:
        for _ in range(times):
            function()

    if not torch.cuda.is_available():
        return calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def bandwidth(device: torch.device) -> float:
    """Bytes per ms that a copy on the device reads and writes."""
    x = torch.randint(0, 255, (2**30 if device.type == "cuda" else 2**22,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x), device, 0.15)[0]
