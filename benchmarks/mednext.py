"""A U-Net of MedNeXt blocks, the size of MedNeXt-S with kernel 5, as a peer in the benchmarks.

After Roy et al., MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation, MICCAI 2023 (arXiv
2303.09975), section 2 and table 1: 32 channels at full resolution, doubled four times; two blocks per level; depthwise
convolution of kernel 5, norm per channel, expansion by 2, GELU, compression; residual up and down blocks. Its parts are
PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
WIDTH, LEVELS, BLOCKS, KERNEL, EXPANSION = 32, 5, 2, 5, 2


class Block(nn.Module):
    """Depthwise convolution, norm, expansion, GELU, compression, and a residual; stride 2 down or up on request."""

    def __init__(self, dim: int, channels: int, out_channels: int, resample: str = ""):
        super().__init__()
        conv = CONV[dim]
        shared = {"groups": channels, "padding": KERNEL // 2}
        if resample == "up":
            self.depthwise = TRANSPOSED[dim](channels, channels, KERNEL, 2, output_padding=1, **shared)
            self.shortcut = TRANSPOSED[dim](channels, out_channels, 1, 2, output_padding=1)
        elif resample == "down":
            self.depthwise = conv(channels, channels, KERNEL, 2, **shared)
            self.shortcut = conv(channels, out_channels, 1, 2)
        else:
            self.depthwise = conv(channels, channels, KERNEL, **shared)
            self.shortcut = nn.Identity()
        self.mix = nn.Sequential(
            nn.GroupNorm(channels, channels),
            conv(channels, EXPANSION * channels, 1),
            nn.GELU(),
            conv(EXPANSION * channels, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C_out, *spatial), half or twice the size with ``resample``."""
        return self.shortcut(x) + self.mix(self.depthwise(x))


class MedNeXtS(nn.Module):
    """(B, C, *spatial) -> (B, classes, *spatial), for sizes that divide by 16."""

    def __init__(self, dim: int, input_channels: int, classes: int):
        super().__init__()
        widths = [WIDTH * 2**i for i in range(LEVELS)]
        self.stem = CONV[dim](input_channels, WIDTH, 1)
        self.encoder = nn.ModuleList(nn.Sequential(*(Block(dim, w, w) for _ in range(BLOCKS))) for w in widths)
        self.downs = nn.ModuleList(Block(dim, w, 2 * w, "down") for w in widths[:-1])
        self.ups = nn.ModuleList(Block(dim, 2 * w, w, "up") for w in widths[:-1])
        self.decoder = nn.ModuleList(nn.Sequential(*(Block(dim, w, w) for _ in range(BLOCKS))) for w in widths[:-1])
        self.head = CONV[dim](WIDTH, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for stage, down in zip(self.encoder, self.downs):
            skips.append(stage(x))
            x = down(skips[-1])
        x = self.encoder[-1](x)
        for up, stage in zip(reversed(self.ups), reversed(self.decoder)):
            x = stage(torch.add(skips.pop(), up(x)))
        return self.head(x)
