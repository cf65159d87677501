"""Attention inside sequences of tokens, from the joined projection to queries, keys and values.

The published heads have 8 channels. PyTorch's fused kernels work on tiles for 32 or 64, and so do several times the
arithmetic; where the kernels run, small heads have their own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels


@operator
def attention(qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head; the (N, N) matrix is never stored.

    Args:
        qkv: (B, P, N, 3, heads, D): queries, keys and values of B * P sequences of N tokens.
        mask: (P, N), True where a key may be attended, at least one in each sequence; all of them if None.

    Returns:
        (B, P, N, heads * D).
    """
    if use_kernels(qkv):
        from nnunet_lgms.ops.triton import attention as kernels

        if kernels.fits(qkv):
            return kernels.attention(qkv, mask)
    batch, groups, tokens = qkv.shape[:3]
    q, k, v = (t.transpose(1, 2) for t in qkv.flatten(0, 1).unbind(2))  # (B * P, heads, N, D)
    if mask is not None:
        # one row of keys, broadcast over queries
        mask = mask.expand(batch, -1, -1).reshape(batch * groups, 1, 1, tokens)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(batch, groups, tokens, -1)
