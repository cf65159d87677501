"""Norm, ReLU, a factor for each channel, norm and residual in one pass: what follows the depthwise convolution of GMS.

For prediction, where the statistics of both norms are known: on CUDA one operator registered with `torch.library`,
which also takes the depthwise convolution's result as that has it in memory. There is no other form: where
:func:`scaled_norms_fit` does not hold, the block is its norms one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.library import triton_op

from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.norm_act import kernels_fit_map, statistics_known


def scaled_norms_fit(x: Tensor, norm1: nn.Module, norm2: nn.Module) -> bool:
    """Prediction with known statistics, scale and shift; x is a map of the size of that to be normed."""
    return (
        not torch.is_grad_enabled()
        and kernels_fit_map(x)
        and all(statistics_known(norm) and norm.affine for norm in (norm1, norm2))
    )


def scaled_norms(x: Tensor, norm1: nn.Module, factor: Tensor, norm2: nn.Module, residual: Tensor) -> Tensor:
    """norm2(factor * relu(norm1(x))) + residual.

    Args:
        x: (B, C, *spatial), contiguous or channels-last.
        norm1: batch norm of known statistics.
        factor: of every channel, C numbers.
        norm2: batch norm of known statistics.
        residual: (B, C, *spatial).

    Returns:
        (B, C, *spatial), channels-last.
    """
    if not x.is_contiguous():
        x = to_channels_last(x)
    residual = to_channels_last(residual.to(x.dtype))
    norms = [t for n in (norm1, norm2) for t in (n.running_mean, n.running_var, n.weight, n.bias)]
    return _scaled_norms(x, *norms, factor, residual, norm1.eps, norm2.eps)


@triton_op("nnunet_lgms::scaled_norms", mutates_args=())
def _scaled_norms(
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    factor: Tensor,
    residual: Tensor,
    eps1: float,
    eps2: float,
) -> Tensor:
    """With given statistics, (C,); for prediction, it has no gradient."""
    from nnunet_lgms.ops.triton import scaled_norms as scaled_norms_triton

    norms = mean1, variance1, weight1, bias1, mean2, variance2, weight2, bias2
    return scaled_norms_triton.apply(x, norms, factor, residual, eps1, eps2)
