"""Dense "same" convolution for maps with many voxels and few channels.

At full resolution LGMSNet has 4 to 64 channels where cuDNN's kernels are made for hundreds: on an H100 its input
gradients there take twice as long as its forward pass, and grouped convolutions several times as long. Channels-last
maps of that kind go to an implicit matrix product in Triton (`conv_triton.py`), forward and input gradient; weight
gradients are cuDNN's. Everything else, and everything when the environment variable NNUNET_LGMS_KERNELS is `off`, is
`F.conv2d` / `F.conv3d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from nnunet_lgms.ops.backend import HALF, channels_last, compute_dtype, use_kernels
from nnunet_lgms.ops.layout import to_channels_last

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
        return _convolve(x.to(dtype), weight, bias, groups, False)
    return CONV[x.ndim - 2](x, weight, bias, padding=[k // 2 for k in weight.shape[2:]], groups=groups)


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
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, mirrored: bool) -> Tensor:
    """The convolution, or (mirrored) the one that takes its output's gradient to its input's."""
    from nnunet_lgms.ops import conv_triton

    return conv_triton.convolve(x, weight, bias, groups, mirrored)


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.groups, ctx.mirrored = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad = to_channels_last(grad)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _convolve(grad, weight, None, ctx.groups, not ctx.mirrored)
    if ctx.needs_input_grad[1]:
        sides = (x, grad) if ctx.mirrored else (grad, x)
        grad_weight = _weight_gradient(*sides, weight, ctx.groups)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = _bias_gradient(grad).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None


_convolve.register_autograd(_backward, setup_context=_setup)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias of :func:`same_conv` (one group), from that of its result, channels-last.

    For the backward pass of an operator that contains a convolution; ``x`` in the dtype that it was convolved in.
    """
    grad = grad.to(x.dtype)
    if use_kernels(x) and channels_last(x) and x.dtype in HALF and _fits_kernels(x, weight, 1):
        grad_x = _convolve(grad, weight, None, 1, True)
    else:
        grad_x = _aten_gradient(grad, x, weight.to(x.dtype), 0)
    grad_weight = _aten_gradient(grad, x, weight.to(x.dtype), 1).to(weight.dtype)
    return grad_x, grad_weight, None if bias is None else _bias_gradient(grad).to(bias.dtype)


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.ndim)], dtype=torch.float32)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """cuDNN's: the one of a convolution's three products that it does well on narrow maps, unless it is grouped.

    So groups are multiplied all with all, and what belongs to no pair of them is dropped.
    """
    out_channels, channels, *kernel = weight.shape
    dense = _aten_gradient(grad, x, grad.new_empty((out_channels, channels * groups, *kernel)), 1)
    blocks = [w[:, i * channels : (i + 1) * channels] for i, w in enumerate(dense.chunk(groups))]
    return torch.cat(blocks).to(weight.dtype)


def _aten_gradient(grad: Tensor, x: Tensor, weight: Tensor, of: int) -> Tensor:
    """PyTorch's gradient of x (0) or of weight (1)."""
    kernel = weight.shape[2:]
    one, padding, zero = [1] * len(kernel), [k // 2 for k in kernel], [0] * len(kernel)
    mask = [of == 0, of == 1, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, one, padding, one, False, zero, 1, mask)[of]
