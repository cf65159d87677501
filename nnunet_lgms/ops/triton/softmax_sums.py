"""Triton kernels of the sums of a softmax, and of the gradient of its logits; see the operator's `softmax_sums.py`.

Logits are (B, V, C) or, if they are contiguous, (B, C, V): V voxels, C classes. A program works on some voxels with all
their classes, in float32. Those of the forward pass sum over a slice of a sample each, and PyTorch over the slices, so
results repeat bit for bit. The backward pass makes the softmax again, and rounds once: its numbers are small, but for
the factor of the gradient scaler, which they have by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.library import triton_op, wrap_triton
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, HALF, channels_last
from nnunet_lgms.ops.triton.norm_act_kernels import channels_first, known_divisor, places

MAX_CLASSES = 256  # a program holds voxels with all of theirs
TILE = 1024  # logits that a program holds
WARP_LANES = 32  # channels next to each other that threads of one warp reduce
RUN = 32  # voxels that are read in one go from contiguous logits, also of many classes
WARPS = 2048  # of the forward pass, whose programs sum over a slice of a sample each: those that run at once on an H200


def fits(logits: Tensor, labels: Tensor) -> bool:
    """Whether the kernels serve logits and labels: 2 to MAX_CLASSES classes, 16 or 32 bits, offsets of 32 bits."""
    return (
        logits.ndim in CHANNELS_LAST
        and 1 < logits.shape[1] <= MAX_CLASSES
        and logits.dtype in (*HALF, torch.float32)
        and (channels_last(logits) or logits.is_contiguous())
        and 0 < logits.numel() < 2**31
        and labels.shape == (logits.shape[0], 1, *logits.shape[2:])
        and labels.device == logits.device
    )


@triton_op("nnunet_lgms::softmax_sums", mutates_args=())
def softmax_sums(logits: Tensor, labels: Tensor, ignored: int | None) -> Tensor:
    """(B, C, *spatial), (B, 1, *spatial) -> (B, 4, C)."""
    batch, classes = logits.shape[:2]
    voxels, tile = labels[0].numel(), _tile(logits)
    tiles = triton.cdiv(voxels, tile["ROWS"])
    steps = triton.cdiv(tiles, max(1, WARPS // tile["num_warps"] // batch))
    slices = triton.cdiv(tiles, steps)
    sums = torch.empty((batch, slices, 4, classes), dtype=torch.float32, device=logits.device)
    launch(wrap_triton(_softmax_sums_forward_kernel))[(slices, batch)](
        logits, labels, sums, voxels, steps, IGNORED=ignored, **tile
    )
    return sums.sum(1)


@triton_op("nnunet_lgms::softmax_sums_backward", mutates_args=())
def _softmax_sums_backward(grad: Tensor, logits: Tensor, labels: Tensor, ignored: int | None) -> Tensor:
    """Gradient of the sums, (B, 4, C) -> gradient of the logits, in their memory format."""
    out, voxels, tile = torch.empty_like(logits), labels[0].numel(), _tile(logits)
    launch(wrap_triton(_softmax_sums_backward_kernel))[(triton.cdiv(voxels, tile["ROWS"]), logits.shape[0])](
        grad, logits, labels, out, voxels, IGNORED=ignored, **tile
    )
    return out


def _setup(ctx, inputs, output):
    logits, labels, ctx.ignored = inputs
    ctx.save_for_backward(logits, labels)


def _backward(ctx, grad):
    return _softmax_sums_backward(grad.contiguous(), *ctx.saved_tensors, ctx.ignored), None, None


softmax_sums.register_autograd(_backward, setup_context=_setup)


def _tile(logits: Tensor) -> dict[str, int]:
    """The layout of logits for the kernels, and the numbers and warps of a program."""
    classes, first = logits.shape[1], channels_first(logits)
    lanes = triton.next_power_of_2(classes)
    rows, warps = max(1, TILE // lanes), 4
    if first:
        rows = max(rows, min(RUN, 4 * TILE // lanes))
        warps = 8 if rows * lanes > 2 * TILE else 4
    elif lanes > WARP_LANES:  # several warps would meet in shared memory for every sum over classes
        rows, warps = max(1, TILE // 2 // lanes), 1
    return {"FIRST": first, "C": classes, "LANES": lanes, "ROWS": rows, "num_warps": warps}


@triton.jit
def _softmax(logits, labels, sample, voxel, voxels, FIRST: tl.constexpr, IGNORED: tl.constexpr, C: tl.constexpr,
             LANES: tl.constexpr):  # fmt: skip
    """Of voxels and their classes, (ROWS, LANES): log(p), p, whether the class is the label; how often a voxel counts,
    (ROWS, 1), 0 where it is ignored and NaN where its label is no class; offsets, and which of them there are.
    """
    channel, exists = tl.arange(0, LANES), voxel < voxels
    inside = exists[:, None] & (channel < C)[None, :]
    place = places(sample, voxel, channel, voxels, C, FIRST)
    logit = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    logit = tl.where((channel < C)[None, :], logit, float("-inf"))
    logit -= tl.max(logit, 1)[:, None]
    p = tl.exp(logit)
    total = tl.sum(p, 1)[:, None]
    label = tl.load(labels + sample * voxels + voxel, mask=exists, other=0).to(tl.int32)
    counts = tl.where((label >= 0) & (label < C), 1.0, float("nan"))
    if IGNORED is not None:
        counts = tl.where(label == IGNORED, 0.0, counts)
    counts = tl.where(exists, counts, 0.0)
    return logit - tl.log(total), p / total, channel[None, :] == label[:, None], counts[:, None], place, inside


@triton.jit(do_not_specialize=["voxels", "steps"])
def _softmax_sums_forward_kernel(
    logits,  # (B, C, V) if FIRST, else (B, V, C)
    labels,  # (B, V)
    sums,  # (B, slices, 4, C)
    voxels, steps,
    FIRST: tl.constexpr,  # 0, or what surely divides the voxels of contiguous logits
    IGNORED: tl.constexpr,  # a label or None
    C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums over a slice of a sample."""
    voxels = known_divisor(voxels, FIRST)
    sample, slice = tl.program_id(1), tl.program_id(0)
    overlap = tl.zeros((ROWS, LANES), tl.float32)
    predicted = tl.zeros((ROWS, LANES), tl.float32)
    labelled = tl.zeros((ROWS, LANES), tl.float32)
    entropy = tl.zeros((ROWS, LANES), tl.float32)
    for step in range(steps):
        voxel = (slice * steps + step) * ROWS + tl.arange(0, ROWS)
        log_p, p, is_label, counts, _, _ = _softmax(logits, labels, sample, voxel, voxels, FIRST, IGNORED, C, LANES)
        p *= counts
        predicted += p
        overlap += tl.where(is_label, p, 0.0)
        labelled += tl.where(is_label, counts, 0.0)
        entropy -= tl.where(is_label, log_p * counts, 0.0)
    channel = tl.arange(0, LANES)
    sums += (sample * tl.num_programs(0) + slice) * 4 * C + channel
    tl.store(sums, tl.sum(overlap, 0), mask=channel < C)
    tl.store(sums + C, tl.sum(predicted, 0), mask=channel < C)
    tl.store(sums + 2 * C, tl.sum(labelled, 0), mask=channel < C)
    tl.store(sums + 3 * C, tl.sum(entropy, 0), mask=channel < C)


@triton.jit(do_not_specialize=["voxels"])
def _softmax_sums_backward_kernel(
    grad,  # (B, 4, C), of the sums
    logits,  # (B, C, V) if FIRST, else (B, V, C)
    labels,  # (B, V)
    out,  # gradient of the logits, in their layout
    voxels,
    FIRST: tl.constexpr, IGNORED: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = p (dp - sum(p dp)) + g (p - onehot): dp of the first two sums, g that of -log(p) at the label."""
    voxels = known_divisor(voxels, FIRST)
    sample, channel = tl.program_id(1), tl.arange(0, LANES)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, p, is_label, counts, place, inside = _softmax(logits, labels, sample, voxel, voxels, FIRST, IGNORED, C, LANES)
    grad += sample * 4 * C + channel
    of_overlap = tl.load(grad, mask=channel < C, other=0.0)[None, :]
    of_predicted = tl.load(grad + C, mask=channel < C, other=0.0)[None, :]
    of_entropy = tl.where(is_label, tl.load(grad + 3 * C, mask=channel < C, other=0.0)[None, :], 0.0)
    of_p = of_predicted + tl.where(is_label, of_overlap, 0.0)
    g = p * (of_p + tl.sum(of_entropy - p * of_p, 1)[:, None]) - of_entropy
    tl.store(out + place, (g * counts).to(out.dtype.element_ty), mask=inside)
