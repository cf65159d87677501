"""Sparse self-attention over position groups (LGMSNet, arXiv 2508.15476, section 3.3; the unfolding of MobileViT).

The map is cut into patches of ``p`` pixels per axis. All pixels that sit at the same place inside their patch form one
sequence, so N pixels become p^d sequences of N / p^d tokens. Attention runs inside a sequence only: its cost falls by
p^d against full attention, and every sequence still spans the whole map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lgms.ops import add_norm, attention, fold_add, linear, unfold_norm
from nnunet_lgms.ops.tokens import end_padding, padded_size, unfold_positions


def real_token_mask(spatial: Sequence[int], patch: Sequence[int], device: torch.device) -> Tensor:
    """(P, N) mask, True where a key may be attended, for a map of ``spatial`` pixels padded up to ``patch``.

    A position group that lies in the padding altogether (an axis shorter than its patch) may attend everything: its
    output is cropped away, and a row without any key would give NaN gradients.
    """
    padded = padded_size(spatial, patch)
    real = torch.ones((1, 1, *spatial), dtype=torch.bool, device=device)
    real = F.pad(real, end_padding(spatial, padded))
    mask = unfold_positions(real, patch)[0, ..., 0]
    return mask | ~mask.any(dim=-1, keepdim=True)


class PositionGroupAttention(nn.Module):
    """Multi-head self-attention inside each position group.

    Args:
        channels: channels of a token.
        n_heads: attention heads (paper: 4).
        head_dim: channels of a head (paper: 8).
    """

    def __init__(self, channels: int, n_heads: int = 4, head_dim: int = 8):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * n_heads * head_dim, bias=False)
        self.proj = nn.Linear(n_heads * head_dim, channels)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, P, N, C) -> (B, P, N, C); ``mask`` (P, N) is True where a key may be attended."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.n_heads, self.head_dim))
        return linear(attention(qkv, mask), self.proj)


class SparseTransformer(nn.Module):
    """One pre-norm Transformer layer over position groups, for maps of any size.

    A map that does not divide by ``patch`` is padded at the far end of its axes, attends under a mask so that padding
    never reaches a real token, and is cropped again. No position embedding, no dropout.

    Args:
        channels: channels of the map.
        mlp_channels: hidden channels of the feed-forward part.
        patch: pixels of a patch per axis (paper: 2).
        n_heads: attention heads (paper: 4).
        head_dim: channels of a head (paper: 8).
    """

    def __init__(self, channels: int, mlp_channels: int, patch: Sequence[int], n_heads: int = 4, head_dim: int = 8):
        super().__init__()
        self.patch = tuple(patch)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = PositionGroupAttention(channels, n_heads, head_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, mlp_channels), nn.SiLU(), nn.Linear(mlp_channels, channels)
        )

    def forward(self, x: Tensor, branch: nn.Module | None = None) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial); the channels behind those of the transformer go through ``branch``."""
        spatial = tuple(x.shape[2:])
        mask = None
        if padded_size(spatial, self.patch) != spatial:
            mask = real_token_mask(spatial, self.patch, x.device)

        tokens, normed, rest = unfold_norm(x, self.norm1, self.patch)
        tokens, normed = add_norm(tokens, self.attention(normed, mask), self.norm2)
        widen, activation, narrow = self.feed_forward
        update = linear(activation(linear(normed, widen)), narrow)
        if branch is not None:
            rest = branch(rest)
        return fold_add(tokens, update, rest, self.patch, spatial)
