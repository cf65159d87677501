"""Builds LGMSNet into the topology that nnU-Net planned.

Stages, strides, kernels, patch and batch size are nnU-Net's and stay as planned; the kind of block and the width at
each level are the paper's.
"""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.architecture.topology import paper_features

PLANNED = ("n_stages", "strides", "kernel_sizes")


def build_network(
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
) -> LGMSNet:
    """LGMSNet for a configuration of an nnU-Net plan.

    Args:
        configuration_manager: the planned configuration.
        num_input_channels: channels of the image (and of the one-hot segmentation of a cascade's previous stage).
        num_output_channels: segmentation heads.
        enable_deep_supervision: whether the network returns one output per level but the lowest.

    Raises:
        ValueError: the plan describes no convolutional encoder, or one that LGMSNet cannot follow.
    """
    planned = configuration_manager.network_arch_init_kwargs
    missing = [key for key in PLANNED if key not in planned]
    if missing:
        raise ValueError(
            f"The plan's network {configuration_manager.network_arch_class_name} has no {', '.join(missing)}: LGMSNet "
            f"needs the "
            f"plan of a convolutional U-Net; plan with nnU-Net's default or ResEnc planners."
        )
    n_stages = planned["n_stages"]
    return LGMSNet(
        num_input_channels,
        num_output_channels,
        n_stages,
        paper_features(n_stages),
        nn.Conv2d if len(configuration_manager.patch_size) == 2 else nn.Conv3d,
        planned["kernel_sizes"],
        planned["strides"],
        deep_supervision=enable_deep_supervision,
    )
