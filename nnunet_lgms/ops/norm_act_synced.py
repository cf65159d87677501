"""Norm and activation in one operator where a batch norm's statistics span the processes of a training.

On several GPUs nnU-Net replaces batch norms by SyncBatchNorm, and PyTorch's own leaves activations and layouts to
passes of their own. Here the kernels of `norm_act.py` do what they do in one process, and processes exchange their
sums: (3, C) numbers forward, gathered, and (2, C) backward, added up.

Nothing here is seen by a compiler, for which PyTorch's module remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd.function import once_differentiable

from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.norm_act import batch_moments, gradients_of_others

# its name since PyTorch 2.13, and before
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def norm_act_synced(
    x: Tensor,
    partial: list[Tensor],
    shift: Tensor | None,
    norm: nn.SyncBatchNorm,
    residual: Tensor | None,
    activation: str,
    cancels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(activation(norm(x + shift)) + residual, mean, unbiased variance), both (1, C), as of `norm_act.norm_act`.

    Every process calls it at the same time, and again in the backward pass. With a shift that ``cancels``, the mean is
    that of x.
    """
    return _Synced.apply(
        x, partial, shift, norm.weight, norm.bias, residual, norm.process_group, norm.eps, activation, cancels
    )


_exchanges = True  # False where a process rehearses by itself


@contextmanager
def without_exchange() -> Iterator[None]:
    """Inside, a process is by itself: it takes what the others have to be the same as what it has.

    So it can find out whether it has memory for a step, while no other one waits for it. PyTorch's SyncBatchNorm, where
    it serves a map that the kernels do not, exchanges all the same.
    """
    global _exchanges
    _exchanges = False
    try:
        yield
    finally:
        _exchanges = True


# Kernels as they are, which triton_op does for those inside it: what a compiler would see of them takes 1 ms a launch.
_not_traced = set_wrap_triton_enabled(False)


class _Synced(torch.autograd.Function):
    @staticmethod
    @_not_traced
    def forward(ctx, x, partial, shift, weight, bias, residual, group, eps, activation, cancels):
        from nnunet_lgms.ops.triton import norm_act as kernels

        added = None if cancels else shift
        moments = batch_moments(x, partial, "batch", 1, activation, added)
        everyones = _gathered(*moments, x.numel() // x.shape[1], group)
        mean, variance, unbiased, share = kernels.join_processes(everyones, dist.get_rank(group))
        norm = kernels.Norm(mean, variance, weight, bias, eps)
        out = kernels.apply(x, norm, residual, "batch", 1, activation, added)
        ctx.save_for_backward(x, shift, weight, bias, mean, variance, share)
        ctx.group, ctx.eps, ctx.activation, ctx.cancels = group, eps, activation, cancels
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)  # see norm_act.py
        return out, mean, unbiased

    @staticmethod
    @once_differentiable
    @_not_traced
    def backward(ctx, grad, *_):
        from nnunet_lgms.ops.triton import norm_act as kernels

        x, shift, weight, bias, mean, variance, share = ctx.saved_tensors
        norm = kernels.Norm(mean, variance, weight, bias, ctx.eps)

        def exchange(means: Tensor) -> None:
            means.mul_(share)
            if _exchanges:
                dist.all_reduce(means, group=ctx.group)
            else:
                means.mul_(dist.get_world_size(ctx.group))

        added = None if ctx.cancels else shift
        grad_x, *of_parameters = kernels.backward(
            to_channels_last(grad), x, norm, "batch", 1, ctx.activation, added, exchange
        )
        return grad_x, None, *gradients_of_others(ctx, grad, grad_x, *of_parameters), *[None] * 4


def _gathered(mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """(processes, 3, C): mean, variance and count of each process, in float32."""
    mine = torch.cat([mean, variance, torch.full_like(mean, count)])
    processes = dist.get_world_size(group)
    if not _exchanges:
        return mine.repeat(processes, 1, 1)
    everyones = mine.new_empty(processes * len(mine), mine.shape[1])
    _all_gather(everyones, mine, group)
    return everyones.view(processes, *mine.shape)
