"""nnU-Net's sliding window, from one end of the volume to the other, never holding logits of more than one row of
windows.

nnU-Net keeps the logits of all classes for the whole volume. Here the windows advance along the first axis; what no
later window reaches is finished and handed on. Sums are rounded to float16 where nnU-Net rounds them: in the corners of
a volume, where weights are tiny, this decides labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import numpy as np

SIGMA = 1 / 8  # of the window's size
PEAK = 10  # nnU-Net's scale of the weights
TRUNCATE = 4  # standard deviations, as in scipy's filter


def gaussian(patch_size: Sequence[int]) -> np.ndarray:
    """nnU-Net's weights of a window in float16; none is 0."""
    weights = np.ones((1,) * len(patch_size))
    for axis, size in enumerate(patch_size):
        sigma = size * SIGMA
        radius = int(TRUNCATE * sigma + 0.5)
        kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        kernel /= kernel.sum()
        line = np.zeros(size)
        for i in range(size):
            offset = i - size // 2 + radius
            line[i] = kernel[offset] if 0 <= offset < len(kernel) else 0
        shape = [1] * len(patch_size)
        shape[axis] = size
        weights = weights * line.reshape(shape)
    weights = (weights * (PEAK / weights.max())).astype(np.float16)
    weights[weights == 0] = weights[weights > 0].min()
    return weights


def window_starts(size: int, patch: int, step: float) -> list[int]:
    """Where windows start along one axis: evenly spread, at most `step` of a patch apart."""
    number = math.ceil((size - patch) / (patch * step)) + 1
    stride = (size - patch) / (number - 1) if number > 1 else 0
    return [int(np.round(stride * i)) for i in range(number)]


def mirrored_mean(network: Callable[[np.ndarray], np.ndarray], window: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Mean logits of a window (1, C, *patch) and its copies mirrored along every combination of `axes`."""
    logits = network(window)
    combinations = [c for n in range(1, len(axes) + 1) for c in itertools.combinations([a + 2 for a in axes], n)]
    for flipped in combinations:
        logits += np.flip(network(np.ascontiguousarray(np.flip(window, flipped))), flipped)
    if combinations:
        logits /= len(combinations) + 1
    return logits


def sliding_window(
    network: Callable[[np.ndarray], np.ndarray],
    data: np.ndarray,
    heads: int,
    patch_size: Sequence[int],
    mirror_axes: Sequence[int],
    step: float,
    progress: Callable[[int, int], None],
) -> Iterator[np.ndarray]:
    """Logits of a volume, in order along its first axis.

    Args:
        network: (1, C, *patch) -> (1, heads, *patch), float32.
        data: (C, Z, Y, X).
        heads: channels of the network's output.
        patch_size: three sizes, or two: then every slice is predicted by itself.
        mirror_axes: axes of the patch.
        step: of windows, in patches.
        progress: called with windows done and in all.

    Yields:
        (heads, n, Y, X), float16; the n add up to Z.
    """
    original = data.shape[1:]
    patch = tuple(patch_size) if len(patch_size) == 3 else (1, *patch_size)
    pad = [max(0, p - s) for p, s in zip(patch, original)]
    if any(pad):
        data = np.pad(data, [(0, 0), *((n // 2, n - n // 2) for n in pad)])
    shape = data.shape[1:]
    weights = gaussian(patch_size).reshape(patch)
    starts = [window_starts(s, p, step) for s, p in zip(shape, patch)]
    if len(patch_size) == 2:
        starts[0] = list(range(shape[0]))
    inner = (slice(None), slice(None), *(slice(n // 2, n // 2 + s) for n, s in zip(pad[1:], original[1:])))
    total, done = math.prod(map(len, starts)), 0

    logits = np.zeros((heads, patch[0], *shape[1:]), np.float16)
    norm = np.zeros((patch[0], *shape[1:]), np.float16)
    low, high = pad[0] // 2, pad[0] // 2 + original[0]  # rows of the image in the padded volume
    for z, following in zip(starts[0], [*starts[0][1:], shape[0]]):
        for y, x in itertools.product(*starts[1:]):
            area = (slice(z, z + patch[0]), slice(y, y + patch[1]), slice(x, x + patch[2]))
            window = np.ascontiguousarray(data[(slice(None), *area)])
            window = window.reshape(1, len(data), *patch_size)
            prediction = mirrored_mean(network, window, mirror_axes).reshape(heads, *patch)
            prediction *= weights
            prediction += logits[:, :, area[1], area[2]]
            logits[:, :, area[1], area[2]] = prediction
            norm[:, area[1], area[2]] += weights
            done += 1
            progress(done, total)
        finished = following - z
        first, last = max(low - z, 0), min(high - z, finished)
        if first < last:
            mean = logits[:, first:last].astype(np.float32) / norm[first:last].astype(np.float32)
            yield mean.astype(np.float16)[inner]
        # The rows that later windows still reach move to the front.
        kept = patch[0] - finished
        logits[:, :kept] = logits[:, finished:].copy()
        norm[:kept] = norm[finished:].copy()
        logits[:, kept:] = 0
        norm[kept:] = 0


def resampled_rows(rows: Iterator[np.ndarray], matrices: Sequence[np.ndarray | None]) -> Iterator[np.ndarray]:
    """Bring the logits of :func:`sliding_window` to another grid, holding only what the next rows need.

    Args:
        rows: (heads, n, Y, X) in order.
        matrices: one (new, old) an axis, or None.

    Yields:
        (heads, m, Y', X'), float16; the m add up to the new first axis.
    """
    if all(matrix is None for matrix in matrices):
        yield from rows
        return
    along_z = matrices[0]
    waiting: list[np.ndarray] = []  # planes (heads, Y', X') that are still needed
    first_waiting = written = 0
    for chunk in rows:
        chunk = _in_plane(chunk.astype(np.float32), matrices[1:])
        if along_z is None:
            yield chunk.astype(np.float16)
            continue
        waiting.extend(np.moveaxis(chunk, 1, 0))
        available = first_waiting + len(waiting)
        while written < len(along_z):
            needed = np.flatnonzero(along_z[written])
            if needed[-1] >= available:
                break
            del waiting[: max(0, needed[0] - first_waiting)]
            first_waiting = max(first_waiting, int(needed[0]))
            plane = reduce(np.add, (np.float32(along_z[written, i]) * waiting[i - first_waiting] for i in needed))
            yield plane[:, None].astype(np.float16)
            written += 1


def _in_plane(chunk: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    along_y, along_x = matrices
    if along_x is not None:
        chunk = chunk @ along_x.T.astype(np.float32)
    if along_y is not None:
        chunk = along_y.astype(np.float32) @ chunk
    return chunk
