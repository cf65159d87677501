"""SGD with momentum as one call for all parameters, also behind a gradient scaler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class FusedSGD(torch.optim.SGD):
    """PyTorch's fused SGD, which skips a step that float16 cannot hold without asking the GPU about it first.

    The first step of PyTorch's own overwrites the momentum, which is memory that nothing was written to before; a
    scaler that skips this step, as it often does, would leave it so. Here the momentum begins with zeros, to which the
    first gradient is added: the same numbers.

    Args:
        params: on one of nnU-Net's devices.
        lr: learning rate.
        momentum: above 0.
        weight_decay: L2 penalty.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self._begin_momentum()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also that of PyTorch's SGD of any kind, as in checkpoints from before it was fused."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None}
        self._begin_momentum()

    def _begin_momentum(self) -> None:
        """Where there is none."""
        for p in (p for group in self.param_groups for p in group["params"]):
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
