"""Between a map and the tokens of its position groups, with the norms of the transformer on the way.

A pre-norm transformer layer reads and writes its tokens far more often than its products do: cut out of the map,
normed, added to, normed, added to and put back, each a pass over memory, and PyTorch's layer norm is slow on rows of
less than a hundred channels, its gradient slower still. Where the kernels run, one pass does what lies between two
products: :func:`unfold_norm` before the attention, :func:`add_norm` before the feed-forward part, :func:`fold_add`
behind it. The map may have more channels than the tokens: this rest is handed on apart, so that nobody has to split and
concatenate maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.concatenate import concatenate, split
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


def padded_size(spatial: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """``spatial``, rounded up to whole patches."""
    return tuple(size + -size % p for size, p in zip(spatial, patch, strict=True))


def end_padding(spatial: Sequence[int], padded: Sequence[int]) -> list[int]:
    """``F.pad``'s argument that grows ``spatial`` to ``padded`` at the far end of every axis."""
    return [n for size, target in zip(reversed(spatial), reversed(padded), strict=True) for n in (0, target - size)]


@operator
def unfold_norm(x: Tensor, norm: nn.LayerNorm, patch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens of a map, the same normed, and the rest of its channels.

    Args:
        x: (B, C + R, *spatial), padded with zeros at the far end of its axes up to whole patches.
        norm: of the tokens' C channels.
        patch: pixels of a patch per axis.

    Returns:
        Tokens and normed tokens of the first C channels, (B, P, N, C), see :func:`unfold_positions`; the rest,
        (B, R, *spatial), or None if there is none.
    """
    (channels,) = norm.normalized_shape
    others = x.shape[1] - channels
    padded = padded_size(x.shape[2:], patch)
    if use_kernels(x):
        from nnunet_lgms.ops.triton import tokens as kernels

        if kernels.fits_map(x, padded, norm):
            tokens, normed, rest = kernels.unfold_norm(x, norm.weight, norm.bias, norm.eps, list(patch))
            return tokens, normed, rest if others else None
    x, rest = split(x, [channels, others]) if others else (x, None)
    if padded != tuple(x.shape[2:]):
        x = F.pad(x, end_padding(x.shape[2:], padded))
    tokens = unfold_positions(x, patch)
    return tokens, norm(tokens), rest


@operator
def add_norm(tokens: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(B, P, N, C) twice -> their sum, and the sum normed."""
    if use_kernels(tokens):
        from nnunet_lgms.ops.triton import tokens as kernels

        if kernels.fits(tokens, norm):
            update = update.to(tokens.dtype).contiguous()
            return kernels.add_norm(tokens.contiguous(), update, norm.weight, norm.bias, norm.eps)
    tokens = tokens + update
    return tokens, norm(tokens)


@operator
def fold_add(
    tokens: Tensor, update: Tensor, rest: Tensor | None, patch: Sequence[int], spatial: Sequence[int]
) -> Tensor:
    """tokens + update, put back into a map, with the rest of its channels behind them.

    Args:
        tokens: (B, P, N, C).
        update: (B, P, N, C).
        rest: (B, R, *spatial) or None.
        patch: pixels of a patch per axis.
        spatial: size of the map; what lies in the padding is dropped.

    Returns:
        (B, C + R, *spatial).
    """
    if use_kernels(tokens):
        from nnunet_lgms.ops.triton import tokens as kernels

        if kernels.fits(tokens, rest=rest):
            return kernels.fold_add(tokens, update, rest, patch, spatial)
    x = crop(fold_positions(tokens + update, patch, padded_size(spatial, patch)), spatial)
    return x if rest is None else concatenate([x, rest])
