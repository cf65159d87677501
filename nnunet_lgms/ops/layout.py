"""Between the two memory formats: channels innermost for dense convolutions and norms, x innermost for depthwise ones.

It is a transposed copy, at the speed of memory; the loops that Inductor writes for it take five times as long on an
H100.
"""

from __future__ import annotations

from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.cpu import layout as cpu
from nnunet_lgms.ops.memory_format import wants_channels_last


@operator
def to_channels_first(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import layout as kernels

        return kernels.to_channels_first(x)
    return cpu.to_channels_first(x)


@operator
def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost, and with the strides of that."""
    if use_kernels(x):
        from nnunet_lgms.ops.triton import layout as kernels

        return kernels.to_channels_last(x)
    return cpu.to_channels_last(x)


def to_fastest_layout(x: Tensor) -> Tensor:
    """x (B, C, *spatial) in the memory format in which a network runs fastest on its device.

    Tensor cores want channels innermost; any other layout costs two transposes around every convolution. On the CPU,
    the loops of pooling, upsampling and norms want it too.
    """
    return to_channels_last(x) if use_kernels(x) or wants_channels_last(x) else x
