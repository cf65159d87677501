"""Attention by the Triton kernels: operators registered with `torch.library`, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_lgms.ops.library import triton_op
from nnunet_lgms.ops.memory_format import HALF, compute_dtype
from nnunet_lgms.ops.triton import attention_kernels as kernels

MAX_CHANNELS = 28  # of a head: with more, PyTorch's kernels waste little


def fits(qkv: Tensor) -> bool:
    """Whether the kernels serve (B, P, N, 3, heads, channels): small heads, offsets that fit 32 bits."""
    _, _, tokens, _, heads, channels = qkv.shape
    return (
        compute_dtype(qkv) in (*HALF, torch.float32)
        and channels <= MAX_CHANNELS
        and tokens > 0
        and (qkv.numel() // (3 * channels) + 256 * heads) * kernels.lanes(channels) < 2**31
    )


def attention(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """(B, P, N, 3, heads, channels), mask (P, N) -> (B, P, N, heads * channels)."""
    batch, groups, tokens = qkv.shape[:3]
    qkv = qkv.to(compute_dtype(qkv)).flatten(0, 1).contiguous()
    out, _ = _attention(qkv, None if mask is None else mask.contiguous(), _precision(qkv.dtype))
    return out.view(batch, groups, tokens, -1)


@triton_op("nnunet_lgms::attention", mutates_args=())
def _attention(qkv: Tensor, mask: Tensor | None, precision: str) -> tuple[Tensor, Tensor]:
    """(S, N, 3, heads, channels) -> (S, N, heads, channels), and the logarithms of the sums of each softmax."""
    return kernels.forward(qkv, mask, precision)


@triton_op("nnunet_lgms::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, qkv: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, precision: str
) -> Tensor:
    return kernels.backward(grad, qkv, mask, out, lse, precision)


def _setup(ctx, inputs, output):
    qkv, mask, ctx.precision = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # see norm_act.py
    ctx.save_for_backward(qkv, mask, out, lse)


def _backward(ctx, grad, _):
    qkv, mask, out, lse = ctx.saved_tensors
    return _attention_backward(grad.contiguous(), qkv, mask, out, lse, ctx.precision), None, None


_attention.register_autograd(_backward, setup_context=_setup)


def _precision(dtype: torch.dtype) -> str:
    """The precision of tl.dot, which matters for float32 only."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"
