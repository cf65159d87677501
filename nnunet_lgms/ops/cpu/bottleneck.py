"""Inverted bottleneck of the Fusion block on a CPU: squeeze(norm2(gelu(expand(norm1(gelu(x)))))).

Operator by operator, the wide map travels to memory and back some twenty times in a training step, for little
arithmetic, and the pages of a new map cost more than that. Here a norm is folded into the convolution behind it: a
factor and an offset per channel, once its statistics are known, are but other weights. What is left runs over pieces of
the map that stay in the cache from one operator to the next. Without a gradient the wide map is never stored, but made
again in every pass.

Maps are (S, N, C) here: S sets of N voxels, each with statistics of its own, which are the samples for an instance norm
and one set for a batch norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_lgms.ops.memory_format import channels_last, wants_channels_last
from nnunet_lgms.ops.norms import (
    statistics_known,
    unbiasing,
    update_running_statistics,
    variance_above_rounding,
)

CHUNK = 1 << 19  # numbers of the wide map that are worked on at a time: 2 MiB of float32


class Known(NamedTuple):
    """Statistics that are known before the map is, (1, C) each; None for those of the map itself."""

    mean: Tensor | None = None
    variance: Tensor | None = None

    @classmethod
    def of(cls, norm: nn.Module) -> Known:
        return cls(norm.running_mean[None], norm.running_var[None]) if statistics_known(norm) else cls()


def fits(x: Tensor, norm1: nn.Module, norm2: nn.Module) -> bool:
    """Channels-last float32, and both norms either of the batch or of each sample."""
    return (
        wants_channels_last(x)
        and channels_last(x)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x[0, 0].numel() > 1
        and (all(map(_of_batch, (norm1, norm2))) or all(map(_of_sample, (norm1, norm2))))
    )


def _of_batch(norm: nn.Module) -> bool:
    return isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm)


def _of_sample(norm: nn.Module) -> bool:
    return isinstance(norm, _InstanceNorm) and not norm.track_running_stats


def inverted_bottleneck(x: Tensor, norm1: nn.Module, expand: _ConvNd, norm2: nn.Module, squeeze: _ConvNd) -> Tensor:
    """squeeze(norm2(gelu(expand(norm1(gelu(x)))))) where :func:`fits` says so, (B, D, *spatial) -> (B, C, *spatial)."""
    rows = x.movedim(1, -1).flatten(1, -2)
    if isinstance(norm1, _BatchNorm):
        rows = rows.flatten(0, 1)[None]
    parameters = [p for m in (norm1, expand, norm2, squeeze) for p in (m.weight, m.bias)]
    parameters = [p.flatten(1) if p is not None and p.ndim > 1 else p for p in parameters]
    known = Known.of(norm1), Known.of(norm2)
    by_sample = not isinstance(norm1, _BatchNorm)
    out, *statistics = _Bottleneck.apply(rows, *parameters, (norm1.eps, norm2.eps), known, by_sample)
    for norm, mean, variance, own in zip((norm1, norm2), statistics[::2], statistics[1::2], known, strict=True):
        if own.mean is None:
            update_running_statistics(norm, mean, variance, unbiasing(x))
    return out.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1)


def composed(
    x: Tensor,
    *parameters: Tensor | None,
    eps: tuple[float, float],
    known: tuple[Known, Known],
    by_sample: bool = False,
) -> Tensor:
    """The bottleneck of plain operators, (S, N, D) -> (S, N, C), for derivatives of its gradient."""
    for half, e, statistics in zip((parameters[:4], parameters[4:]), eps, known, strict=True):
        x = F.gelu(x)
        mean, variance = statistics
        if mean is None:
            mean, variance = x.mean(1), x.var(1, correction=0)
            if by_sample:
                variance = variance_above_rounding(mean, variance, lambda x=x: (x.amin(1), x.amax(1)))
        weight, bias = _fold(mean, variance, *half, e)
        x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
    return x


def _affine(
    mean: Tensor, variance: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reciprocal deviation, and the factor and the offset (S, C) that a norm is."""
    root = torch.rsqrt(variance + eps)
    factor = root if norm_weight is None else root * norm_weight
    offset = -mean * factor
    return root, factor, offset if norm_bias is None else offset + norm_bias


def _fold(
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A norm as part of the product behind it: weight (S, out, C) and bias (S, out) that take the map as it is."""
    _, factor, offset = _affine(mean, variance, norm_weight, norm_bias, eps)
    offset = offset @ weight.T
    return weight * factor[:, None], offset if bias is None else offset + bias


def _fold_gradients(
    grad_weight: Tensor,
    grad_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of mean, variance, norm_weight, norm_bias, weight and bias from those of :func:`_fold`'s results."""
    root, factor, offset = _affine(mean, variance, norm_weight, norm_bias, eps)
    grad_offset = grad_bias @ weight
    grad_factor = (grad_weight * weight).sum(1) - mean * grad_offset
    grad_root = grad_factor if norm_weight is None else grad_factor * norm_weight
    return (
        -factor * grad_offset,
        -0.5 * grad_root * root**3,
        None if norm_weight is None else (grad_factor * root).sum(0),
        None if norm_bias is None else grad_offset.sum(0),
        (grad_weight * factor[:, None]).sum(0) + grad_bias.T @ offset,
        None if bias is None else grad_bias.sum(0),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """x @ weight.T + bias, (R, in) -> (R, out): PyTorch's own begins with a copy of the bias to every row."""
    return torch.mm(x, weight.T, out=out).add_(bias)


class _Piece(NamedTuple):
    """Some voxels of one set of a map."""

    number: int
    s: int
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """x (S, N, C) -> (R, C)."""
        return x[self.s, self.rows]


class _Pieces:
    """The maps of x (S, N, D) in between, piece by piece: gelu(x) and gelu(expand(norm1(gelu(x)))).

    Made once and kept if a gradient will want them, else in memory that every piece uses, and as often as needed.
    """

    def __init__(self, x: Tensor, hidden: int, keep: bool):
        self.x, self.hidden, self.keep = x, hidden, keep
        self.rows = min(x.shape[1], max(1, CHUNK // hidden))
        self.narrow: list[Tensor] = []
        self.wide: list[Tensor] = []
        self.scratch: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[_Piece]:
        number = 0
        for s in range(self.x.shape[0]):
            for begin in range(0, self.x.shape[1], self.rows):
                yield _Piece(number, s, slice(begin, min(begin + self.rows, self.x.shape[1])))
                number += 1

    def memory(self, slot: int, n: int, channels: int) -> Tensor:
        """(n, channels) that the next piece overwrites; one for each ``slot``."""
        if slot not in self.scratch:
            self.scratch[slot] = self.x.new_empty(self.rows, channels)
        return self.scratch[slot][:n]

    def inner(self, piece: _Piece) -> Tensor:
        """gelu(x), (R, D)."""
        if piece.number < len(self.narrow):
            return self.narrow[piece.number]
        source = piece.of(self.x)
        out = torch.empty_like(source) if self.keep else self.memory(0, *source.shape)
        return self._made(self.narrow, torch.ops.aten.gelu.out(source, out=out))

    def product(self, piece: _Piece, weight: Tensor, bias: Tensor) -> Tensor:
        """inner @ weight.T + bias, (R, H), of weight (S, H, D) and bias (S, H)."""
        inner = self.inner(piece)
        return _linear(inner, weight[piece.s], bias[piece.s], out=self.memory(1, len(inner), self.hidden))

    def outer(self, piece: _Piece, weight: Tensor, bias: Tensor) -> Tensor:
        """gelu of the product, (R, H)."""
        if piece.number < len(self.wide):
            return self.wide[piece.number]
        product = self.product(piece, weight, bias)
        out = torch.empty_like(product) if self.keep else self.memory(2, *product.shape)
        return self._made(self.wide, torch.ops.aten.gelu.out(product, out=out))

    def _made(self, kept: list[Tensor], piece: Tensor) -> Tensor:
        if self.keep:
            kept.append(piece)
        return piece


def _moments(n_sets: int, pieces: Callable[[], Iterable[tuple[int, Tensor]]], by_sample: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance (S, C) of the rows of each set, from pieces of it, (R, C); of samples, above rounding."""
    parts = [[] for _ in range(n_sets)]
    for s, rows in pieces():
        moments = torch.ops.aten.batch_norm_update_stats(rows.T[None, :, :, None], None, None, 0.0)
        parts[s].append((len(rows), *moments))
    results = []
    for part in parts:
        counts, means, variances = zip(*part, strict=True)
        means, variances = torch.stack(means), torch.stack(variances)
        share = means.new_tensor(counts)[:, None] / sum(counts)
        mean = (means * share).sum(0)
        results.append((mean, ((variances + (means - mean) ** 2) * share).sum(0)))
    mean, variance = (torch.stack(t) for t in zip(*results, strict=True))
    return mean, variance_above_rounding(mean, variance, lambda: _bounds(mean, pieces())) if by_sample else variance


def _bounds(mean: Tensor, pieces: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each set and channel, (S, C) like the mean."""
    low, high = torch.full_like(mean, torch.inf), torch.full_like(mean, -torch.inf)
    for s, rows in pieces:
        torch.minimum(low[s], rows.amin(0), out=low[s])
        torch.maximum(high[s], rows.amax(0), out=high[s])
    return low, high


class _Bottleneck(Function):
    @staticmethod
    def forward(
        ctx,
        x,
        norm_weight1,
        norm_bias1,
        expand,
        bias1,
        norm_weight2,
        norm_bias2,
        squeeze,
        bias2,
        eps,
        known,
        by_sample=False,
    ):
        pieces = _Pieces(x, expand.shape[0], keep=any(ctx.needs_input_grad))
        statistics1, statistics2 = known
        if statistics1.mean is None:
            narrow = lambda: ((piece.s, pieces.inner(piece)) for piece in pieces)  # noqa: E731
            statistics1 = _moments(x.shape[0], narrow, by_sample)
        weight1, offset1 = _fold(*statistics1, norm_weight1, norm_bias1, expand, bias1, eps[0])
        if statistics2.mean is None:
            wide = lambda: ((piece.s, pieces.outer(piece, weight1, offset1)) for piece in pieces)  # noqa: E731
            statistics2 = _moments(x.shape[0], wide, by_sample)
        weight2, offset2 = _fold(*statistics2, norm_weight2, norm_bias2, squeeze, bias2, eps[1])

        out = x.new_empty(*x.shape[:2], squeeze.shape[0])
        for piece in pieces:
            wide = pieces.outer(piece, weight1, offset1)
            _linear(wide, weight2[piece.s], offset2[piece.s], out=piece.of(out))

        statistics = *statistics1, *statistics2
        ctx.eps, ctx.known, ctx.by_sample, ctx.n_pieces = eps, known, by_sample, len(pieces.narrow)
        ctx.save_for_backward(
            x, norm_weight1, norm_bias1, expand, bias1, norm_weight2, norm_bias2, squeeze, bias2,
            *statistics, *pieces.narrow, *pieces.wide,
        )  # fmt: skip
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    def backward(ctx, grad, *_):
        x, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            inputs = [x, *saved[:8]]
            wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            out = composed(*inputs, eps=ctx.eps, known=ctx.known, by_sample=ctx.by_sample)
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:9]), None, None, None

        norm1, norm2, statistics1, statistics2 = saved[:4], saved[4:8], saved[8:10], saved[10:12]
        weight1, bias1 = _fold(*statistics1, *norm1, ctx.eps[0])
        weight2, _ = _fold(*statistics2, *norm2, ctx.eps[1])
        hidden = len(weight1[0])
        pieces = _Pieces(x, hidden, keep=True)
        pieces.narrow, pieces.wide = saved[12 : 12 + ctx.n_pieces], saved[12 + ctx.n_pieces :]
        grad = grad.contiguous()

        grad_weight2 = torch.zeros_like(weight2)
        for piece in pieces:
            grad_weight2[piece.s].addmm_(piece.of(grad).T, pieces.wide[piece.number])
        grads2 = _fold_gradients(grad_weight2, grad.sum(1), *statistics2, *norm2, ctx.eps[1])
        slope2, constant2 = _through_statistics(grads2[:2], statistics2, ctx.known[1], x)

        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight1, grad_bias1 = torch.zeros_like(weight1), torch.zeros_like(bias1)
        for piece in pieces:
            s, wide = piece.s, pieces.wide[piece.number]
            part = pieces.memory(2, len(wide), hidden)
            _linear(piece.of(grad), weight2[s].T, constant2[s], out=part).addcmul_(wide, slope2[s])
            # To have kept the product would cost more: the pages of new memory are dearer than it is.
            torch.ops.aten.gelu_backward.grad_input(part, pieces.product(piece, weight1, bias1), grad_input=part)
            grad_weight1[s].addmm_(part.T, pieces.narrow[piece.number])
            grad_bias1[s] += part.sum(0)
            torch.mm(part, weight1[s], out=piece.of(grad_x))

        grads1 = _fold_gradients(grad_weight1, grad_bias1, *statistics1, *norm1, ctx.eps[0])
        slope1, constant1 = _through_statistics(grads1[:2], statistics1, ctx.known[0], x)
        for piece in pieces:
            part = piece.of(grad_x)
            part.addcmul_(pieces.narrow[piece.number], slope1[piece.s]).add_(constant1[piece.s])
            torch.ops.aten.gelu_backward.grad_input(part, piece.of(x), grad_input=part)
        return grad_x, *grads1[2:], *grads2[2:], None, None, None


def _through_statistics(
    grads: tuple[Tensor, Tensor], statistics: tuple[Tensor, Tensor], known: Known, x: Tensor
) -> tuple[Tensor, Tensor]:
    """What mean and variance pass on to each value of the map: a multiple of it, (S, C), plus a constant, (S, C)."""
    if known.mean is not None:
        zero = torch.zeros_like(grads[0]).expand(x.shape[0], -1)
        return zero, zero
    slope = grads[1] * (2 / x.shape[1])
    return slope, grads[0] / x.shape[1] - slope * statistics[0]
