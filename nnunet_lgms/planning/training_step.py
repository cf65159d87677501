"""nnU-Net's training and inference step on random data, to see what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from nnunet_lgms.architecture.graphed import GraphedLGMSNet
from nnunet_lgms.nnunet.update import update_weights
from nnunet_lgms.planning.memory import label_manager


class TrainingStep:
    """One call is one of nnU-Net's training steps: forward, loss, scaled backward, clipping at 12, SGD with momentum.

    Args:
        network: returns logits, or a list of them with deep supervision.
        input_shape: (B, C, *patch).
        n_classes: channels of the output, background included.
        device: where it runs; autocast to float16 on CUDA, as in nnU-Net.
        fast: as the network's trainer makes it on one GPU: LGMSNet on CUDA graphs, other networks and Dice compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: Sequence[int],
        n_classes: int,
        device: torch.device,
        fast: bool = False,
    ):
        from nnunet_lgms.nnunet.loss import cross_entropy_and_dice
        from nnunet_lgms.nnunet.optimizer import FusedSGD

        self.device = device
        self.network = network.to(device).train()
        self.loss = cross_entropy_and_dice(label_manager(n_classes), batch_dice=True, ddp=False)
        if fast:
            self.network = fast_steps(self.network, torch.zeros(tuple(input_shape), device=device))
            self.loss.dc = torch.compile(self.loss.dc)
        sgd = FusedSGD if isinstance(network, GraphedLGMSNet) else torch.optim.SGD  # as nnU-Net's trainer has it
        self.optimizer = sgd(self.network.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        self.input_shape = tuple(input_shape)
        self.n_classes = n_classes

    def __call__(self) -> None:
        data = torch.randn(self.input_shape).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            output = self.network(data)
            outputs = output if isinstance(output, (list, tuple)) else [output]
            loss = sum(self.loss(o, self._target(o)) for o in outputs)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        update_weights(self.network, self.optimizer, self.scaler)

    def _target(self, output: Tensor) -> Tensor:
        shape = (output.shape[0], 1, *output.shape[2:])
        return torch.randint(0, self.n_classes, shape, dtype=torch.int16).to(self.device)


def fast_steps(network: nn.Module, x: Tensor) -> nn.Module:
    """The network, for training steps on batches like x, as its trainer makes it fast on one GPU."""
    if not isinstance(network, GraphedLGMSNet):
        return torch.compile(network)
    if x.is_cuda:
        with autocast(x.device):
            network.record_training(x)
    return network


class InferenceStep:
    """One call predicts one patch, as a tile of nnU-Net's sliding window."""

    def __init__(self, network: nn.Module, input_shape: Sequence[int], device: torch.device):
        self.device = device
        self.network = network.to(device).eval()
        self.data = torch.randn(1, *tuple(input_shape)[1:], device=device)

    def __call__(self) -> None:
        with torch.inference_mode(), autocast(self.device):
            self.network(self.data)


def peak_memory() -> int:
    """Most bytes that PyTorch's tensors had on the GPU since its count was reset, with what CUDA graphs hold for them.

    Replaying a graph allocates nothing: its memory was taken when it was recorded, and serves nobody else.
    """
    graphs = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    return torch.cuda.max_memory_allocated() + sum(s["total_size"] - s["allocated_size"] for s in graphs)


def autocast(device: torch.device):
    """float16 on CUDA, nothing elsewhere: nnU-Net's choice."""
    return torch.autocast(device.type) if device.type == "cuda" else nullcontext()
