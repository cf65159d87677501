"""From logits on the network's grid to labels on the image's, in slabs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_lgms.prediction.resampling import Resampling, along_axes

#: numbers that a slab of logits may have on the image's grid; a plane is the least
SLAB = {"cpu": 1 << 23, "cuda": 1 << 26, "mps": 1 << 25}


def write_labels(
    rows: Iterable[Tensor],
    resampling: Resampling,
    label_manager: LabelManager,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
    device: torch.device,
) -> None:
    """Fills in the labels of a volume, and its probabilities if they are wanted.

    Args:
        rows: logits (heads, n, Z, Y) in order along the first axis, on any device.
        resampling: from the network's grid to that of the labels.
        label_manager: of the model.
        labels: (Z', Y', X'), overwritten.
        probabilities: (heads, Z', Y', X') float32, overwritten; or None.
        device: where to compute.
    """
    start, small = 0, torch.uint8 if labels.dtype == np.uint8 else torch.int32  # before they leave the device
    for slab in slabs(rows, resampling.to(device), device):
        stop = start + slab.shape[1]
        if probabilities is None:
            found = _labels_of_logits(slab, label_manager)
        else:
            probable = label_manager.apply_inference_nonlin(slab)
            found = _labels_of_probabilities(probable, label_manager)
            probabilities[:, start:stop] = probable.cpu().numpy()
        labels[start:stop] = found.to(small).cpu().numpy()
        start = stop


def slabs(rows: Iterable[Tensor], resampling: Resampling, device: torch.device) -> Iterator[Tensor]:
    """Brings logits to another grid, holding only what the next planes need.

    Args:
        rows: (heads, n, Y, X) in order along the first axis, on any device.
        resampling: between the grids, on `device`.
        device: where to compute.

    Yields:
        (heads, m, Y', X') on `device`, in order; the m add up to Z'. Of the dtype that nnU-Net's function gives.
    """
    if resampling.clips:  # to the range of the whole volume
        yield resampling(torch.cat(list(rows), 1).to(device))
        return
    along_z, *in_plane = resampling.matrices
    if along_z is None:
        first = last = None
    else:
        used = (along_z != 0).cpu().numpy()
        first, last = used.argmax(1), used.shape[1] - 1 - used[:, ::-1].argmax(1)
    held, bottom, written = None, 0, 0
    for chunk in rows:
        held = chunk if held is None else torch.cat([held, chunk], 1)
        planes = bottom + held.shape[1]
        ready = planes if last is None else int(np.searchsorted(last, planes))
        step = _planes(held.shape, in_plane, device)
        while written < ready:
            end = min(written + step, ready)
            low, high = (written, end) if last is None else (int(first[written]), int(last[end - 1]) + 1)
            part = held[:, low - bottom : high - bottom].to(device)
            if resampling.changes:
                z = None if last is None else along_z[written:end, low:high]
                part = along_axes(part.float(), (z, *in_plane), (0, 1, 2)).to(resampling.dtype or chunk.dtype)
            yield part
            written = end
        done = planes if last is None or written == len(last) else int(first[written])
        held, bottom = held[:, done - bottom :].clone(), done


def _planes(shape: torch.Size, in_plane: list[Tensor | None], device: torch.device) -> int:
    """How many planes of the image's grid a slab has."""
    plane = [len(matrix) if matrix is not None else size for matrix, size in zip(in_plane, shape[2:])]
    return max(1, SLAB.get(device.type, SLAB["cpu"]) // (shape[0] * math.prod(plane)))


def _labels_of_logits(logits: Tensor, label_manager: LabelManager) -> Tensor:
    if label_manager.has_regions:
        return _labels_of_probabilities(label_manager.apply_inference_nonlin(logits), label_manager)
    return _labels_of_probabilities(logits, label_manager)


def _labels_of_probabilities(probabilities: Tensor, label_manager: LabelManager) -> Tensor:
    """(heads, n, Y, X) -> (n, Y, X), as `LabelManager.convert_probabilities_to_segmentation`, on any device."""
    if type(label_manager).convert_probabilities_to_segmentation is not _NNUNETS:
        return torch.from_numpy(np.asarray(label_manager.convert_probabilities_to_segmentation(probabilities.cpu())))
    if not label_manager.has_regions:
        # float32: PyTorch has no fast maximum of float16 on the CPU
        on_cpu = probabilities.device.type == "cpu"
        return (probabilities.float() if on_cpu else probabilities).max(0).indices
    labels = probabilities.new_zeros(probabilities.shape[1:], dtype=torch.int16)
    for region, label in zip(probabilities, label_manager.regions_class_order, strict=True):
        labels.masked_fill_(region > 0.5, label)
    return labels


_NNUNETS = LabelManager.convert_probabilities_to_segmentation
