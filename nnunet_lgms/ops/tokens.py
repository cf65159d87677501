"""Between a map and the tokens of its position groups, with the norms of the transformer on the way.

A pre-norm transformer layer reads and writes its tokens far more often than its products do: cut out of the map,
normed, added to, normed, added to and put back, each a pass over memory, and PyTorch's layer norm is slow on rows of
less than a hundred channels, its gradient slower still. Here one pass does what lies between two products:
`unfold_norm` before the attention, `add_norm` before the feed-forward part, `fold_add` behind it. The map may have more
channels than the tokens: those are handed on beside them, so that nobody has to split and join maps.

The backward passes keep tokens and nothing of their norms, which they take again. Gradients of scale and shift are
summed up in slices, joined in a fixed order. On channels-last CUDA maps these are operators registered with
`torch.library`; everything else, and everything when the environment variable NNUNET_LGMS_KERNELS is `off`, is PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import triton_op

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.channels import join_channels, split_channels
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, channels_last
from nnunet_lgms.ops.upsample import crop

MAX_CHANNELS = 512  # of a token: a program holds some of them at once


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


def unfold_norm(x: Tensor, norm: nn.LayerNorm, patch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens of a map, the same normed, and what the map has beside them.

    Args:
        x: (B, C + R, *spatial), padded with zeros at the far end of its axes up to whole patches.
        norm: of the tokens' C channels.
        patch: pixels of a patch per axis.

    Returns:
        Tokens and normed tokens of the first C channels, (B, P, N, C), see :func:`unfold_positions`; the other
        channels, (B, R, *spatial), or None if there are none.
    """
    (channels,) = norm.normalized_shape
    beside = x.shape[1] - channels
    if _kernels_fit(x, padded_size(x.shape[2:], patch), norm):
        tokens, normed, rest = _unfold_norm(x, norm.weight, norm.bias, norm.eps, list(patch))
        return tokens, normed, rest if beside else None
    x, rest = split_channels(x, [channels, beside]) if beside else (x, None)
    padded = padded_size(x.shape[2:], patch)
    if padded != tuple(x.shape[2:]):
        x = F.pad(x, end_padding(x.shape[2:], padded))
    tokens = unfold_positions(x, patch)
    return tokens, norm(tokens), rest


def add_norm(tokens: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(B, P, N, C) twice -> their sum, and the sum normed."""
    if _kernels_fit_tokens(tokens, norm):
        return _add_norm(tokens.contiguous(), update.to(tokens.dtype).contiguous(), norm.weight, norm.bias, norm.eps)
    tokens = tokens + update
    return tokens, norm(tokens)


def fold_add(
    tokens: Tensor, update: Tensor, beside: Tensor | None, patch: Sequence[int], spatial: Sequence[int]
) -> Tensor:
    """tokens + update, put back into a map, and other channels beside them.

    Args:
        tokens: (B, P, N, C).
        update: (B, P, N, C).
        beside: (B, R, *spatial) or None.
        patch: pixels of a patch per axis.
        spatial: size of the map; what lies in the padding is dropped.

    Returns:
        (B, C + R, *spatial).
    """
    if _kernels_fit_tokens(tokens) and (beside is None or beside.shape[1] <= MAX_CHANNELS):
        beside = None if beside is None else to_channels_last(beside.to(tokens.dtype))
        update = update.to(tokens.dtype).contiguous()
        return _fold_add(tokens.contiguous(), update, beside, list(patch), list(spatial))
    x = crop(fold_positions(tokens + update, patch, padded_size(spatial, patch)), spatial)
    return x if beside is None else join_channels([x, beside])


def _kernels_fit(x: Tensor, padded: Sequence[int], norm: nn.LayerNorm) -> bool:
    """Channels innermost and not too many, offsets that fit 32 bits."""
    (channels,) = norm.normalized_shape
    return (
        use_kernels(x)
        and x.dtype in (*HALF, torch.float32)
        and channels_last(x)
        and max(channels, x.shape[1] - channels) <= MAX_CHANNELS
        and x.shape[0] * x.shape[1] * math.prod(padded) < 2**31
        and norm.weight is not None
        and norm.bias is not None
    )


def _kernels_fit_tokens(tokens: Tensor, norm: nn.LayerNorm | None = None) -> bool:
    return (
        use_kernels(tokens)
        and tokens.dtype in (*HALF, torch.float32)
        and tokens.shape[-1] <= MAX_CHANNELS
        and tokens.numel() < 2**30  # the map may have twice the channels
        and (norm is None or (norm.weight is not None and norm.bias is not None))
    )


@triton_op("nnunet_lgms::unfold_norm", mutates_args=())
def _unfold_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, patch: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.unfold_norm(x, weight, bias, eps, patch)


@triton_op("nnunet_lgms::unfold_norm_backward", mutates_args=())
def _unfold_norm_backward(
    grad_tokens: Tensor,
    grad_normed: Tensor,
    grad_beside: Tensor,
    tokens: Tensor,
    weight: Tensor,
    eps: float,
    patch: list[int],
) -> tuple[Tensor, Tensor]:
    """Gradient of the map, and those of weight and bias, (2, C) in float32."""
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.unfold_norm_backward(grad_tokens, grad_normed, grad_beside, tokens, weight, eps, patch)


@triton_op("nnunet_lgms::add_norm", mutates_args=())
def _add_norm(tokens: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.add_norm(tokens, update, weight, bias, eps)


@triton_op("nnunet_lgms::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_tokens: Tensor, grad_normed: Tensor, tokens: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of either summand, and those of weight and bias, (2, C) in float32."""
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.add_norm_backward(grad_tokens, grad_normed, tokens, weight, eps)


@triton_op("nnunet_lgms::fold_add", mutates_args=())
def _fold_add(tokens: Tensor, update: Tensor, beside: Tensor | None, patch: list[int], spatial: list[int]) -> Tensor:
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.fold_add(tokens, update, beside, patch, spatial)


@triton_op("nnunet_lgms::fold_add_backward", mutates_args=())
def _fold_add_backward(grad: Tensor, channels: int, patch: list[int]) -> tuple[Tensor, Tensor]:
    """Gradient of tokens and update, and that of what is beside them."""
    from nnunet_lgms.ops.triton import tokens as tokens_triton

    return tokens_triton.unfold(grad, channels, patch)


def _setup_unfold_norm(ctx, inputs, output):
    _, weight, bias, ctx.eps, ctx.patch = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(output[0], weight)


def _unfold_norm_grad(ctx, grad_tokens, grad_normed, grad_beside):
    tokens, weight = ctx.saved_tensors
    grad_x, sums = _unfold_norm_backward(
        grad_tokens.contiguous(), grad_normed.contiguous(), to_channels_last(grad_beside), tokens, weight, ctx.eps,
        ctx.patch,
    )  # fmt: skip
    return grad_x, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None, None


def _setup_add_norm(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(output[0], weight)


def _add_norm_grad(ctx, grad_tokens, grad_normed):
    tokens, weight = ctx.saved_tensors
    grad, sums = _add_norm_backward(grad_tokens.contiguous(), grad_normed.contiguous(), tokens, weight, ctx.eps)
    return grad, grad, sums[0].to(weight.dtype), sums[1].to(ctx.bias_dtype), None


def _setup_fold_add(ctx, inputs, output):
    tokens, _, beside, ctx.patch, _ = inputs
    ctx.channels, ctx.has_beside = tokens.shape[-1], beside is not None


def _fold_add_grad(ctx, grad):
    grad_tokens, grad_beside = _fold_add_backward(to_channels_last(grad), ctx.channels, ctx.patch)
    return grad_tokens, grad_tokens, grad_beside if ctx.has_beside else None, None, None


_unfold_norm.register_autograd(_unfold_norm_grad, setup_context=_setup_unfold_norm)
_add_norm.register_autograd(_add_norm_grad, setup_context=_setup_add_norm)
_fold_add.register_autograd(_fold_add_grad, setup_context=_setup_fold_add)
