"""Dense "same" convolution for maps with many voxels and few channels.

At full resolution LGMSNet has 4 to 64 channels where cuDNN's kernels are made for hundreds: on an H100 its input
gradients there take twice as long as its forward pass, and grouped convolutions several times as long. Channels-last
maps of that kind go to an implicit matrix product in Triton (`conv_triton.py`); everything else, and everything when
the environment variable NNUNET_LGMS_KERNELS is `off`, is `F.conv2d` / `F.conv3d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from nnunet_lgms.ops.backend import CHANNELS_LAST, HALF, channels_last, compute_dtype, use_kernels

CONV = {2: F.conv2d, 3: F.conv3d}
MAX_CHANNELS = {1: 64, 3: 32}  # by kernel along x: what fits shared memory
MIN_VOXELS = 1 << 20  # with fewer, cuDNN's kernels are as good


def same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Stride-1 convolution with zero padding that keeps the size.

    Args:
        x: (B, C_in, H, W) or (B, C_in, D, H, W).
        weight: (C_out, C_in / groups, *k), odd k.
        bias: (C_out,) or None.
        groups: groups of channels that are convolved apart.

    Returns:
        (B, C_out, *spatial) in the dtype of x, or of autocast where that is on.
    """
    dtype = compute_dtype(x)
    if use_kernels(x) and channels_last(x) and dtype in HALF and _fits_kernels(x, weight, groups):
        bias = None if bias is None else bias.to(dtype)
        return _convolve(x.to(dtype), _dense(weight.to(dtype), groups), bias)
    return CONV[x.ndim - 2](x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=groups)


def _dense(weight: Tensor, groups: int) -> Tensor:
    """Block-diagonal dense weight of a grouped one: on these maps a product with zeros costs less than half a cache "
    "line."""
    if groups == 1:
        return weight
    c_in = weight.shape[1]
    axes = (0, 0) * (weight.ndim - 2)
    blocks = weight.chunk(groups)
    return torch.cat([F.pad(w, (*axes, i * c_in, (groups - 1 - i) * c_in)) for i, w in enumerate(blocks)])


def _fits_kernels(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Few channels, many voxels, kernels 1 or 3, offsets that fit 32 bits."""
    voxels = x.numel() // x.shape[1]
    widest = max(weight.shape[0], weight.shape[1] * groups)
    return (
        all(k in (1, 3) for k in weight.shape[2:])
        and widest <= MAX_CHANNELS[weight.shape[-1]]
        and voxels >= MIN_VOXELS
        and voxels * widest < 2**31
    )


@triton_op("nnunet_lgms::same_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from nnunet_lgms.ops import conv_triton

    return conv_triton.convolve(x, weight, bias)


def _setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    axes = tuple(range(2, x.ndim))
    grad = grad.contiguous(memory_format=CHANNELS_LAST[x.ndim])
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _convolve(grad, weight.flip(axes).transpose(0, 1), None)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(grad, x, weight)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, *axes), dtype=torch.float32).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN's; of the three products of a convolution it is the one that cuDNN does well on narrow maps."""
    one, padding = [1] * (x.ndim - 2), [k // 2 for k in weight.shape[2:]]
    mask = [False, True, False]
    backward = torch.ops.aten.convolution_backward
    return backward(grad, x, weight, None, one, padding, one, False, [0] * len(one), 1, mask)[1]


_convolve.register_autograd(_backward, setup_context=_setup)
