"""nnU-Net's training and inference step on one batch, to see what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.graphs.compilation import why_not_compiled
from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.step import autocast, record_step, training_step
from nnunet_lgms.graphs.update import BEFORE_RECORDING
from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.planning.memory import label_manager

#: steps on a GPU after which all is recorded that its trainer records: the passes at once, the update after a while
WARM_UP = BEFORE_RECORDING + 2


class TrainingStep:
    """One call is a training step on the same batch, with the optimiser of the network's trainer.

    Args:
        network: in training mode, on the device of the data.
        loss_function: takes what the network returns, and the target.
        data: (B, C, *patch).
        target: what the loss takes.
    """

    def __init__(self, network: nn.Module, loss_function: Callable[[Any, Any], Tensor], data: Tensor, target: Any):
        self.network, self.loss_function, self.data, self.target = network, loss_function, data, target
        self.optimizer = optimizer_of(network)
        self.scaler = torch.amp.GradScaler("cuda") if data.is_cuda else None
        self.recorded_update = None

    def make_fast(self) -> None:
        """As the network's trainer does on GPUs: LGMSNet becomes CUDA graphs, and other networks are compiled.

        So is LGMSNet where PyTorch's operators run and can be compiled.
        """
        self.recorded_update = None
        is_graphed = isinstance(self.network, GraphedLGMSNet)
        if is_graphed and not self.data.is_cuda:
            return
        if not is_graphed or not (use_kernels(self.data) or why_not_compiled(self.data.device)):
            self.network = torch.compile(self.network)
        else:
            x = torch.zeros_like(self.data)
            self.recorded_update = record_step(self.network, self.optimizer, self.scaler, x)

    def __call__(self) -> None:
        training_step(
            self.network,
            self.loss_function,
            self.optimizer,
            self.scaler,
            self.data,
            self.target,
            self.recorded_update,
        )


def planned_training_step(
    network: nn.Module, input_shape: Sequence[int], n_classes: int, device: torch.device, fast: bool = False
) -> TrainingStep:
    """A training step on random data, with the loss of the network's trainer at every output.

    Args:
        network: returns logits, or a list of them with deep supervision.
        input_shape: (B, C, *patch).
        n_classes: channels of the output, background included.
        device: where it runs.
        fast: as the network's trainer makes it on one GPU (:meth:`TrainingStep.make_fast`).
    """
    from nnunet_lgms.nnunet.loss import cross_entropy_and_dice, nnunets_cross_entropy_and_dice

    is_ours = isinstance(network, LGMSNet)
    loss_of = cross_entropy_and_dice if is_ours else nnunets_cross_entropy_and_dice
    loss = loss_of(label_manager(n_classes), batch_dice=True, ddp=False)
    if fast and not (is_ours and use_kernels(torch.empty(0, device=device))):
        loss.dc = torch.compile(loss.dc)
    targets: list[Tensor] = []  # drawn in the first step, which tells the sizes of the outputs

    def loss_function(outputs: Tensor | Sequence[Tensor], targets: list[Tensor]) -> Tensor:
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        for output in outputs[len(targets) :]:
            shape = (output.shape[0], 1, *output.shape[2:])
            targets.append(torch.randint(0, n_classes, shape, dtype=torch.int16, device=device))
        return sum(loss(output, target) for output, target in zip(outputs, targets, strict=True))

    data = torch.randn(tuple(input_shape), device=device)
    step = TrainingStep(network.to(device).train(), loss_function, data, targets)
    if fast:
        step.make_fast()
    return step


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    """SGD as the network's trainer has it, at a small rate: fused for LGMSNet, nnU-Net's for others."""
    if isinstance(network, LGMSNet):
        return FusedSGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    return torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.99, nesterov=True, weight_decay=3e-5)


class InferenceStep:
    """One call predicts one patch, as a tile of nnU-Net's sliding window."""

    def __init__(self, network: nn.Module, input_shape: Sequence[int], device: torch.device):
        self.network = network.to(device).eval()
        self.data = torch.randn(1, *tuple(input_shape)[1:], device=device)

    def __call__(self) -> None:
        with torch.inference_mode(), autocast(self.data.device):
            self.network(self.data)


def peak_memory() -> int:
    """Most bytes that PyTorch's tensors had on the GPU since its count was reset, with what CUDA graphs hold for them.

    Replaying a graph allocates nothing: its memory was taken when it was recorded, and serves nobody else.
    """
    graphs = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    return torch.cuda.max_memory_allocated() + sum(s["total_size"] - s["allocated_size"] for s in graphs)
