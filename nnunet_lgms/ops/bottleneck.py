"""Grouped convolution and inverted bottleneck of the Fusion block (LGMSNet, arXiv 2508.15476, section 3.4).

The bottleneck's wide map has four times the channels of the block's result, at full resolution: read and written ten
times in a training step, it was the largest part of the step's memory. Where the kernels run it is never stored: every
pass computes it again from the narrow input, in registers. On the CPU it goes piece by piece through the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.conv import conv_norm_act, same_conv
from nnunet_lgms.ops.cpu import bottleneck as cpu
from nnunet_lgms.ops.norm_act import norm_act

ACTIVATION = "gelu_first"


@operator
def conv_bottleneck(
    x: Tensor | Sequence[Tensor], conv: _ConvNd, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd
) -> Tensor:
    """squeeze(norm2(gelu(expand(norm1(gelu(conv(x))))))).

    Args:
        x: (B, D, *spatial), or one map for each group of the convolution.
        conv: convolution of D channels, stride 1, "same" padding.
        norm1: norm of D channels.
        expand: 1x1 convolution to H channels.
        norm2: norm of H channels.
        squeeze: 1x1 convolution to C channels.

    Returns:
        (B, C, *spatial).
    """
    first = x if isinstance(x, Tensor) else x[0]
    if use_kernels(first):
        from nnunet_lgms.ops.triton import bottleneck as kernels

        if kernels.fits(first, norm1, expand, norm2, squeeze):
            x = same_conv(x, conv.weight, conv.bias, conv.groups)
            return kernels.inverted_bottleneck(x, norm1, expand, norm2, squeeze)
        x = conv_norm_act(x, conv, norm1, ACTIVATION)
    else:
        x = same_conv(x, conv.weight, conv.bias, conv.groups)
        if cpu.fits(x, norm1, norm2):
            return cpu.inverted_bottleneck(x, norm1, expand, norm2, squeeze)
        x = norm_act(x, norm1, ACTIVATION)
    x = conv_norm_act(x, expand, norm2, ACTIVATION)
    return same_conv(x, squeeze.weight, squeeze.bias)
