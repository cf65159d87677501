"""How something becomes a CUDA graph: what is around the recording, in one process and in several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def can_be_recorded(x: Tensor) -> bool:
    """Whether what is computed from x may become a graph. AMD's GPUs have them as well, where nothing was tried."""
    return x.is_cuda and torch.version.hip is None


@contextmanager
def in_all_or_none(group: dist.ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """What fails in one process fails in all of them, once each has done it."""
    if group is None:
        yield
        return
    done = torch.ones((), device=device)  # as long as there is memory for it
    try:
        yield
    except RuntimeError:
        dist.all_reduce(done.zero_(), dist.ReduceOp.MIN, group)
        raise
    dist.all_reduce(done, dist.ReduceOp.MIN, group)
    if not done:
        raise RuntimeError("it failed in another process")


@contextmanager
def as_recorded() -> Iterator[None]:
    """The backward pass stays in this thread, which is the one that records."""
    with autocast_without_cache(), torch.autograd.set_multithreading_enabled(False):
        yield


def memory_for(x: Tensor) -> Tensor:
    """A copy of x, to be overwritten in inference mode and outside of it."""
    with torch.inference_mode(False):
        return torch.empty_like(x).copy_(x)


def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.graph:
    """Records what this thread launches; others, such as those that prepare the next batch, may go on using the GPU."""
    return torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")


def autocast_without_cache() -> torch.autocast:
    """The autocast that is on, without its memory of converted weights: a graph has to convert them every time."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
