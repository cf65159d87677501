"""The update of the weights after a backward pass, and the same as a CUDA graph."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.recording import recording

MAX_GRADIENT_NORM = 12  # nnU-Net's, in each of its trainers
# Steps in a row with everything in its place before one is recorded, which takes as long as some ten.
BEFORE_RECORDING = 10


def update_weights(
    network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    """nnU-Net's update: gradients are unscaled, clipped together, and the optimiser steps.

    Weights and momentum stay as they are if the norm of all gradients is not finite, in every precision and with or
    without a scaler: clipping would make NaN of an infinite gradient, and a step of no direction of an infinite norm.
    Processes that have averaged their gradients have the same norm, so they decide alike.

    Returns:
        the norm before clipping, (), on the device of the gradients; a step of which it is not finite was left out.
    """
    scaler = torch.amp.GradScaler(enabled=False) if scaler is None else scaler
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
    _step_unless(norm.isfinite().logical_not(), optimizer)
    scaler.update()
    return norm


def _step_unless(left_out: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Steps unless ``left_out``, (); a fused optimiser reads it on its device, for others the host waits for it.

    It takes the way by which a gradient scaler tells an optimiser of infinite gradients. PyTorch's kernels for Apple's
    GPUs do not listen to it (2.6 to 2.10; their fused SGD has no such argument).
    """
    if left_out.device.type == "mps" or not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not left_out:
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, left_out.float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


class RecordedUpdate:
    """:func:`update_weights` as a CUDA graph, for gradients that are in the same memory in every step.

    Those of a recorded backward pass are. On an H100 Python takes 2.8 ms to launch the update of 109 tensors, for which
    the GPU takes 0.13. Whenever weights, gradients, momentum or settings are not what they were, or the optimiser has
    hooks, the update is launched as usual, until they have stayed for a while.

    Args:
        network: on a GPU.
        optimizer: learning rates may change in every step. No other class: Python that is part of a step, such as
            counting steps, would be left out.
        scaler: of the gradients.
    """

    def __init__(self, network: nn.Module, optimizer: FusedSGD, scaler: torch.amp.GradScaler | None = None):
        self.network, self.optimizer, self.scaler = network, optimizer, scaler
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._others = [p for p in network.parameters() if id(p) not in own]  # are clipped, too
        self._graph: torch.cuda.CUDAGraph | None = None
        self._state: Any = None  # in the step before
        self._stayed = 0  # for so many steps
        self._rates: list[Tensor] = []
        self._norm: Tensor | None = None  # that the graph writes
        self._fails = False

    def __call__(self) -> Tensor:
        """The update; its norm is overwritten by the next one."""
        state, before = self._what_a_graph_holds(), self._state
        self._state, self._stayed = state, self._stayed + 1 if state == before else 0
        if self._stayed < BEFORE_RECORDING or self._has_hooks():
            self._graph = None
        elif self._graph is None and not self._fails:
            self._record()
        if self._graph is None:
            return self._launch()
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
            for weight in group["params"]:
                torch.autograd.graph.increment_version(weight)  # of whose change a replay tells nobody
        self._graph.replay()
        return self._norm

    def is_of(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
        """Whether it is the update of this optimiser and this scaler, not of others that took their place."""
        return self.optimizer is optimizer and self.scaler is scaler

    def _launch(self) -> Tensor:
        return update_weights(self.network, self.optimizer, self.scaler)

    def _what_a_graph_holds(self) -> Any:
        groups, scaler = self.optimizer.param_groups, self.scaler
        settings: list[Any] = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        if scaler is not None:
            settings += scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
        parameters = chain(self._others, *(group["params"] for group in groups))
        tensors = chain.from_iterable((p, p.grad, *self.optimizer.state.get(p, {}).values()) for p in parameters)
        return settings, [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]

    def _has_hooks(self) -> bool:
        return bool(self.optimizer._optimizer_step_pre_hooks or self.optimizer._optimizer_step_post_hooks)

    def _record(self) -> None:
        """With learning rates that are tensors meanwhile, so that the graph reads what they are in its step."""
        graph, groups = torch.cuda.CUDAGraph(), self.optimizer.param_groups
        first = next(self.network.parameters())
        rates = [group["lr"] for group in groups]
        self._rates = [torch.zeros((), device=first.device) for _ in groups]  # float32, which the kernel reads
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            with torch.cuda.device_of(first), recording(graph, torch.cuda.Stream(first.device)):
                self._norm = self._launch()
            self._graph = graph
        except RuntimeError as error:  # out of memory, most likely
            self._fails = True
            warnings.warn(f"The update of the weights is not recorded as a CUDA graph ({error}).", stacklevel=2)
            if self.scaler is not None:
                self.scaler.update(self.scaler.get_scale())  # it thinks that gradients are unscaled; nothing was done
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
