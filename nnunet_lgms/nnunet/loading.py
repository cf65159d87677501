"""Batches that go to the GPU while it computes the step before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class LoadedAhead:
    """A loader whose next batch is fetched when a step was launched; nnU-Net asks for it when the step has ended.

    The GPU would wait for the copy then: two patches of 128^3 with their labels are 25 MB.

    Args:
        loader: nnU-Net's, of ``{"data": (B, C, *patch), "target": (B, 1, *patch) or a list of them, ...}``.
        device: a GPU.
    """

    def __init__(self, loader: Iterator[dict[str, Any]], device: torch.device):
        self.loader, self.device = loader, device
        self.waited = 0.0  # seconds that the loader took to answer, while the GPU may have been busy
        self._copying = torch.cuda.Stream(device)
        self._batch: dict[str, Any] | None = None

    def fetch(self, *_: Any) -> None:
        """The next batch, unless it is there; as a hook, it takes whatever it is called with."""
        if self._batch is not None:
            return
        begin = time.perf_counter()
        batch = next(self.loader)
        self.waited += time.perf_counter() - begin
        with torch.cuda.stream(self._copying):
            self._batch = tree_map_only(Tensor, partial(Tensor.to, device=self.device, non_blocking=True), batch)

    def __iter__(self) -> LoadedAhead:
        return self

    def __next__(self) -> dict[str, Any]:
        self.fetch()
        batch, self._batch = self._batch, None
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._copying)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)  # or its memory would be free for the next copy before the step is done
        return batch

    def _finish(self) -> None:
        """As nnU-Net's loaders with processes: ends them."""
        if hasattr(self.loader, "_finish"):
            self.loader._finish()
