"""The update of the weights after a backward pass, and the same as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lgms.architecture.graphed import recording

MAX_GRADIENT_NORM = 12  # nnU-Net's, in each of its trainers
# Steps in a row with everything in its place before one is recorded, which takes as long as some ten.
BEFORE_RECORDING = 10


def update_weights(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """nnU-Net's: gradients are unscaled and clipped together, and the scaler, if there is one, may skip the step."""
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters_of(optimizer), MAX_GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


class RecordedUpdate:
    """An update of weights as a CUDA graph, for gradients that are in the same memory in every step.

    Those of a recorded backward pass are. On an H100 Python takes 2.8 ms to launch the update of 109 tensors, for which
    the GPU takes 0.13. Whenever weights, gradients, momentum or settings are not what they were, the update is launched
    as usual, until they have stayed for a while.

    Args:
        update: reads ``p.grad`` and changes weights and momentum, and the state of a scaler, in place.
        optimizer: whose step it takes. Learning rates may change in every step.
    """

    def __init__(self, update: Callable[[], None], optimizer: torch.optim.Optimizer):
        self._update, self._optimizer = update, optimizer
        self._graph: torch.cuda.CUDAGraph | None = None
        self._state: Any = None  # in the step before
        self._stayed = 0  # for so many steps
        self._rates: list[Tensor] = []

    def __call__(self) -> None:
        state, before = self._what_a_graph_holds(), self._state
        self._state, self._stayed = state, self._stayed + 1 if state == before else 0
        if self._stayed < BEFORE_RECORDING:
            self._graph = None
            self._update()
            return
        if self._graph is None:
            self._graph = self._record()
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()

    def _what_a_graph_holds(self) -> Any:
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self._optimizer.param_groups]
        tensors = ((p, p.grad, *self._optimizer.state[p].values()) for p in parameters_of(self._optimizer))
        return settings, [t.data_ptr() if isinstance(t, Tensor) else t for t in chain.from_iterable(tensors)]

    def _record(self) -> torch.cuda.CUDAGraph:
        """With learning rates that are tensors meanwhile, so that the graph reads what they are in its step."""
        graph, groups = torch.cuda.CUDAGraph(), self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self._rates = [torch.tensor(group["lr"], device=group["params"][0].device) for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            with recording(graph, torch.cuda.Stream()):
                self._update()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        return graph
