"""What the published network costs, beside the networks that it is compared with; no data set is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.config import LGMSSettings
from nnunet_lgms.config.planned import MOST_FEATURES, nnunet_levels
from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.nnunet.builder import unused_heads
from nnunet_lgms.planning.override import build_on_meta
from nnunet_lgms.planning.profile import count_gmac

#: channels of the image, classes and patch of the figures that the paper gives
CASES = {2: (3, 1, (256, 256)), 3: (1, 14, (96, 96, 96))}
PUBLISHED = "as published"
#: of networks that are not built here: parameters, GFLOPs, source
TRANSUNET = {
    "network": "TransUNet",
    "parameters": 105_320_000,
    "gflops": 38.52,
    "source": "arXiv 2405.06880, table 1, at 256x256",
}


def paper_profiles(dim: int) -> list[dict[str, Any]]:
    """Parameters and GMAC of one patch, of the published LGMSNet and of those beside it.

    Heads that no output comes from are left out of the parameters.

    Args:
        dim: 2 or 3.

    Returns:
        one table a network, with "network", "parameters", "unused_heads" and "gmac"; of TransUNet, in 2D, what its
        source says: "gflops" in place of "gmac", and "source".
    """
    channels, _, patch = CASES[dim]
    profiles = []
    for name, network in _networks(dim):
        unused = unused_heads(network)
        profiles.append(
            {
                "network": name,
                "parameters": sum(p.numel() for p in network.parameters()) - unused,
                "unused_heads": unused,
                "gmac": count_gmac(network, (1, channels, *patch)),
            }
        )
    return [*profiles, TRANSUNET] if dim == 2 else profiles


def _networks(dim: int) -> Iterator[tuple[str, nn.Module]]:
    """Names and networks, which are on the meta device."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    channels, classes, patch = CASES[dim]
    strides, kernels = nnunet_levels((1.0,) * dim, patch)
    planned = {
        "input_channels": channels,
        "num_classes": classes,
        "conv_op": nn.Conv2d if dim == 2 else nn.Conv3d,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
    }
    levels = {"n_stages": len(strides), "strides": strides, "kernel_sizes": kernels}
    levels["features_per_stage"] = [min(32 * 2**i, MOST_FEATURES[dim]) for i in range(len(strides))]
    five = {"n_stages": 5, "strides": [1, 2, 2, 2, 2], "kernel_sizes": 3}
    classic = five | {"features_per_stage": [64, 128, 256, 512, 1024]}
    plain = LGMSSettings.from_plan({"block_by_level": {"encoder": "Conv", "decoder": "Conv"}})
    topology = Topology(patch, ((1,) * dim, *((2,) * dim,) * 4), ((3,) * dim,) * 5)
    with torch.device("meta"):
        yield "LGMSNet", LGMSNet.paper(channels, classes, dim)
        yield "U-Net, LGMSNet's widths (plain_unet)", build_on_meta(plain, topology, channels, classes)
        yield (
            "U-Net, widths 64 to 1024",
            PlainConvUNet(**planned, **classic, n_conv_per_stage=2, n_conv_per_stage_decoder=2),
        )
        yield (
            f"nnU-Net's U-Net, {len(strides)} stages",
            PlainConvUNet(**planned, **levels, n_conv_per_stage=2, n_conv_per_stage_decoder=2),
        )
        blocks = [1, 3, 4, 6, 6, 6, 6][: len(strides)]
        yield (
            f"nnU-Net's ResEnc M, {len(strides)} stages",
            ResidualEncoderUNet(**planned, **levels, n_blocks_per_stage=blocks, n_conv_per_stage_decoder=1),
        )


def paper_table(dim: int, profiles: list[dict[str, Any]]) -> str:
    """The profiles as text, one line a network."""
    channels, classes, patch = CASES[dim]
    left = max(len(p["network"]) for p in profiles)
    lines = [
        f"{dim}D: patches of {'x'.join(map(str, patch))}, {channels} channel(s) in, {classes} out",
        f"  {'':{left}}  {'parameters':>13}  {'GMAC':>8}",
    ]
    for profile in profiles:
        if "gmac" in profile:
            numbers = f"{profile['parameters']:>13,}  {profile['gmac']:>8.2f}"
        else:
            millions, gflops = profile["parameters"] / 1e6, f"{profile['gflops']:.2f} GFLOPs"
            numbers = f"{millions:>11.2f} M  {gflops}, {PUBLISHED} ({profile['source']}), not measured"
        lines.append(f"  {profile['network']:{left}}  {numbers}")
    return "\n".join(lines)
