"""nnU-Net's resampling as matrix products on any device (see :mod:`nnunet_lgms.splines`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnunet_lgms.splines import ORDERS, axis_matrices, thick_axis

#: nnU-Net's functions that are matrix products, by the arguments that this module knows
SKIMAGE = {"is_seg", "order", "order_z", "force_separate_z"}
TORCH = {"is_seg", "force_separate_z", "memefficient_seg_resampling", "num_threads", "device", "mode"}


@dataclass(frozen=True)
class Resampling:
    """How a volume goes from one grid to another.

    Attributes:
        matrices: one (new, old) an axis (z, y, x); None where nothing changes.
        thick: the axis that is resampled after the others, or None.
        order: of the splines; above 1 they leave the range of the values, and skimage clips them to it.
        dtype: of the results, as nnU-Net has it: skimage's are rounded to the dtype of the input, which is None here,
            PyTorch's are float32.
        device: of the matrices and of the results.
    """

    matrices: tuple[Tensor | None, ...]
    thick: int | None
    order: int
    dtype: torch.dtype | None
    device: torch.device = torch.device("cpu")

    @property
    def changes(self) -> bool:
        return any(matrix is not None for matrix in self.matrices)

    @property
    def clips(self) -> bool:
        return self.changes and self.order > 1

    def to(self, device: torch.device) -> Resampling:
        matrices = tuple(None if matrix is None else matrix.to(device) for matrix in self.matrices)
        return Resampling(matrices, self.thick, self.order, self.dtype, device)

    def __call__(self, volume: Tensor) -> Tensor:
        """(C, Z, Y, X) on any device -> (C, Z', Y', X') of the dtype that nnU-Net's function gives."""
        if not self.changes:
            return volume.to(self.device)
        dtype = self.dtype or volume.dtype
        return torch.stack([self._channel(channel.to(self.device).float()).to(dtype) for channel in volume])

    def _channel(self, channel: Tensor) -> Tensor:
        # In the plane first; across thick slices last, after clipping, as nnU-Net does.
        plane = [axis for axis in range(3) if axis != self.thick]
        out = along_axes(channel[None], self.matrices, plane)[0]
        if self.clips:
            # skimage clips to the range of what it is given: the volume, or each of the thick slices
            low, high = (reduce(channel, dim=plane, keepdim=True) for reduce in (torch.amin, torch.amax))
            out = out.clamp_(low, high)
        return out if self.thick is None else along_axes(out[None], self.matrices, [self.thick])[0]


def along_axes(x: Tensor, matrices: Sequence[Tensor | None], axes: Sequence[int]) -> Tensor:
    """(C, Z, Y, X) float32 times the matrices of some axes, those first that make it smaller."""
    axes = [axis for axis in axes if matrices[axis] is not None]
    for axis in sorted(axes, key=lambda axis: matrices[axis].shape[0] / matrices[axis].shape[1]):
        x = along_axis(x, matrices[axis], axis)
    return x


def along_axis(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """`matrix` (new, old) times every line of x (C, Z, Y, X) along `axis` of z, y, x."""
    if axis == 2:
        return x @ matrix.T
    if axis == 1:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def as_matrices(
    function: Callable, old: Sequence[int], new: Sequence[int], current: Sequence[float], wanted: Sequence[float]
) -> Resampling | None:
    """What one of nnU-Net's resampling functions does between two grids, or None if that is no matrix product.

    Args:
        function: `resampling_fn_data` or `resampling_fn_probabilities` of nnU-Net's configuration, with its arguments.
        old: voxels (z, y, x) of the grid that there is.
        new: voxels of the grid that is wanted.
        current: spacing of the grid that there is, in mm.
        wanted: spacing of the grid that is wanted.
    """
    name, given = _name(function), _arguments(function)
    unchanged = Resampling((None,) * len(old), None, 0, None)
    if given.get("is_seg"):
        return None
    if name == "no_resampling_hack":
        return unchanged
    if name == "resample_data_or_seg_to_shape" and given.keys() <= SKIMAGE:
        order, order_z = given.get("order", 3), given.get("order_z", 0)
        force, dtype = given.get("force_separate_z", False), None
    elif name == "resample_torch_fornnunet" and given.keys() <= TORCH and given.get("mode", "linear") == "linear":
        order, order_z, force, dtype = 1, 0, given.get("force_separate_z"), torch.float32
    else:
        return None
    if not {order, order_z} <= set(ORDERS):
        return None
    if tuple(old) == tuple(new):
        return unchanged
    thick = thick_axis(force, current, wanted)
    matrices = axis_matrices(old, new, order, order_z, thick)
    return Resampling(tuple(map(_to_tensor, matrices)), thick, order, dtype)


def _name(function: Callable) -> str:
    """Its name if it is nnU-Net's own."""
    function = function.func if isinstance(function, partial) else function
    module = getattr(function, "__module__", "")
    return function.__name__ if module.startswith("nnunetv2.preprocessing.resampling.") else ""


def _arguments(function: Callable) -> dict:
    return dict(function.keywords) if isinstance(function, partial) else {}


def _to_tensor(matrix: np.ndarray | None) -> Tensor | None:
    return None if matrix is None else torch.from_numpy(matrix.astype(np.float32))
