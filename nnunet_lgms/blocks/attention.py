"""Sparse self-attention over position groups (LGMSNet, arXiv 2508.15476, section 3.3; the unfolding of MobileViT).

The map is cut into patches of ``p`` pixels per axis. All pixels that sit at the same place inside their patch form one
sequence, so N pixels become p^d sequences of N / p^d tokens. Attention runs inside a sequence only: its cost falls by
p^d against full attention, and every sequence still spans the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lgms.ops.backend import HALF, use_kernels
from nnunet_lgms.ops.upsample import crop


def unfold_positions(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, *spatial) -> (B, P, N, C): P = prod(patch) position groups, N tokens each, row-major over patches.

    Every axis of ``x`` must be divisible by its ``patch``.
    """
    dim = len(patch)
    split = [n for size, p in zip(x.shape[2:], patch, strict=True) for n in (size // p, p)]
    x = x.movedim(1, -1).reshape(x.shape[0], *split, x.shape[1])
    patch_axes, position_axes = range(1, 1 + 2 * dim, 2), range(2, 2 + 2 * dim, 2)
    x = x.permute(0, *position_axes, *patch_axes, 1 + 2 * dim)
    return x.reshape(x.shape[0], math.prod(patch), -1, x.shape[-1])


def fold_positions(tokens: Tensor, patch: Sequence[int], spatial: Sequence[int]) -> Tensor:
    """Inverse of :func:`unfold_positions`; (B, P, N, C) -> (B, C, *spatial)."""
    dim = len(patch)
    n_patches = [size // p for size, p in zip(spatial, patch, strict=True)]
    x = tokens.reshape(tokens.shape[0], *patch, *n_patches, tokens.shape[-1])
    interleaved = [axis for i in range(dim) for axis in (1 + dim + i, 1 + i)]
    x = x.permute(0, *interleaved, 1 + 2 * dim)
    # Channels stay innermost in memory: the convolutions behind want them there, and so does the copy.
    return x.reshape(x.shape[0], *spatial, x.shape[-1]).movedim(-1, 1)


def real_token_mask(spatial: Sequence[int], patch: Sequence[int], device: torch.device) -> Tensor:
    """(1, P, 1, 1, N) mask, True where a key may be attended, for a map of ``spatial`` pixels padded up to ``patch``.

    A position group that lies in the padding altogether (an axis shorter than its patch) may attend everything: its
    output is cropped away, and a row without any key would give NaN gradients.
    """
    padded = [size + -size % p for size, p in zip(spatial, patch, strict=True)]
    real = torch.ones((1, 1, *spatial), dtype=torch.bool, device=device)
    real = F.pad(real, end_padding(spatial, padded))
    mask = unfold_positions(real, patch)[..., 0]
    mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask[:, :, None, None, :]


def end_padding(spatial: Sequence[int], padded: Sequence[int]) -> list[int]:
    """``F.pad``'s argument that grows ``spatial`` to ``padded`` at the far end of every axis."""
    return [n for size, target in zip(reversed(spatial), reversed(padded), strict=True) for n in (0, target - size)]


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that stays in half precision where autocast on a GPU would write float32 for it.

    Sums are in float32 all the same, and the layers behind round what they get to half precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(*, C) -> (*, C)."""
        if x.dtype not in HALF or not use_kernels(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionGroupAttention(nn.Module):
    """Multi-head self-attention inside each position group, through PyTorch's fused kernels.

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
        """(B, P, N, C) -> (B, P, N, C); ``mask`` (1, P, 1, 1, N) is True where a key may be attended."""
        b, p, n, _ = tokens.shape
        qkv = self.qkv(tokens).view(b * p, n, 3, self.n_heads, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        if mask is not None:
            mask = mask.expand(b, -1, -1, -1, -1).reshape(b * p, 1, 1, n)  # one row of keys, broadcast over queries
        # (B * P, heads, N, head_dim); the (N, N) attention matrix is never stored
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, p, n, -1))


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
        self.norm1 = LayerNorm(channels)
        self.attention = PositionGroupAttention(channels, n_heads, head_dim)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, mlp_channels), nn.SiLU(), nn.Linear(mlp_channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        spatial = tuple(x.shape[2:])
        padded = tuple(size + -size % p for size, p in zip(spatial, self.patch, strict=True))
        mask = None
        if padded != spatial:
            x = F.pad(x, end_padding(spatial, padded))
            mask = real_token_mask(spatial, self.patch, x.device)

        tokens = unfold_positions(x, self.patch)
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        tokens = tokens + self.feed_forward(self.norm2(tokens))
        return crop(fold_positions(tokens, self.patch, padded), spatial)
