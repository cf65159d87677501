"""DDP for a network that replays its training step."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


class GraphedDataParallel(DistributedDataParallel):
    """DDP around a :class:`GraphedLGMSNet`, which averages the gradients itself in a step that it replays.

    There, DDP's own exchange would come on top: it copies every gradient to its buckets and back, in some six hundred
    launches of kernels, and hides the exchange behind a backward pass that Python launches, which a graph is not.
    """

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        with self.no_sync() if self.module.replays(x) else nullcontext():
            return super().forward(x)


def in_all_processes(done: bool, device: torch.device) -> bool:
    """Whether it is done in each of them; they ask at the same time."""
    flag = torch.tensor(float(done), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
