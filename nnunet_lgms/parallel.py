"""Run one function over many inputs, in several processes or threads, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Number of processes that this one may use: its CPU cores, at most 8 (more wait for the disk)."""
    return min(8, cores())


def parallel_map(
    function: Callable[[Input], Output],
    inputs: Sequence[Input],
    workers: int,
    description: str,
    *,
    threads: bool = False,
) -> list[Output]:
    """`[function(i) for i in inputs]`, in the order of the inputs.

    Args:
        function: what to run; anything that can be pickled, or anything at all with `threads`.
        inputs: its arguments.
        workers: number of processes; with 1, or a single input, nothing is started and all happens here.
        description: text in front of the progress bar.
        threads: use threads, for work that libraries do outside of Python's lock: nothing has to be imported again,
            which costs seconds a process, and callers without `if __name__ == "__main__"` are fine.

    Raises:
        Whatever `function` raises first; inputs that have not begun by then are dropped.
    """
    from tqdm import tqdm  # which the runtime does without

    if workers <= 1 or len(inputs) <= 1:
        return [function(i) for i in tqdm(inputs, desc=description)]
    n_workers = min(workers, len(inputs))
    # Processes as in nnU-Net: forking one that has begun to use threads (PyTorch does) can hang.
    spawned = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    with (ThreadPoolExecutor if threads else spawned)(n_workers) as pool:
        futures = {pool.submit(function, value): position for position, value in enumerate(inputs)}
        outputs: list[Output | None] = [None] * len(inputs)
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=description):
                outputs[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outputs
