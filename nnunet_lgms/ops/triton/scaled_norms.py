"""Triton kernel of two norms with known statistics and a factor between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.memory_format import map_memory
from nnunet_lgms.ops.norms import statistics_known
from nnunet_lgms.ops.triton.activation import affine
from nnunet_lgms.ops.triton.layout import to_channels_last
from nnunet_lgms.ops.triton.norm_act import fits_map
from nnunet_lgms.ops.triton.norm_act_kernels import places

TILE = 2048  # elements of a program


def fits(x: Tensor, norm1: nn.Module, norm2: nn.Module) -> bool:
    """Whether the kernel serves them: in prediction, with known statistics, weights and biases."""
    return not torch.is_grad_enabled() and fits_map(x) and all(statistics_known(n) and n.affine for n in (norm1, norm2))


def scaled_norms(x: Tensor, norm1: nn.Module, factor: Tensor, norm2: nn.Module, residual: Tensor) -> Tensor:
    """norm2(factor * relu(norm1(x))) + residual, channels-last, where :func:`fits` says so."""
    residual = to_channels_last(residual.to(x.dtype))
    norms = [t for n in (norm1, norm2) for t in (n.running_mean, n.running_var, n.weight, n.bias)]
    return _scaled_norms(x, *norms, factor, residual, norm1.eps, norm2.eps)


@triton_op("nnunet_lgms::scaled_norms", mutates_args=())
def _scaled_norms(
    x: Tensor,
    mean1: Tensor,
    variance1: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    mean2: Tensor,
    variance2: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    factor: Tensor,
    residual: Tensor,
    eps1: float,
    eps2: float,
) -> Tensor:
    """With given statistics, (C,); for prediction, it has no gradient."""
    batch, channels = x.shape[:2]
    voxels = x.numel() // (batch * channels)
    out = map_memory(residual, channels, x.shape[2:])
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_scaled_norms_kernel))[(triton.cdiv(voxels, rows), batch)](
        x, mean1, variance1, weight1, bias1, mean2, variance2, weight2, bias2, factor, residual, out, voxels,
        FIRST=x.is_contiguous(), EPS1=eps1, EPS2=eps2, C=channels, LANES=lanes, ROWS=rows,
    )  # fmt: skip
    return out.movedim(-1, 1)


# Whether voxels divide by 16 says how a contiguous map is loaded, so it is a version of its own.
@triton.jit
def _scaled_norms_kernel(
    x,  # (B, C, V) if FIRST, else (B, V, C)
    mean1, variance1, weight1, bias1, mean2, variance2, weight2, bias2, factor,  # (C,) each
    residual, out,  # (B, V, C)
    voxels,  # V
    FIRST: tl.constexpr, EPS1: tl.constexpr, EPS2: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    channel, sample = tl.arange(0, LANES), tl.program_id(1)
    _, _, a, b = affine(mean1, variance1, weight1, bias1, 0, channel, C, EPS1, True)
    _, _, c, d = affine(mean2, variance2, weight2, bias2, 0, channel, C, EPS2, True)
    c *= tl.load(factor + channel, mask=channel < C, other=0.0).to(tl.float32)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    offset = (sample * voxels + voxel)[:, None] * C + channel[None, :]
    value = tl.load(x + places(sample, voxel, channel, voxels, C, FIRST), mask=inside, other=0.0).to(tl.float32)
    value = tl.maximum(value * a[None, :] + b[None, :], 0.0) * c[None, :] + d[None, :]
    value += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)
