"""Whether logits carry a pattern of the network's upsampling, a checkerboard, by their spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

#: bins around a frequency that it is compared with; those within the first number share its power by the window
WINDOW, NEIGHBOURS = 1, 5


def checkerboard(logits: Tensor, periods: Sequence[int] = (2, 4, 8, 16)) -> dict[int, float]:
    """How far the spectrum of logits stands out at the frequencies of an upsampling.

    An upsampling by 2 that treats even and odd voxels differently leaves a pattern that repeats every 2 voxels, one two
    levels below every 4, and so on. A map without a pattern has a smooth spectrum, and its power at a frequency is that
    of the frequencies around: the largest ratio is some 10 by chance, and tens to thousands with a pattern.

    Args:
        logits: (B, C, *spatial), such as those of a whole image.
        periods: in voxels, cumulative strides of the network's levels.

    Returns:
        for each period the largest ratio over its frequencies along and across axes. Axes shorter than 12 periods are
        not looked along; a period for which all are is left out.
    """
    found = {}
    for period in periods:
        sizes = logits.shape[2:]
        long = [n >= 2 * (NEIGHBOURS + 1) * period for n in sizes]
        if not any(long):
            continue
        # whole periods, so that their frequencies are the spectrum's own
        lengths = [n - n % period if along else n for n, along in zip(sizes, long, strict=True)]
        power = _power(logits, lengths)
        places = product(*(range(0, n, n // period) if along else (0,) for n, along in zip(lengths, long, strict=True)))
        found[period] = max(_stands_out(power, place) for place in places if any(place))
    return found


def _power(logits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean spectrum of the maps of a batch, each cut to these lengths, (*lengths)."""
    maps = logits.detach().double()[(..., *(slice(n) for n in lengths))].flatten(0, 1)
    axes = tuple(range(1, maps.ndim))
    maps = maps - maps.mean(axes, keepdim=True)
    for axis, n in zip(axes, lengths, strict=True):  # or the image's border would be an edge in all frequencies
        window = torch.hann_window(n, dtype=maps.dtype, device=maps.device) if n > 1 else maps.new_ones(1)
        maps = maps * window.reshape([-1 if a == axis else 1 for a in range(maps.ndim)])
    return torch.fft.fftn(maps, dim=axes).abs().square().mean(0)


def _stands_out(power: Tensor, place: Sequence[int]) -> float:
    """Power at a frequency over the mean of those around."""

    def box(reach: int) -> Tensor:
        part = power
        for axis, (i, n) in enumerate(zip(place, power.shape, strict=True)):
            around = sorted({(i + step) % n for step in range(-reach, reach + 1)})
            part = part.index_select(axis, torch.tensor(around, device=power.device))
        return part

    near, far = box(WINDOW), box(NEIGHBOURS)
    around = (far.sum() - near.sum()) / max(1, far.numel() - near.numel())
    return float(power[tuple(place)] / around.clamp_min(1e-300))
