"""Norm and activation in one operator, for the instance, group and batch norms of LGMSNet in training.

PyTorch normalises a channels-last map by copying it to another layout, reduces it twice, and writes a map for every
activation. Here one pass over the map takes the moments, one more writes activation(norm(x)) + residual; the gradient
needs two passes likewise and stores nothing but x. The norms differ only in what a statistic spans: the voxels of one
channel of one sample (instance), of a group of channels (group), of one channel of all samples (batch). All end as one
scale and one shift per sample and channel.

The bias of the convolution in front may be left to the norm (`shift`), which adds it to what it loads anyway, where
PyTorch would go over the map for it. Where each channel's own mean is subtracted, it need not be added at all.

LGMSNet puts GELU before the norm in its Fusion block and other activations behind it elsewhere; both orders are one
operator. Everywhere but on channels-last CUDA maps, and everywhere when the environment variable NNUNET_LGMS_KERNELS
is `off`, PyTorch's modules do the same, on the CPU in the forms of `cpu/norm_act.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.library import triton_op
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunet_lgms.ops.backend import use_kernels
from nnunet_lgms.ops.channels import join_channels
from nnunet_lgms.ops.cpu import norm_act as norm_cpu
from nnunet_lgms.ops.layout import to_channels_last
from nnunet_lgms.ops.memory_format import HALF, channels_last

#: activation after the norm; "gelu_first" is GELU before it
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
MAX_CHANNELS = 512


def norm_act(
    x: Tensor,
    norm: nn.Module,
    activation: str,
    residual: Tensor | None = None,
    partial: Sequence[Tensor] = (),
    shift: Tensor | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """activation(norm(x + shift)) + residual, or norm(gelu(x + shift)) for the activation "gelu_first".

    Args:
        x: (B, C, *spatial); the kernels take it channels-last or contiguous, and give a channels-last map.
        norm: BatchNorm, InstanceNorm or GroupNorm; any other module takes PyTorch's path.
        activation: "none", "relu", "silu", "gelu" or "gelu_first".
        residual: added last, (B, C, *spatial).
        partial: moments of x by slices, where the operator before took them for this norm and activation; see
            :func:`nnunet_lgms.ops.conv.same_conv_moments`.
        shift: a number for each channel, (C,), or None.
        beside: another map, (B, R, *spatial), to join the result with.

    Returns:
        (B, C + R, *spatial) in the dtype of x where the kernels run.
    """
    if beside is not None and not _kernels_fit_joined(x, beside, norm):
        return join_channels([norm_act(x, norm, activation, residual, partial, shift), beside])
    if statistics_known(norm) and not torch.is_grad_enabled() and kernels_fit_map(x, any_layout=True):
        return _norm_act_known(
            x, shift, norm.running_mean, norm.running_var, norm.weight, norm.bias,
            None if residual is None else residual.to(x.dtype), beside, norm.eps, activation,
        )  # fmt: skip
    synced = spans_processes(norm) and kernels_fit_map(x, any_layout=True)
    if synced or kernels_fit_norm(x, norm, any_layout=True):
        residual = None if residual is None else residual.to(x.dtype)
        cancels = shift_cancels(norm, activation)
        if shift is not None and not cancels:
            partial = ()  # are those of x
        if synced:
            from nnunet_lgms.ops.norm_act_synced import norm_act_synced

            out, mean, variance = norm_act_synced(x, list(partial), shift, norm, residual, activation, cancels)
        else:
            out, mean, variance = _norm_act_forward(
                x, list(partial), shift, norm.weight, norm.bias, residual, beside, *NormSpec.of(norm), activation
            )
        update_running_statistics(norm, mean, variance, x, shift if cancels else None, is_unbiased=synced)
        return out
    if shift is not None:
        x = x + shift.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    if norm_cpu.fits(x, norm):
        first = activation == "gelu_first"
        return norm_cpu.norm_act(F.gelu(x) if first else x, norm, "none" if first else activation, residual)
    if activation == "gelu_first":
        out = norm(F.gelu(x))
    else:
        out = ACTIVATIONS[activation](norm(x))
    return out if residual is None else out + residual


class NormSpec(NamedTuple):
    """What the kernels need to know of a norm."""

    kind: str
    groups: int
    eps: float

    @classmethod
    def of(cls, norm: nn.Module) -> NormSpec:
        if isinstance(norm, nn.GroupNorm):
            return cls("group", norm.num_groups, norm.eps)
        return cls("batch" if isinstance(norm, _BatchNorm) else "instance", 1, norm.eps)


def statistics_known(norm: nn.Module) -> bool:
    """Whether the statistics are known before the map is: a batch norm in prediction."""
    return isinstance(norm, _BatchNorm) and not norm.training and norm.track_running_stats


def shift_cancels(norm: nn.Module, activation: str) -> bool:
    """Whether a number that is added to a whole channel makes no difference: the norm subtracts the channel's mean."""
    return _from_batches(norm) and _cancels(NormSpec.of(norm).kind, activation)


def _cancels(kind: str, activation: str) -> bool:
    return kind != "group" and activation != "gelu_first"


def kernels_fit_norm(x: Tensor, norm: nn.Module, channels: int | None = None, any_layout: bool = False) -> bool:
    """Whether the kernels serve this norm of a map of the size of x (of ``channels`` channels, if not those of x).

    They do for statistics of this very batch; those of SyncBatchNorm span other processes (`norm_act_synced.py`).
    """
    return _from_this_batch(norm) and kernels_fit_map(x, channels, any_layout) and x[0, 0].numel() > 1


def takes_any_layout(x: Tensor, norm: nn.Module) -> bool:
    """Whether :func:`norm_act` reads a contiguous map of the size of x as well as a channels-last one.

    A compiler plans layouts itself.
    """
    return not torch.compiler.is_compiling() and (
        kernels_fit_norm(x, norm) or (spans_processes(norm) and kernels_fit_map(x))
    )


def moments_wanted(norm: nn.Module, activation: str) -> tuple[str, int, str] | None:
    """What the kernels of a norm want to know of its map: kind, groups, activation; None where they do not serve it."""
    return (*NormSpec.of(norm)[:2], activation) if _from_batches(norm) else None


def _from_batches(norm: nn.Module) -> bool:
    return _from_this_batch(norm) or spans_processes(norm)


def spans_processes(norm: nn.Module) -> bool:
    """Whether a norm takes statistics of the batches of all processes, of which there is more than one."""
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and not torch.compiler.is_compiling()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )


def _from_this_batch(norm: nn.Module) -> bool:
    if isinstance(norm, nn.SyncBatchNorm):
        return False
    if isinstance(norm, (_BatchNorm, _InstanceNorm)):
        return not norm.track_running_stats or (isinstance(norm, _BatchNorm) and norm.training)
    return isinstance(norm, nn.GroupNorm)


def kernels_fit_map(x: Tensor, channels: int | None = None, any_layout: bool = False) -> bool:
    """Channels innermost (or x contiguous, where any layout is taken), not too many, and 32-bit offsets."""
    channels = channels or x.shape[1]
    return (
        use_kernels(x)
        and x.dtype in (*HALF, torch.float32)
        and (channels_last(x) or (any_layout and x.is_contiguous()))
        and channels <= MAX_CHANNELS
        and x.numel() // x.shape[1] * channels < 2**31
    )


def _kernels_fit_joined(x: Tensor, beside: Tensor, norm: nn.Module) -> bool:
    """Whether the kernels may write their result beside another map: in prediction, which asks for no gradient."""
    served = statistics_known(norm) and kernels_fit_map(x) or kernels_fit_norm(x, norm)
    return (
        not torch.is_grad_enabled()
        and served
        and kernels_fit_map(beside)
        and beside.dtype == x.dtype
        and x.numel() + beside.numel() < 2**31
    )


def channel_sums(x: Tensor) -> Tensor:
    """Sum of every channel, (B, C, *spatial) -> (C,) in float32."""
    if kernels_fit_map(x):
        return _channel_means(x) * (x.numel() // x.shape[1])
    return x.sum([0, *range(2, x.ndim)], dtype=torch.float32)


@triton_op("nnunet_lgms::channel_means", mutates_args=())
def _channel_means(x: Tensor) -> Tensor:
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    return norm_act_triton.moments(x, "batch", 1, "none")[0].view(-1)


def update_running_statistics(
    norm: nn.Module,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    shift: Tensor | None = None,
    is_unbiased: bool = False,
) -> None:
    """What BatchNorm does to its buffers in training, nothing for others; the running variance is the unbiased one.

    The mean is that of what was normed less ``shift``, (C,).
    """
    if not (isinstance(norm, _BatchNorm) and norm.track_running_stats):
        return
    count = x.numel() // x.shape[1]
    unbiased = 1.0 if is_unbiased else count / max(count - 1, 1)
    buffers = norm.running_mean, norm.running_var, norm.num_batches_tracked
    with torch.no_grad():
        if _kernel_fits_statistics(norm):
            _update_running_statistics(mean, variance, shift, *buffers, float(norm.momentum), unbiased)
            return
        if shift is not None:
            mean = mean + shift
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean[0].to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(variance[0].to(norm.running_var.dtype) * unbiased, momentum)


def _kernel_fits_statistics(norm: nn.Module) -> bool:
    """One launch in place of five; a compiler fuses those itself."""
    return (
        use_kernels(norm.running_mean)
        and not torch.compiler.is_compiling()
        and norm.momentum is not None
        and norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    )


@triton_op(
    "nnunet_lgms::update_running_statistics", mutates_args=("running_mean", "running_variance", "batches_tracked")
)
def _update_running_statistics(
    mean: Tensor,
    variance: Tensor,
    shift: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    batches_tracked: Tensor,
    momentum: float,
    unbiased: float,
) -> None:
    """Of a batch norm, from the statistics of a batch, (1, C); ``unbiased`` is a factor of the variance."""
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    norm_act_triton.update_running_statistics(
        mean, variance, shift, running_mean, running_variance, batches_tracked, momentum, unbiased
    )


def batch_moments(
    x: Tensor, partial: Sequence[Tensor], kind: str, groups: int, activation: str, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x + shift, (B, C) or, for the batch norm, (1, C) in float32, from its slices if known."""
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    if partial:
        return norm_act_triton.join_moments(norm_act_triton.PartialMoments(*partial), kind, groups)
    return norm_act_triton.moments(x, kind, groups, activation, shift)


@triton_op("nnunet_lgms::norm_act", mutates_args=())
def _norm_act_forward(
    x: Tensor,
    partial: Sequence[Tensor],
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    beside: Tensor | None,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, variance); the statistics are (B, C), or (1, C) for the batch norm, in float32.

    They are those of x where the shift makes no difference to the result, else of x + shift. With another map beside,
    whose channels come behind those of out, it has no gradient.
    """
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    shift = None if _cancels(kind, activation) else shift
    mean, variance = batch_moments(x, partial, kind, groups, activation, shift)
    norm = norm_act_triton.Norm(mean, variance, weight, bias, eps)
    return norm_act_triton.apply(x, norm, residual, kind, groups, activation, shift, beside), mean, variance


@triton_op("nnunet_lgms::norm_act_known", mutates_args=())
def _norm_act_known(
    x: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    beside: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """With given statistics, (C,); for prediction, it has no gradient."""
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    norm = norm_act_triton.Norm(mean[None], variance[None], weight, bias, eps)
    return norm_act_triton.apply(x, norm, residual, "batch", 1, activation, shift, beside)


@triton_op("nnunet_lgms::norm_act_backward", mutates_args=())
def _norm_act_backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    kind: str,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and of weight and bias in float32."""
    from nnunet_lgms.ops.triton import norm_act as norm_act_triton

    norm = norm_act_triton.Norm(mean, variance, weight, bias, eps)
    return norm_act_triton.backward(grad, x, norm, kind, groups, activation, shift)


def _setup(ctx, inputs, output):
    x, partial, shift, weight, bias, residual, beside, *ctx.spec = inputs
    if beside is not None:
        raise NotImplementedError("A norm whose result is joined with another map is for prediction: no gradient.")
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)  # or a kernel each makes zeros of what has no gradient
    ctx.n_partial, ctx.has_residual = len(partial), residual is not None
    kind, *_, activation = ctx.spec
    ctx.cancels = _cancels(kind, activation)
    ctx.save_for_backward(x, shift, weight, bias, mean, variance)


def _backward(ctx, grad, _grad_mean, _grad_variance):
    x, shift, weight, bias, mean, variance = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _norm_act_backward(
        to_channels_last(grad), x, None if ctx.cancels else shift, weight, bias, mean, variance, *ctx.spec
    )
    gradients = gradients_of_others(ctx, grad, grad_x, grad_weight, grad_bias)
    return grad_x, [None] * ctx.n_partial, *gradients, *[None] * (1 + len(ctx.spec))


def gradients_of_others(
    ctx, grad: Tensor, grad_x: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of shift, weight, bias and residual; None of what is not there. The third input is the shift."""
    _, shift, weight, bias, *_ = ctx.saved_tensors
    grad_shift = None
    if shift is not None and ctx.needs_input_grad[2]:
        grad_shift = torch.zeros_like(shift) if ctx.cancels else channel_sums(grad_x).to(shift.dtype)
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return grad_shift, grad_weight, grad_bias, grad if ctx.has_residual else None


_norm_act_forward.register_autograd(_backward, setup_context=_setup)
