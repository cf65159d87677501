"""Concatenating and splitting maps along their channels.

It is a copy of runs of channels, at the speed of memory. The loops that Inductor writes for it in channels-last maps
take four times as long on an H100, and a slice that is not copied is copied by cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last


@operator
def concatenate(xs: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, *spatial) -> (B, sum of C_i, *spatial)."""
    if len(xs) == 1:
        return xs[0]
    if use_kernels(xs[0]):
        from nnunet_lgms.ops.triton import concatenate as kernels

        return kernels.concatenate(xs)
    return torch.cat(list(xs), dim=1)


@operator
def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(B, C, *spatial) -> maps of ``sizes`` channels, contiguous in the memory format of x."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import concatenate as kernels

        if kernels.fits([x]) and min(sizes) > 0:
            return kernels.split(x, sizes)
    memory_format = CHANNELS_LAST[x.ndim] if channels_last(x) else torch.contiguous_format
    return [part.contiguous(memory_format=memory_format) for part in x.split(list(sizes), dim=1)]
