"""Max pooling with kernel = stride, sizes rounded up, in the memory format of its input.

PyTorch's 3D pooling on CUDA knows no channels-last: it would copy the map to another layout, and every convolution
behind it would copy it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels

MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


@operator
def max_pool(x: Tensor, stride: Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, C, *ceil(spatial / stride)); the last window of an axis may be smaller."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import max_pool as kernels

        if kernels.fits(x):
            return kernels.max_pool(x, list(stride))
    return MAX_POOL[x.ndim - 2](x, tuple(stride), tuple(stride), ceil_mode=True)
