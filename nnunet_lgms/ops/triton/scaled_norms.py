"""Triton kernel of two norms with known statistics and a factor between them; see `scaled_norms.py`."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.memory_format import map_memory
from nnunet_lgms.ops.triton.activation import affine
from nnunet_lgms.ops.triton.norm_act import places

TILE = 2048  # elements of a program


def apply(x: Tensor, norms: Sequence[Tensor], factor: Tensor, residual: Tensor, eps1: float, eps2: float) -> Tensor:
    """x (B, C, *spatial), contiguous or channels-last -> channels-last.

    norms: mean, variance, weight and bias of the one, then of the other.
    """
    batch, channels = x.shape[:2]
    voxels = x.numel() // (batch * channels)
    out = map_memory(residual, channels, x.shape[2:])
    lanes = triton.next_power_of_2(channels)
    rows = max(1, TILE // lanes)
    launch(wrap_triton(_apply_both))[(triton.cdiv(voxels, rows), batch)](
        x, *norms, factor, residual, out, voxels, FIRST=x.is_contiguous(), EPS1=eps1, EPS2=eps2, C=channels,
        LANES=lanes, ROWS=rows,
    )  # fmt: skip
    return out.movedim(-1, 1)


# Whether voxels divide by 16 says how a contiguous map is loaded, so it is a version of its own.
@triton.jit
def _apply_both(
    x, mean1, variance1, weight1, bias1, mean2, variance2, weight2, bias2, factor, residual, out, voxels,
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
