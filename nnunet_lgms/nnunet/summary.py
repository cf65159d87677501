"""What the log of a training says about the network, which nnU-Net's print of the plans does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunet_lgms.config import settings_of
from nnunet_lgms.config.resolve import Topology, network_kwargs
from nnunet_lgms.nnunet.builder import unused_heads
from nnunet_lgms.ops import kernels_for


def summarise(network: nn.Module, configuration_manager: ConfigurationManager, device: torch.device) -> str:
    """Levels, widths, blocks, kernels, ratios, parameters and path of LGMSNet, some lines.

    Args:
        network: that is trained, on the device.
        configuration_manager: of the plans that it was built from.
        device: where it trains.
    """
    topology = Topology.of(configuration_manager.configuration)
    settings = network_kwargs(settings_of(configuration_manager), topology)
    unused = unused_heads(network)
    parameters = sum(p.numel() for p in network.parameters()) - unused
    heads = f" (and {unused:,} in heads for deep supervision, which is off)" if unused else ""
    lines = [f"LGMSNet, {settings['n_stages']} levels, {parameters:,} parameters{heads}, is trained:"]
    lines += [f"  level {i + 1}: {_level(settings, i)}" for i in range(settings["n_stages"])]
    decision = kernels_for(device)
    path = "the Triton kernels" if decision.path == "kernels" else "PyTorch's operators"
    lines += [
        f"On {device} it takes {path}. {decision.reason}",
        "network_class_name and features_per_stage of the plans are those of nnU-Net's own network and not used.",
    ]
    return "\n".join(["", *lines, ""])


def _level(settings: dict[str, Any], i: int) -> str:
    encoder = settings["encoder_blocks"][i]
    decoder = settings["decoder_blocks"][i] if i < len(settings["decoder_blocks"]) else ()
    parts = [f"width {settings['features_per_stage'][i]}", f"strides {_sizes(settings['strides'][i])}"]
    parts.append(f"encoder {encoder}")
    if encoder == "LMS":
        parts[-1] += f" with kernels {', '.join(map(_sizes, settings['lms_kernels'][i]))}"
    if decoder:
        parts.append(f"decoder {' + '.join(decoder)}")
    if "GMS" in (encoder, *decoder):
        parts.append(f"GMS ratio {':'.join(map(str, settings['gms_ratio'][i]))}")
    return ", ".join(parts)


def _sizes(sizes: Sequence[int] | Iterable[int]) -> str:
    return "x".join(map(str, sizes))
