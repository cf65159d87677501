"""Triton kernels between channels-last maps and tokens; see the operators' `tokens.py`.

A map is (B, D, H, W, C + R), 2D has D = 1; its tokens are rows of C numbers, (B, P, N, C). A program works on some rows
with all their channels, each a run of memory in either place. Everything is computed in float32; norms are those of the
tokens as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import triton_op, wrap_triton
from nnunet_lgms.ops.memory_format import HALF, channels_last, map_memory
from nnunet_lgms.ops.triton.concatenate import copy_rest
from nnunet_lgms.ops.triton.layout import to_channels_last
from nnunet_lgms.ops.triton.sums import sum_of_rows

MAX_CHANNELS = 512  # of a token: a program holds some of them at once
TILE = 2048  # numbers that a program holds of a tensor
PROGRAMS = 512  # of the backward pass, at most: each writes a sum


def fits_map(x: Tensor, padded: Sequence[int], norm: nn.LayerNorm) -> bool:
    """Whether the kernels serve a map: channels innermost and not too many, offsets that fit 32 bits."""
    (channels,) = norm.normalized_shape
    return (
        x.dtype in (*HALF, torch.float32)
        and channels_last(x)
        and max(channels, x.shape[1] - channels) <= MAX_CHANNELS
        and x.shape[0] * x.shape[1] * math.prod(padded) < 2**31
        and norm.weight is not None
        and norm.bias is not None
    )


def fits(tokens: Tensor, norm: nn.LayerNorm | None = None, rest: Tensor | None = None) -> bool:
    """Whether the kernels serve tokens, the norm of them, and a map with a rest of other channels."""
    return (
        tokens.dtype in (*HALF, torch.float32)
        and max(tokens.shape[-1], 0 if rest is None else rest.shape[1]) <= MAX_CHANNELS
        and tokens.numel() < 2**30  # the map may have twice the channels
        and (norm is None or (norm.weight is not None and norm.bias is not None))
    )


@triton_op("nnunet_lgms::unfold_norm", mutates_args=())
def unfold_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, patch: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, C + R, *spatial) -> tokens, normed tokens, (B, R, *spatial)."""
    (channels,) = weight.shape
    tokens = _memory_of_tokens(x, channels, patch)
    normed = torch.empty_like(tokens)
    rest = map_memory(x, x.shape[1] - channels, x.shape[2:])
    _forward(x, None, tokens, normed, rest, weight, bias, eps, _geometry(x.shape[2:], patch, x.shape[1] - channels))
    return tokens, normed, rest.movedim(-1, 1)


@triton_op("nnunet_lgms::unfold_norm_backward", mutates_args=())
def _unfold_norm_backward(
    grad_tokens: Tensor,
    grad_normed: Tensor,
    grad_rest: Tensor,
    tokens: Tensor,
    weight: Tensor,
    eps: float,
    patch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradient of the map, (B, C + R, *spatial), and those of weight and bias, (2, C) in float32."""
    rest, spatial = grad_rest.shape[1], grad_rest.shape[2:]
    out = map_memory(tokens, tokens.shape[-1] + rest, spatial)
    sums = _backward(grad_tokens, grad_normed, grad_rest, tokens, out, weight, eps, _geometry(spatial, patch, rest))
    return out.movedim(-1, 1), sums


@triton_op("nnunet_lgms::add_norm", mutates_args=())
def add_norm(tokens: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens twice -> their sum, and the sum normed."""
    out, normed = torch.empty_like(tokens), torch.empty_like(tokens)
    _forward(tokens, update, out, normed, None, weight, bias, eps, _NO_MAP)
    return out, normed


@triton_op("nnunet_lgms::add_norm_backward", mutates_args=())
def _add_norm_backward(
    grad_tokens: Tensor, grad_normed: Tensor, tokens: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of either summand, and those of weight and bias, (2, C) in float32."""
    out = torch.empty_like(tokens)
    return out, _backward(grad_tokens, grad_normed, None, tokens, out, weight, eps, _NO_MAP)


def fold_add(
    tokens: Tensor, update: Tensor, rest: Tensor | None, patch: Sequence[int], spatial: Sequence[int]
) -> Tensor:
    """tokens + update, behind them a rest (B, R, *spatial) -> map (B, C + R, *spatial)."""
    rest = None if rest is None else to_channels_last(rest.to(tokens.dtype))
    update = update.to(tokens.dtype).contiguous()
    return _fold_add(tokens.contiguous(), update, rest, list(patch), list(spatial))


@triton_op("nnunet_lgms::fold_add", mutates_args=())
def _fold_add(
    tokens: Tensor, update: Tensor, rest: Tensor | None, patch: Sequence[int], spatial: Sequence[int]
) -> Tensor:
    channels, others = tokens.shape[-1], 0 if rest is None else rest.shape[1]
    out = map_memory(tokens, channels + others, spatial)
    rows, grid, tile = _tiles(tokens)
    launch(wrap_triton(_fold_kernel))[grid](
        tokens, update, rest, out, rows, **tile, **_geometry(spatial, patch, others)
    )
    return out.movedim(-1, 1)


@triton_op("nnunet_lgms::fold_add_backward", mutates_args=())
def _fold_add_backward(grad: Tensor, channels: int, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Map (B, C + R, *spatial) -> tokens of its first C channels, and the rest, (B, R, *spatial)."""
    others = grad.shape[1] - channels
    tokens, rest = _memory_of_tokens(grad, channels, patch), map_memory(grad, others, grad.shape[2:])
    rows, grid, tile = _tiles(tokens)
    launch(wrap_triton(_unfold_kernel))[grid](
        grad, tokens, rest, rows, **tile, **_geometry(grad.shape[2:], patch, others)
    )
    return tokens, rest.movedim(-1, 1)


# The backward passes keep tokens and nothing of their norms, which they take again.


def _setup_unfold_norm(ctx, inputs, output):
    _, weight, bias, ctx.eps, ctx.patch = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(output[0], weight)


def _unfold_norm_grad(ctx, grad_tokens, grad_normed, grad_rest):
    tokens, weight = ctx.saved_tensors
    grad_tokens, grad_normed = grad_tokens.contiguous(), grad_normed.contiguous()
    grad_x, sums = _unfold_norm_backward(
        grad_tokens, grad_normed, to_channels_last(grad_rest), tokens, weight, ctx.eps, ctx.patch
    )
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
    tokens, _, rest, ctx.patch, _ = inputs
    ctx.channels, ctx.has_rest = tokens.shape[-1], rest is not None


def _fold_add_grad(ctx, grad):
    grad_tokens, grad_rest = _fold_add_backward(to_channels_last(grad), ctx.channels, ctx.patch)
    return grad_tokens, grad_tokens, grad_rest if ctx.has_rest else None, None, None


unfold_norm.register_autograd(_unfold_norm_grad, setup_context=_setup_unfold_norm)
add_norm.register_autograd(_add_norm_grad, setup_context=_setup_add_norm)
_fold_add.register_autograd(_fold_add_grad, setup_context=_setup_fold_add)


def _memory_of_tokens(x: Tensor, channels: int, patch: Sequence[int]) -> Tensor:
    n_tokens = math.prod(triton.cdiv(size, p) for size, p in zip(x.shape[2:], patch))
    return torch.empty((x.shape[0], math.prod(patch), n_tokens, channels), dtype=x.dtype, device=x.device)


def _tiles(tokens: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """Rows of the tokens, grid and constants of a kernel that goes through them."""
    channels = tokens.shape[-1]
    rows, lanes = tokens.numel() // channels, triton.next_power_of_2(channels)
    tile = max(1, TILE // lanes)
    return rows, (triton.cdiv(rows, tile),), {"C": channels, "LANES": lanes, "ROWS": tile}


def _geometry(spatial: Sequence[int], patch: Sequence[int], rest: int) -> dict[str, int]:
    """Arguments of the kernels for a map of this size, of patches, and of a rest of R channels."""
    planar = (1,) * (3 - len(spatial))
    arguments = dict(zip(("D", "H", "W", "PZ", "PY", "PX"), (*planar, *spatial, *planar, *patch)))
    return {**arguments, "R": rest, "R_LANES": triton.next_power_of_2(max(1, rest))}


_NO_MAP = _geometry((1, 1, 1), (1, 1, 1), 0)


def _forward(
    source: Tensor, update: Tensor | None, tokens: Tensor, normed: Tensor, rest: Tensor | None, weight: Tensor,
    bias: Tensor, eps: float, geometry: dict[str, int],
) -> None:  # fmt: skip
    rows, grid, tile = _tiles(tokens)
    launch(wrap_triton(_layer_norm_forward_kernel))[grid](
        source, update, tokens, normed, rest, weight, bias, rows, EPS=eps, FROM_MAP=update is None, **tile, **geometry
    )


def _backward(
    grad_tokens: Tensor, grad_normed: Tensor, grad_rest: Tensor | None, tokens: Tensor, out: Tensor, weight: Tensor,
    eps: float, geometry: dict[str, int],
) -> Tensor:  # fmt: skip
    """Writes the gradient in front of the norm; those of weight and bias, (2, C)."""
    rows, (tiles,), tile = _tiles(tokens)
    steps = triton.cdiv(tiles, PROGRAMS)
    programs = triton.cdiv(tiles, steps)
    sums = torch.empty((programs, 2, tile["C"]), dtype=torch.float32, device=tokens.device)
    launch(wrap_triton(_layer_norm_backward_kernel))[(programs,)](
        grad_tokens, grad_normed, grad_rest, tokens, out, weight, sums, rows, steps, EPS=eps,
        TO_MAP=grad_rest is not None, **tile, **geometry,
    )  # fmt: skip
    return sum_of_rows(sums)


@triton.jit
def _voxel(row, D, H, W, PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr):
    """The voxel of a token, and whether it lies in the map and not in what fills its last patches."""
    nz, ny, nx = (D + PZ - 1) // PZ, (H + PY - 1) // PY, (W + PX - 1) // PX
    patch, group, sample = row % (nz * ny * nx), row // (nz * ny * nx), row // (nz * ny * nx * PZ * PY * PX)
    x = patch % nx * PX + group % PX
    y = patch // nx % ny * PY + group // PX % PY
    z = patch // (nx * ny) * PZ + group // (PX * PY) % PZ
    return ((sample * D + z) * H + y) * W + x, (x < W) & (y < H) & (z < D)


@triton.jit
def _standardised(value, C: tl.constexpr, EPS: tl.constexpr, inside):
    """Rows with mean 0 and variance 1, and their reciprocal deviation; zero where not inside."""
    centred = tl.where(inside, value - (tl.sum(value, 1) / C)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)
    return centred * r[:, None], r[:, None]


@triton.jit(do_not_specialize=["rows", "D", "H", "W"])
def _layer_norm_forward_kernel(
    source,  # map (B, D, H, W, C + R) if FROM_MAP, else tokens (rows, C)
    update,  # (rows, C), unless FROM_MAP
    tokens, normed,  # (rows, C)
    rest,  # (B, D, H, W, R), if FROM_MAP
    weight, bias,  # (C,)
    rows, D, H, W, EPS: tl.constexpr, FROM_MAP: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, R: tl.constexpr, R_LANES: tl.constexpr, C: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tokens of a map, or the sum of two, and the same normed."""
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)[None, :]
    inside = (row < rows)[:, None] & (channel < C)
    offset = row[:, None] * C + channel
    if FROM_MAP:
        voxel, exists = _voxel(row, D, H, W, PZ, PY, PX)
        exists = exists & (row < rows)
        value = tl.load(source + voxel[:, None] * (C + R) + channel, mask=exists[:, None] & (channel < C), other=0.0)
        if R > 0:
            copy_rest(source + C, rest, voxel, exists, C + R, R, R, R_LANES)
    else:
        value = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(update + offset, mask=inside, other=0.0).to(tl.float32)
        value = value.to(tokens.dtype.element_ty)
    tl.store(tokens + offset, value, mask=inside)
    xhat, _ = _standardised(value.to(tl.float32), C, EPS, inside)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    b = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    tl.store(normed + offset, (xhat * w + b).to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps", "D", "H", "W"])
def _layer_norm_backward_kernel(
    grad_tokens, grad_normed,  # (rows, C)
    grad_rest,  # (B, D, H, W, R), if TO_MAP
    tokens,  # (rows, C)
    out,  # map (B, D, H, W, C + R) if TO_MAP, else tokens (rows, C)
    weight,  # (C,)
    sums,  # (programs, 2, C): gradients of weight and bias
    rows, steps, D, H, W, EPS: tl.constexpr, TO_MAP: tl.constexpr, PZ: tl.constexpr, PY: tl.constexpr,
    PX: tl.constexpr, R: tl.constexpr, R_LANES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the tokens, as they are or as a map, and sums of grad_normed * xhat and of grad_normed."""
    channel = tl.arange(0, LANES)
    w = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, LANES), tl.float32)
    of_bias = tl.zeros((ROWS, LANES), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (channel < C)[None, :]
        offset = row[:, None] * C + channel[None, :]
        xhat, r = _standardised(tl.load(tokens + offset, mask=inside, other=0.0).to(tl.float32), C, EPS, inside)
        g = tl.load(grad_normed + offset, mask=inside, other=0.0).to(tl.float32)
        of_weight += g * xhat
        of_bias += g
        g *= w
        g = r * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
        g += tl.load(grad_tokens + offset, mask=inside, other=0.0).to(tl.float32)
        if TO_MAP:
            voxel, exists = _voxel(row, D, H, W, PZ, PY, PX)
            exists = exists & (row < rows)
            offset, inside = voxel[:, None] * (C + R) + channel[None, :], inside & exists[:, None]
            if R > 0:
                copy_rest(grad_rest, out + C, voxel, exists, R, C + R, R, R_LANES)
        tl.store(out + offset, g.to(out.dtype.element_ty), mask=inside)
    sums += tl.program_id(0) * 2 * C + channel
    tl.store(sums, tl.sum(of_weight, 0), mask=channel < C)
    tl.store(sums + C, tl.sum(of_bias, 0), mask=channel < C)


@triton.jit(do_not_specialize=["rows", "D", "H", "W"])
def _fold_kernel(
    tokens, update,  # (rows, C)
    rest,  # (B, D, H, W, R)
    out,  # (B, D, H, W, C + R)
    rows, D, H, W, PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, R: tl.constexpr,
    R_LANES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum of tokens as a map."""
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)[None, :]
    voxel, exists = _voxel(row, D, H, W, PZ, PY, PX)
    exists = exists & (row < rows)
    inside = exists[:, None] & (channel < C)
    offset = row[:, None] * C + channel
    value = tl.load(tokens + offset, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(update + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + voxel[:, None] * (C + R) + channel, value.to(out.dtype.element_ty), mask=inside)
    if R > 0:
        copy_rest(rest, out + C, voxel, exists, R, C + R, R, R_LANES)


@triton.jit(do_not_specialize=["rows", "D", "H", "W"])
def _unfold_kernel(
    x,  # (B, D, H, W, C + R)
    tokens,  # (rows, C)
    rest,  # (B, D, H, W, R)
    rows, D, H, W, PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, R: tl.constexpr,
    R_LANES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tokens of a map, zero in what fills the last patches."""
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)[None, :]
    voxel, exists = _voxel(row, D, H, W, PZ, PY, PX)
    exists = exists & (row < rows)
    value = tl.load(x + voxel[:, None] * (C + R) + channel, mask=exists[:, None] & (channel < C), other=0.0)
    tl.store(tokens + row[:, None] * C + channel, value, mask=(row < rows)[:, None] & (channel < C))
    if R > 0:
        copy_rest(x + C, rest, voxel, exists, C + R, R, R, R_LANES)
