"""nnU-Net's sliding window from one end of a volume to the other, in batches.

nnU-Net keeps the logits of all classes for the whole volume. Windows come in the order of the first axis; what none of
those to come reaches is finished and handed on, so that only a slab as thick as a window is there at any time.
Positions, weights, the order of the sums and their rounding to float16 are nnU-Net's: in the corners of a volume, where
weights are tiny, the rounding decides labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: starts (z, y, x) of a window
Start = tuple[int, int, int]
#: numbers that are handed on at once; a plane is the least
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 28}


def mirrored_mean(
    network: Callable[[Tensor], Tensor], x: Tensor, axes: Sequence[int] | None, largest_batch: int
) -> Tensor:
    """Mean logits of windows and of their copies mirrored along every combination of `axes`.

    Args:
        network: (B, C, *patch) -> (B, heads, *patch).
        x: (B, C, *patch).
        axes: of the patch, 0 is its first; None: no mirroring.
        largest_batch: windows and copies that go through the network together, if x alone is not more.

    Returns:
        (B, heads, *patch)
    """
    axes = [axis + 2 for axis in axes or ()]
    flips = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    together = max(1, largest_batch // len(x))
    total = None
    for first in range(0, len(flips), together):
        group = flips[first : first + together]
        copies = [torch.flip(x, flip) if flip else x for flip in group]
        logits = network(copies[0] if len(copies) == 1 else torch.cat(copies))
        for flip, part in zip(group, logits.split(len(x)), strict=True):
            part = torch.flip(part, flip) if flip else part
            total = part if total is None else total.add_(part)
    return total if len(flips) == 1 else total.div_(len(flips))


class SlidingWindow:
    """The windows of one volume, and the slab in which their logits are added up.

    Args:
        data: (C, Z, Y, X), at least as large as a window.
        starts: of the windows, in the order of their first axis.
        patch: of a window, (z, y, x); flat networks have z = 1.
        flat: whether the network takes (B, C, y, x).
        weights: (z, y, x) of the patch, float16, on the device of the sums.
        heads: channels of the network's output.
        n_models: whose logits are averaged.
        at_once: windows that go through the network together.
    """

    def __init__(
        self,
        data: Tensor,
        starts: Sequence[Start],
        patch: Sequence[int],
        flat: bool,
        weights: Tensor,
        heads: int,
        n_models: int,
        at_once: int,
    ):
        self.data, self.starts, self.patch, self.flat, self.weights = data, starts, tuple(patch), flat, weights
        self.at_once = at_once
        # Weights of models are loaded for a group of windows, not for each of them.
        size = at_once if n_models == 1 else 8 * at_once
        self.groups = [starts[i : i + size] for i in range(0, len(starts), size)]
        planes = data.shape[2:]
        self.thickness = max(group[-1][0] + patch[0] - first for group, first in zip(self.groups, self._unfinished()))
        self.logits = [weights.new_zeros((heads, self.thickness, *planes)) for _ in range(n_models)]
        self.norm = weights.new_zeros((self.thickness, *planes))

    def _unfinished(self) -> list[int]:
        """The first plane that is not finished before each of the groups."""
        return [group[0][0] for group in self.groups]

    def rows(self, predict: Callable[[int, Tensor], Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
        """Mean logits of all models, in order along the first axis.

        Args:
            predict: number of a model and windows (B, C, *patch) -> logits (B, heads, *patch).
            progress: called with the number of windows that are done, times models.

        Yields:
            (heads, n, Y, X) float16; the n add up to Z.
        """
        unfinished = [*self._unfinished()[1:], self.data.shape[1]]
        bottom = 0
        for group, following in zip(self.groups, unfinished, strict=True):
            for model in range(len(self.logits)):
                for first in range(0, len(group), self.at_once):
                    windows = group[first : first + self.at_once]
                    self._add(model, windows, predict(model, self._gathered(windows)), bottom)
                    progress(len(windows))
            for z, y, x in group:
                self.norm[self._area(z - bottom, y, x)] += self.weights
            finished = following - bottom
            if finished:
                yield from self._means(finished)
                self._advance(finished)
                bottom = following

    def _gathered(self, windows: Sequence[Start]) -> Tensor:
        """(B, C, *patch), always of one shape for the network's sake: the last window is there several times."""
        windows = [*windows, *[windows[-1]] * (self.at_once - len(windows))]
        together = torch.stack([self.data[(slice(None), *self._area(*start))] for start in windows])
        return together.squeeze(2) if self.flat else together

    def _add(self, model: int, windows: Sequence[Start], logits: Tensor, bottom: int) -> None:
        for (z, y, x), window in zip(windows, logits):
            window = window.to(self.weights.device)
            if self.flat:
                window = window.unsqueeze(1)
            window *= self.weights
            sums = self.logits[model][(slice(None), *self._area(z - bottom, y, x))]
            if window.dtype == sums.dtype:
                sums += window
                continue
            for total, part in zip(sums, window):  # to add float32, PyTorch makes float32 copies of what it adds to
                total += part

    def _area(self, z: int, y: int, x: int) -> tuple[slice, slice, slice]:
        return tuple(slice(start, start + size) for start, size in zip((z, y, x), self.patch))

    def _means(self, n: int) -> Iterator[Tensor]:
        """Of the first n planes, some at a time."""
        plane = self.logits[0][:, 0].numel()
        step = max(1, CHUNK.get(self.weights.device.type, CHUNK["cpu"]) // plane)
        for first in range(0, n, step):
            planes = slice(first, min(first + step, n))
            total = None
            for logits in self.logits:
                mean = torch.div(logits[:, planes], self.norm[planes])
                total = mean if total is None else total.add_(mean)
            yield total if len(self.logits) == 1 else total.div_(len(self.logits))

    def _advance(self, n: int) -> None:
        """Planes that windows to come still reach move to the front."""
        for sums in (*self.logits, self.norm[None]):
            for first in range(0, self.thickness - n, n):  # n planes at a time, as memory does not overlap then
                last = min(first + n, self.thickness - n)
                sums[:, first:last] = sums[:, first + n : last + n]
            sums[:, max(self.thickness - n, 0) :] = 0


def windows_at_once(patch: Sequence[int], n_copies: int, n_windows: int, voxels: int) -> tuple[int, int]:
    """How many windows, and how many of them and of their mirrored copies, go through the network together.

    Both are powers of two, so that few shapes come: each new one costs a choice of algorithms, or a CUDA graph.

    Args:
        patch: of a window.
        n_copies: of a window, mirrored, with itself.
        n_windows: there are.
        voxels: that may go through the network together.
    """
    largest = 1 << int(math.log2(max(1, voxels // math.prod(patch))))
    at_once = max(1, min(largest // n_copies, 1 << int(math.log2(n_windows))))
    return at_once, min(largest, at_once * n_copies)
