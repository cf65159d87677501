"""Norm, ReLU, a factor for each channel, norm and residual: what follows the depthwise convolution of GMS.

In prediction, where the statistics of both norms are known, the kernel does it in one pass, and takes the depthwise
convolution's result as that has it in memory.
"""

from __future__ import annotations

from torch import Tensor, nn

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.norm_act import norm_act


@operator
def scaled_norms(x: Tensor, norm1: nn.Module, factor: Tensor, norm2: nn.Module, residual: Tensor) -> Tensor:
    """norm2(factor * relu(norm1(x))) + residual.

    Args:
        x: (B, C, *spatial), in either memory format.
        norm1: norm of C channels.
        factor: of every channel, C numbers in any shape, such as the weight of a depthwise 1-kernel.
        norm2: norm of C channels.
        residual: (B, C, *spatial).

    Returns:
        (B, C, *spatial), in the memory format of the residual.
    """
    if use_kernels(x):
        from nnunet_lgms.ops.triton import scaled_norms as kernels

        if kernels.fits(x, norm1, norm2):
            return kernels.scaled_norms(x, norm1, factor, norm2, residual)
    x = norm_act(x, norm1, "relu")
    x = x * factor.to(x.dtype).view(1, -1, *(1,) * (x.ndim - 2))
    return norm_act(x, norm2, "none", residual)
