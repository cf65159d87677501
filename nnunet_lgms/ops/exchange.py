"""What the processes of a training exchange for a batch norm whose statistics span all of them (SyncBatchNorm).

(3, C) numbers are gathered in the forward pass, and (2, C) are added up in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

# its name since PyTorch 2.13, and before
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_exchanges = True  # False where a process rehearses by itself


@contextmanager
def without_exchange() -> Iterator[None]:
    """Inside, a process is by itself: it takes what the others have to be the same as what it has.

    So it can find out whether it has memory for a step, while no other one waits for it. PyTorch's SyncBatchNorm, where
    it serves a map that the kernels do not, exchanges all the same.
    """
    global _exchanges
    _exchanges = False
    try:
        yield
    finally:
        _exchanges = True


def spans_processes(norm: nn.Module) -> bool:
    """Whether a norm takes statistics of the batches of all processes, of which there is more than one.

    A compiler does not see it: PyTorch's module remains for that.
    """
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and not torch.compiler.is_compiling()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )


def gather_moments(mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers mean and variance, (1, C), and count of every process: (processes, 3, C) in float32."""
    mine = torch.cat([mean, variance, torch.full_like(mean, count)])
    processes = dist.get_world_size(group)
    if not _exchanges:
        return mine.repeat(processes, 1, 1)
    everyones = mine.new_empty(processes * len(mine), mine.shape[1])
    _all_gather(everyones, mine, group)
    return everyones.view(processes, *mine.shape)


def add_up(numbers: Tensor, group: dist.ProcessGroup | None) -> None:
    """Replaces numbers by their sum over all processes."""
    if _exchanges:
        dist.all_reduce(numbers, group=group)
    else:
        numbers.mul_(dist.get_world_size(group))
