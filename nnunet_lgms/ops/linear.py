"""Linear layer over tokens.

The product is the libraries' everywhere; what PyTorch is slow at is the gradient of the bias, a sum over all tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from nnunet_lgms.ops.backend import operator, use_kernels


@operator
def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)``, (..., C_in) -> (..., C_out)."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import conv as kernels

        if kernels.fits_linear(x, layer):
            return kernels.linear(x, layer.weight, layer.bias)
    return layer(x)
