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
        params: in the place and type in which they will be trained, float32 or float64 (of 16 bits, PyTorch's fused SGD
            gives other numbers on a CPU, seen in 2.13).
        lr: learning rate.
        momentum: above 0.
        weight_decay: L2 penalty.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's, which calls it for the first parameters as well."""
        super().add_param_group(param_group)
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
