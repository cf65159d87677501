"""Max pooling with kernel = stride, sizes rounded up, in the memory format of its input.

PyTorch's 3D pooling on CUDA knows no channels-last: it would copy the map to another layout, and every convolution
behind it would copy it back. Windows do not overlap here, so the gradient needs no stored indices: it finds the
maximum again. On CUDA these are two operators registered with `torch.library`; everything else, and everything when
the environment variable NNUNET_LGMS_KERNELS is `off`, is `F.max_pool2d` / `F.max_pool3d`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, channels_last

MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, C, *ceil(spatial / stride)); the last window of an axis may be smaller."""
    if use_kernels(x) and channels_last(x) and x.dtype in (*HALF, torch.float32) and x.numel() < 2**31:
        return _pool(x, list(stride))
    return MAX_POOL[x.ndim - 2](x, tuple(stride), tuple(stride), ceil_mode=True)


@triton_op("nnunet_lgms::max_pool", mutates_args=())
def _pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    from nnunet_lgms.ops.triton import max_pool as max_pool_triton

    return max_pool_triton.pool(x, stride)


@triton_op("nnunet_lgms::max_pool_backward", mutates_args=())
def _pool_backward(grad: Tensor, x: Tensor, stride: Sequence[int]) -> Tensor:
    from nnunet_lgms.ops.triton import max_pool as max_pool_triton

    return max_pool_triton.pool_backward(grad, x, stride)


def _setup(ctx, inputs, output):
    x, ctx.stride = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return _pool_backward(to_channels_last(grad), x, ctx.stride), None


_pool.register_autograd(_backward, setup_context=_setup)
