"""Operators of the network in ONNX's own, in the form that runtimes on CPUs compute fastest.

PyTorch's exporter calls these functions while it translates a graph; tensors are ONNX values then. What each form gains
under ONNX Runtime is in docs/how-to/deployment.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import onnx
from onnxscript import ir
from onnxscript import opset20 as op

INT64_MAX = 2**63 - 1  # as the end of a slice: the end of the axis
LANES = 16  # channels that ONNX Runtime computes at a time, also where there are fewer

_MATRIX = """
one_head (float[n, d] q, float[d, m] k, float[m, d] v) => (float[n, d] out) {
    scores = MatMul(q, k)
    weights = Softmax<axis = -1>(scores)
    out = MatMul(weights, v)
}"""
_MASKED_MATRIX = """
one_head (float[n, d] q, float[d, m] k, float[m, d] v, float[1, m] mask) => (float[n, d] out) {
    scores = MatMul(q, k)
    masked = Add(scores, mask)
    weights = Softmax<axis = -1>(masked)
    out = MatMul(weights, v)
}"""


def attention(
    query, key, value, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False, scale=None, enable_gqa=False
):
    """`scaled_dot_product_attention`, one head of one sequence after the other.

    Of the (N, N) matrices of all heads and sequences only one is there at a time: it stays in the cache, and a volume
    does not need memory for all of them.

    Args:
        query: (B, heads, N, head_dim), as are `key` and `value`.
        attn_mask: None, or a boolean (B, 1, 1, N), true where a key may be attended.

    Raises:
        ValueError: what this package's attention does not use (dropout, a causal mask, grouped heads).
    """
    if dropout_p or is_causal or enable_gqa:
        raise ValueError("Attention with dropout, a causal mask or grouped heads is not translated.")
    head_dim = query.shape[-1]
    query = op.Mul(query, op.Constant(value_float=float(scale or head_dim**-0.5)))
    heads = [_flat(query, 2), _flat(op.Transpose(key, perm=[0, 1, 3, 2]), 2), _flat(value, 2)]
    if attn_mask is not None:
        zero, never = op.Constant(value_float=0.0), op.Constant(value_float=-float("inf"))
        mask = op.Where(attn_mask, zero, never)
        first_axes = op.Concat(op.Shape(query, start=0, end=2), op.Constant(value_ints=[1, 1]), axis=0)
        heads.append(_flat(op.Expand(mask, first_axes), 2))
    body = ir.from_proto(onnx.parser.parse_graph(_MATRIX if attn_mask is None else _MASKED_MATRIX))
    out = op.Scan(*heads, body=body, num_scan_inputs=len(heads))
    return op.Reshape(out, op.Shape(query))


def depthwise(
    x, parameters, channels: Sequence[int], kernels: Sequence[int], has_bias: bool, flip: bool, residual: bool
):
    """`nnunet_lgms::multi_kernel_depthwise`: x (B, C, *spatial), and weights and biases in the flat `parameters`.

    Narrow groups become one convolution with the largest kernel, the smaller ones in its middle among zeros: less work
    than it looks, as a group of 4 channels costs as much as one of ``LANES``.
    """
    if flip:
        raise ValueError("Only gradients mirror their kernels: export the network for inference.")
    axes = len(kernels) // len(channels)
    sizes = [tuple(kernels[i * axes : (i + 1) * axes]) for i in range(len(channels))]
    starts = [0, *accumulate(c * prod(kernel) for c, kernel in zip(channels, sizes, strict=True))]
    weights = []
    for c, kernel, start in zip(channels, sizes, starts):
        weights.append(op.Reshape(op.Slice(parameters, [start], [start + c * prod(kernel)], [0]), [c, 1, *kernel]))
    groups = list(channels)
    if max(channels) < LANES:
        largest = tuple(map(max, zip(*sizes)))
        weights = [op.Concat(*(_in_the_middle(w, k, largest) for w, k in zip(weights, sizes)), axis=0)]
        groups, sizes = [sum(channels)], [largest]
    ends, out = list(accumulate(groups)), []
    for c, end, kernel, weight in zip(groups, ends, sizes, weights, strict=True):
        part = op.Slice(x, [end - c], [end], [1]) if len(groups) > 1 else x
        bias = op.Slice(parameters, [starts[-1] + end - c], [starts[-1] + end], [0]) if has_bias else None
        out.append((_by_planes if axes == 3 else _depthwise)(part, weight, bias, c, kernel))
    out = op.Concat(*out, axis=1) if len(out) > 1 else out[0]
    return op.Add(out, x) if residual else out


def _depthwise(x, weight, bias, channels: int, kernel: Sequence[int]):
    """(B, C, Y, X) -> (B, C, Y, X)."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return op.Conv(*inputs, group=channels, kernel_shape=list(kernel), pads=[n // 2 for n in kernel] * 2)


def _by_planes(x, weight, bias, channels: int, kernel: Sequence[int]):
    """(B, C, Z, Y, X) -> (B, C, Z, Y, X): a flat convolution of all slices for each plane of the kernel.

    ONNX Runtime's fast convolutions are for flat maps alone.
    """
    depth, *flat_kernel = kernel
    slices = op.Transpose(x, perm=[2, 0, 1, 3, 4])  # (Z, B, C, Y, X)
    flat = _joined(-1, op.Shape(slices, start=2))
    padded = op.Pad(slices, [depth // 2, 0, 0, 0, 0] * 2) if depth > 1 else slices
    out = None
    for plane in range(depth):
        shifted = op.Slice(padded, [plane], [plane - depth + 1 or INT64_MAX], [0])
        inputs = [op.Reshape(shifted, flat), op.Squeeze(op.Slice(weight, [plane], [plane + 1], [2]), [2])]
        part = _depthwise(*inputs, bias if plane == 0 else None, channels, flat_kernel)
        out = part if out is None else op.Add(out, part)
    return op.Transpose(op.Reshape(out, op.Shape(slices)), perm=[1, 2, 0, 3, 4])


def _in_the_middle(weight, kernel: Sequence[int], size: Sequence[int]):
    """A kernel among zeros; both sizes are odd."""
    border = [0, 0, *((n - k) // 2 for k, n in zip(kernel, size, strict=True))]
    return op.Pad(weight, border * 2) if any(border) else weight


def _flat(x, axes: int):
    """The first axes as one."""
    return op.Reshape(x, _joined(-1, op.Shape(x, start=axes)))


def _joined(size: int, sizes):
    """A shape of one size and the sizes of another shape."""
    return op.Concat(op.Constant(value_ints=[size]), sizes, axis=0)
