"""Operators that PyTorch has no fast version of."""

from nnunet_lgms.ops.depthwise import multi_kernel_depthwise

__all__ = ["multi_kernel_depthwise"]
