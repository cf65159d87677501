"""The training step: nnU-Net's, and how it becomes CUDA graphs. Trainers, profile and benchmarks all take this one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.update import RecordedUpdate, update_weights
from nnunet_lgms.ops.backend import with_fallback


def training_step(
    network: nn.Module,
    loss_function: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    data: Tensor,
    target: Any,
    recorded_update: RecordedUpdate | None = None,
) -> tuple[Tensor, Tensor]:
    """nnU-Net's step: forward pass under autocast, loss, scaled backward pass, and the update of the weights.

    Args:
        network: in training mode; maybe one that replays its step as CUDA graphs.
        loss_function: takes what the network returns, and ``target``.
        optimizer: of the network's parameters.
        scaler: of the gradients, where they are of 16 bits.
        data: (B, C, *patch), on the network's device.
        target: what the loss takes, on the same device.
        recorded_update: the update as a CUDA graph; it is left aside unless it is of this optimiser and this scaler.

    Returns:
        the loss, (), and the norm of the gradients before clipping, (); the step was left out if it is not finite.
    """

    def passes() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(data.device):
            loss = loss_function(network(data), target)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    loss = with_fallback(passes)
    if recorded_update is not None and recorded_update.is_of(optimizer, scaler):
        return loss, recorded_update()
    return loss, update_weights(network, optimizer, scaler)


def record_step(
    network: GraphedLGMSNet,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    x: Tensor,
    group: dist.ProcessGroup | None = None,
) -> RecordedUpdate | None:
    """Makes the step on batches like x CUDA graphs: the network's passes now, the update in one of the next steps.

    Args:
        network: in training mode, on a GPU.
        optimizer: of the network's parameters.
        scaler: of the gradients.
        x: (B, C, *patch).
        group: processes that average their gradients.

    Returns:
        the update, for :func:`training_step`; None for another optimiser than the trainers', whose steps may be more
        than kernels.

    Raises:
        RuntimeError: the passes cannot be recorded (see :meth:`GraphedLGMSNet.record_training`).
    """
    with autocast(x.device):
        network.record_training(x, group)
    return RecordedUpdate(network, optimizer, scaler) if type(optimizer) is FusedSGD else None


def autocast(device: torch.device) -> AbstractContextManager:
    """float16 on CUDA, nothing elsewhere: nnU-Net's choice."""
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()
