"""The operators that LGMSNet is made of.

Each has PyTorch's path in a module of its own, and forms that are faster on some devices, which are private: Triton
kernels (`triton/`) and CPU forms (`cpu/`). :mod:`nnunet_lgms.ops.backend` chooses; who calls an operator asks nothing.
"""

from nnunet_lgms.ops.attention import attention
from nnunet_lgms.ops.backend import kernels, kernels_for, set_kernels
from nnunet_lgms.ops.bottleneck import conv_bottleneck
from nnunet_lgms.ops.concatenate import concatenate
from nnunet_lgms.ops.conv import conv_norm_act, logits, same_conv
from nnunet_lgms.ops.depthwise import multi_kernel_depthwise
from nnunet_lgms.ops.layout import to_fastest_layout
from nnunet_lgms.ops.linear import linear
from nnunet_lgms.ops.max_pool import max_pool
from nnunet_lgms.ops.norm_act import norm_act
from nnunet_lgms.ops.recompute import keeping_little
from nnunet_lgms.ops.softmax_sums import softmax_sums
from nnunet_lgms.ops.tokens import add_norm, fold_add, unfold_norm
from nnunet_lgms.ops.upsample import linear_upsample

__all__ = [
    "add_norm",
    "attention",
    "concatenate",
    "conv_bottleneck",
    "conv_norm_act",
    "fold_add",
    "keeping_little",
    "kernels",
    "kernels_for",
    "linear",
    "linear_upsample",
    "logits",
    "max_pool",
    "multi_kernel_depthwise",
    "norm_act",
    "same_conv",
    "set_kernels",
    "softmax_sums",
    "to_fastest_layout",
    "unfold_norm",
]
