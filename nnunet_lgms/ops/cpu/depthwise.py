"""Multi-kernel depthwise convolution and its weight gradient on a CPU, as convolutions that oneDNN is fast at.

Its depthwise convolutions are vectorised over the channels of channels-last 2D maps, so in 2D all groups are one such
convolution, with the smaller kernels padded to the size of the largest.

3D ones and weight gradients are not, and have four channels where a register holds sixteen numbers. There, `TILE`
voxels along an axis become channels: what they read along that axis is a window of `TILE + k - 1` voxels, and the
convolution along it a dense product of window and tile, with the kernel on its diagonals. The rest is a dense
convolution over the other axes, with the channels of the map as groups: for k = 9 three times the multiplications in
half the time.

Either way some factors are zeros, so that NaN and infinity reach farther than the kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last, wants_channels_last

TILE = 16  # numbers in a register


def fits(x: Tensor) -> bool:
    """What oneDNN convolves in full precision; no empty batch."""
    return wants_channels_last(x) and x.dtype == torch.float32 and x.numel() > 0


def convolve(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], flip: bool, residual: bool
) -> Tensor:
    """The convolution, with mirrored kernels if ``flip``, plus x if ``residual``.

    Args:
        x: (B, C, *spatial).
        weights: (C_i, 1, *k_i) for each group of channels.
        biases: (C_i,) or None for each group.

    Returns:
        (B, C, *spatial), channels-last where x is, else contiguous.
    """
    axes = tuple(range(2, x.ndim))
    weights = [w.flip(axes) if flip else w.clone() for w in weights]
    if residual:  # x is its convolution with 1
        for w in weights:
            w.movedim(1, -1)[(slice(None), *(k // 2 for k in w.shape[2:]))] += 1
    bias = None if biases[0] is None else torch.cat(list(biases))
    with torch.autocast("cpu", enabled=False):
        out = (_convolve_2d if x.ndim == 4 else _convolve_3d)(x, weights, bias)
    return out.contiguous(memory_format=CHANNELS_LAST[x.ndim] if channels_last(x) else torch.contiguous_format)


def correlate(x: Tensor, grad: Tensor, channels: Sequence[int], kernels: Sequence[Sequence[int]]) -> list[Tensor]:
    """Gradients (C_i, *k_i) of the weights of all groups, from x and the result's gradient, (B, C, *spatial)."""
    axis = _long_axis(kernels)
    overlap = max(kernel[axis] for kernel in kernels) - 1
    lines, grads = _Lines(x, axis, overlap), _Lines(grad, axis, 0)
    taps, start = [], 0
    with torch.autocast("cpu", enabled=False):
        for c, kernel in zip(channels, kernels, strict=True):
            taps.append(_correlate_tiles(lines, grads, slice(start, start + c), kernel))
            start += c
    return taps


def _convolve_2d(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    size = [max(w.shape[axis] for w in weights) for axis in (2, 3)]
    kernel = x.new_zeros(x.shape[1], 1, *size)
    for part, w in zip(kernel.split([len(w) for w in weights]), weights, strict=True):
        height, width = w.shape[2:]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        part[:, :, top : top + height, left : left + width] = w
    return _same_conv(x.contiguous(memory_format=torch.channels_last), kernel, bias)


def _convolve_3d(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    kernels = [w.shape[2:] for w in weights]
    axis = _long_axis(kernels)
    lines = _Lines(x, axis, max(kernel[axis] for kernel in kernels) - 1)
    out = x.new_empty(lines.shape)
    start = 0
    for weight in weights:
        part = slice(start, start + len(weight))
        start += len(weight)
        dense, diagonals = lines.dense(weight.shape[0], weight.shape[2:])
        diagonals.copy_(weight.movedim(2 + axis, 2))
        tile_bias = None if bias is None else bias[part].repeat_interleave(lines.tile)
        tiles = _same_conv(lines.tiles(part, weight.shape[2 + axis] - 1), dense, tile_bias)
        lines.join(tiles, out[:, :, :, part])
    return out[..., : x.shape[2 + axis]].movedim((-1, -2), (2 + axis, 1))


def _correlate_tiles(lines: _Lines, grads: _Lines, part: slice, kernel: Sequence[int]) -> Tensor:
    """(C_i, *kernel) of the channels ``part``."""
    c, axis = part.stop - part.start, lines.axis
    dense, _ = lines.dense(c, kernel)
    padding, one, zero = [k // 2 for k in dense.shape[2:]], [1, 1], [0, 0]
    dense = torch.ops.aten.convolution_backward(
        grads.tiles(part, 0), lines.tiles(part, kernel[axis] - 1), dense, None,
        one, padding, one, False, zero, c, [False, True, False],
    )[1]  # fmt: skip
    taps = lines.diagonals(dense.contiguous(), kernel).sum(1)
    return taps.movedim(1, 1 + axis)


def _same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, G * C, H, W), weight (G * C', C, kh, kw) -> (B, G * C', H, W)."""
    padding = [k // 2 for k in weight.shape[2:]]
    return torch.mkldnn_convolution(x, weight, bias, padding, [1, 1], [1, 1], x.shape[1] // weight.shape[1])


def _long_axis(kernels: Sequence[Sequence[int]]) -> int:
    """The axis along which the kernels are largest, where less of the products is zeros; of several the last."""
    lengths = [sum(sizes) for sizes in zip(*kernels, strict=True)]
    return max(range(len(lengths)), key=lambda axis: (lengths[axis], axis))


class _Lines:
    """A map with one axis innermost, (B, H, W, C, voxels), cut into tiles of that axis.

    Args:
        x: (B, C, *spatial); in 2D, H is 1.
        axis: the spatial axis that becomes the innermost.
        overlap: largest number of voxels that the window of a tile is wider than the tile.
    """

    def __init__(self, x: Tensor, axis: int, overlap: int):
        self.axis, self.overlap = axis, overlap
        size = x.shape[2 + axis]
        self.tile = min(TILE, size)
        self.count = -(-size // self.tile)
        x = x.movedim((2 + axis, 1), (-1, -2))
        x = x.unsqueeze(1) if x.ndim == 4 else x
        self.shape = *x.shape[:-1], self.count * self.tile
        self.data = F.pad(x, (overlap // 2, self.shape[-1] - size + overlap // 2)).contiguous()

    def tiles(self, part: slice, overlap: int) -> Tensor:
        """The channels ``part``: (B * count, C_i * (tile + overlap), H, W), channels innermost."""
        margin = (self.overlap - overlap) // 2
        x = self.data[:, :, :, part, margin : self.data.shape[-1] - margin]
        x = x.unfold(-1, self.tile + overlap, self.tile)  # (B, H, W, C_i, count, tile + overlap)
        return x.movedim(-2, 1).flatten(4, 5).flatten(0, 1).movedim(-1, 1)

    def join(self, tiles: Tensor, out: Tensor) -> None:
        """(B * count, C_i * tile, H, W) into ``out`` (B, H, W, C_i, count * tile)."""
        tiles = tiles.movedim(1, -1).unflatten(-1, (-1, self.tile)).unflatten(0, (-1, self.count))
        out.unflatten(-1, (self.count, self.tile)).copy_(tiles.movedim(1, -2))

    def dense(self, channels: int, kernel: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Zeros (channels * tile, window, kh, kw) for the weights between tiles, and their :meth:`diagonals`."""
        across = _across(kernel, self.axis)
        window = self.tile + kernel[self.axis] - 1
        dense = self.data.new_zeros(channels * self.tile, window, *across)
        return dense, self.diagonals(dense, kernel)

    def diagonals(self, dense: Tensor, kernel: Sequence[int]) -> Tensor:
        """The places of weights between tiles that a kernel stands at: a view (C_i, tile, k, *other axes)."""
        window, *across = dense.shape[1:]
        taps = math.prod(across)
        shape = (dense.shape[0] // self.tile, self.tile, kernel[self.axis], *across)
        view = dense.as_strided(shape, (self.tile * window * taps, (window + 1) * taps, taps, across[1], 1))
        return view if len(kernel) == 3 else view.squeeze(3)


def _across(kernel: Sequence[int], axis: int) -> list[int]:
    """The sizes of a kernel along the other two axes, the first of which has one voxel in 2D."""
    across = [k for a, k in enumerate(kernel) if a != axis]
    return across if len(across) == 2 else [1, *across]
