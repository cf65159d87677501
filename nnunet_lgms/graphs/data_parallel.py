"""DDP for a network that replays its training step."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class GraphedDataParallel(DistributedDataParallel):
    """DDP around a :class:`GraphedLGMSNet`, which averages the gradients itself in a step that it replays.

    There, DDP's own exchange would come on top: it copies every gradient to its buckets and back, in some six hundred
    launches of kernels, and hides the exchange behind a backward pass that Python launches, which a graph is not.
    """

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        with self.no_sync() if self.module.replays(x) else nullcontext():
            return super().forward(x)
