"""The sums over the voxels of logits that cross entropy and soft Dice are made of, by one pass over the logits.

PyTorch makes them of maps: a softmax, its logarithm, a one-hot target and their products, each written to memory and
read again, and in float32. The kernels read logits and labels and write a few numbers; the gradient reads both once
more and writes that of the logits. A loss of the sums is then arithmetic on (B, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels


@operator
def softmax_sums(logits: Tensor, labels: Tensor, ignored: int | None = None) -> Tensor | None:
    """Sums over the voxels of each sample, for p = softmax(logits) and labels as they are or one-hot.

    Args:
        logits: (B, C, *spatial), in either memory format; channels-last, as LGMSNet's are, takes less time.
        labels: (B, 1, *spatial), of any dtype; their fractions are cut off. One that is no class makes the sums NaN.
        ignored: voxels of this label take no part, if it is given.

    Returns:
        (B, 4, C) in float32: of p where the label is the class, of p, of the voxels whose label is the class, and of
        -log(p) over those. None where the kernels do not run: losses have PyTorch's way to what they are.
    """
    if torch.compiler.is_compiling() or not use_kernels(logits):
        return None
    from nnunet_lgms.ops.triton import softmax_sums as kernels

    if not kernels.fits(logits, labels):
        return None
    return kernels.softmax_sums(logits, labels.contiguous(), ignored)
