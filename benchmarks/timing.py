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
    step: Callable[[], object], device: torch.device, seconds: float = 1.5, warmup: int = 2, least: int = 10
) -> tuple[float, float, float]:
    """Median, 5th and 95th percentile of a step in ms: of ``least`` calls or more, after others that do not count."""
    for _ in range(warmup):
        step()
    synchronize(device)
    times, begin = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        times.append(milliseconds(step, device))
    times.sort()
    return statistics.median(times), times[len(times) // 20], times[-1 - len(times) // 20]
