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
        self._error: Exception | None = None

    def fetch(self, *_: Any) -> None:
        """The next batch, unless it is there; as a hook, it takes whatever it is called with.

        An error of the loader is kept for when the batch is asked for: the step that is being taken needs it not.
        """
        if self._batch is not None or self._error is not None:
            return
        begin = time.perf_counter()
        try:
            batch = next(self.loader)
        except Exception as error:
            self._error = error
            return
        self.waited += time.perf_counter() - begin
        with torch.cuda.stream(self._copying):
            self._batch = tree_map_only(Tensor, partial(Tensor.to, device=self.device, non_blocking=True), batch)

    def __iter__(self) -> LoadedAhead:
        return self

    def __next__(self) -> dict[str, Any]:
        self.fetch()
        batch, self._batch = self._batch, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._copying)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)  # or its memory would be free for the next copy before the step is done
        return batch

    def __getattr__(self, name: str) -> Any:
        """Of the loader, such as what ends its processes."""
        if name == "loader":  # not there yet
            raise AttributeError(name)
        return getattr(self.loader, name)
