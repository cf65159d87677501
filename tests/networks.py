"""Small LGMSNets for tests: every kind of block, few channels."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnunet_lgms import LGMSNet

CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def tiny_network(dim: int, n_stages: int = 5, num_classes: int = 2, **more: Any) -> LGMSNet:
    """One input channel; more stages than three bring the GMS blocks in."""
    arguments = {
        "features_per_stage": [8, 8, 8, 16, 16, 16, 16][:n_stages],
        "conv_op": CONV[dim],
        "kernel_sizes": [3] * n_stages,
        "strides": [1] + [2] * (n_stages - 1),
        "head_dim": 4,
        "n_heads": 2,
        **more,
    }
    return LGMSNet(1, num_classes, n_stages, **arguments)
