"""Builds LGMSNet into the topology that nnU-Net planned.

Stages, strides, kernels, patch and batch size are nnU-Net's and stay as planned; the kind of block, the widths and
everything else are the paper's, or what the configuration's ``"lgmsnet"`` key says (``docs/reference/plans.md``).
"""

from __future__ import annotations

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_lgms.config import settings_of
from nnunet_lgms.config.resolve import Topology, network_kwargs
from nnunet_lgms.graphs.network import GraphedLGMSNet


def build_network(
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool = True,
) -> GraphedLGMSNet:
    """LGMSNet for a configuration of an nnU-Net plan.

    Args:
        configuration_manager: the planned configuration.
        num_input_channels: channels of the image (and of the one-hot segmentation of a cascade's previous stage).
        num_output_channels: segmentation heads.
        enable_deep_supervision: whether the network returns one output per level but the lowest.

    Raises:
        ValueError: the plan describes no convolutional encoder, or its settings are invalid, do not fit it, or need a
            newer plugin.
    """
    topology = Topology.of(configuration_manager.configuration)
    return GraphedLGMSNet(
        num_input_channels,
        num_output_channels,
        conv_op=nn.Conv2d if topology.dim == 2 else nn.Conv3d,
        deep_supervision=enable_deep_supervision,
        **network_kwargs(settings_of(configuration_manager), topology),
    )


def unused_heads(network: nn.Module) -> int:
    """Parameters of the segmentation heads below full resolution, where the network returns full resolution alone.

    nnU-Net builds them whether or not they are used, so that weights load strictly; LGMSNet does so for nnU-Net.

    Args:
        network: LGMSNet or one of nnU-Net's U-Nets, whose decoders hold their heads alike; others have none.
    """
    decoder = getattr(network, "decoder", None)
    if decoder is None or decoder.deep_supervision:
        return 0
    return sum(p.numel() for p in decoder.seg_layers[:-1].parameters())
