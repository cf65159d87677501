"""Norm and activation in one operator, for the instance, group and batch norms of LGMSNet.

PyTorch normalises a channels-last map by copying it to another layout, reduces it twice, and writes a map for every
activation. The kernels take the moments in one pass over the map and write activation(norm(x)) + residual in one more;
the gradient needs two passes likewise and stores nothing but x. LGMSNet puts GELU before the norm in its Fusion block
and other activations behind it elsewhere; both orders are one operator.

The bias of the convolution in front may be left to the norm, which adds it to what it loads anyway, where PyTorch would
go over the map for it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.cpu import norm_act as cpu
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.norms import normalise

#: activation after the norm; "gelu_first" is GELU before it
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}


@operator
def norm_act(
    x: Tensor, norm: nn.Module, activation: str, residual: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """activation(norm(x + bias)) + residual, or norm(gelu(x + bias)) + residual for the activation "gelu_first".

    Args:
        x: (B, C, *spatial), in either memory format.
        norm: BatchNorm, InstanceNorm or GroupNorm; any other module takes PyTorch's path.
        activation: "none", "relu", "silu", "gelu" or "gelu_first".
        residual: added last, (B, C, *spatial).
        bias: a number for each channel, (C,), or None.

    Returns:
        (B, C, *spatial), where the kernels run channels-last and in the dtype of x.
    """
    if use_kernels(x):
        from nnunet_lgms.ops.triton import norm_act as kernels

        if kernels.fits(x, norm):
            return kernels.norm_act(x, norm, activation, residual, bias)
        x = to_channels_last(x)
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    if activation == "gelu_first":
        x, activation = F.gelu(x), "none"
    if cpu.fits(x, norm):
        return cpu.norm_act(x, norm, activation, residual)
    out = ACTIVATIONS[activation](normalise(x, norm))
    return out if residual is None else out + residual
