"""The paper's recipe as a smoke test: every part of a training, its validation included, in about a minute."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

# Voxels, for two CPU cores at 5 microseconds a voxel of a training step and 3 of a prediction.
STEP_VOXELS = 2**18
VALIDATION_VOXELS = 2**23


class nnUNetTrainerLGMSNet_smoke(nnUNetTrainerLGMSNet):
    """The paper's recipe in 2 epochs of 5 steps, and the validation of the smallest case: does all of it run?

    It is made for two CPU cores and about a minute. Where a planned batch has more than ``STEP_VOXELS``, fewer samples
    and then a smaller patch take its place; where the smallest case is too large to be predicted with mirroring, it is
    predicted without. The log says so. The network is the planned one, and so are the plans that are kept with it.
    """

    num_epochs = 2
    num_iterations_per_epoch = 5
    num_val_iterations_per_epoch = 1
    save_every = 1

    def initialize(self):
        super().initialize()
        planned, topology = self.configuration_manager, Topology.of(self.configuration_manager.configuration)
        whole = [math.prod(strides) for strides in zip(*topology.strides, strict=True)]
        patch_size = smaller_patch(planned.patch_size, whole, STEP_VOXELS // min(2, self.batch_size))
        batch_size = min(self.batch_size, max(2, STEP_VOXELS // math.prod(patch_size)))
        if (batch_size, patch_size) != (self.batch_size, list(planned.patch_size)):
            self.print_to_log_file(
                f"For a quick test, {batch_size} patches of {patch_size} voxels take the place of the planned "
                f"{self.batch_size} of {list(planned.patch_size)}."
            )
        self.batch_size = batch_size
        self.configuration_manager = ConfigurationManager({**planned.configuration, "patch_size": patch_size})

    def do_split(self):
        """The planned cases for training, and for validation the smallest."""
        training, validation = super().do_split()
        return training, sorted(validation, key=lambda case: math.prod(self._size_of(case)))[:1]

    def _size_of(self, case: str) -> tuple[int, ...]:
        """Voxels per axis; three of them for flat images, too."""
        return self.dataset_class(self.preprocessed_dataset_folder, [case]).load_case(case)[0].shape[1:]

    def perform_actual_validation(self, save_probabilities: bool = False):
        """As nnU-Net's, of one case, and without mirroring where that would take minutes."""
        (case,) = self.do_split()[1]
        self.print_to_log_file(f"For a quick test, only {case}, the smallest case of the validation, is predicted.")
        voxels = voxels_to_predict(self._size_of(case), self.configuration_manager.patch_size)
        if voxels * 2 ** len(self.inference_allowed_mirroring_axes or ()) > VALIDATION_VOXELS:
            self.inference_allowed_mirroring_axes = None
            self.print_to_log_file(
                f"It is large, so it is predicted without mirroring: {voxels / 1e6:.0f} million voxels in all windows, "
                "of which two CPU cores predict about 20 million a minute."
            )
        super().perform_actual_validation(save_probabilities)


def voxels_to_predict(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """Voxels of all of nnU-Net's windows, which overlap by half, in an image of three axes."""
    flat, deep = size[: -len(patch_size)], size[-len(patch_size) :]
    windows = (math.ceil(2 * max(n - p, 0) / p) + 1 for n, p in zip(deep, patch_size, strict=True))
    return math.prod(flat) * math.prod(windows) * math.prod(patch_size)


def smaller_patch(patch_size: Sequence[int], whole: Sequence[int], voxels: int) -> list[int]:
    """A patch of at most ``voxels`` voxels, made smaller along its longest axes.

    Args:
        patch_size: the planned one.
        whole: what its sizes have to be multiples of; no axis becomes smaller than twice that.
        voxels: the most that a patch may have, if the network allows so few.
    """
    patch_size = list(patch_size)
    while math.prod(patch_size) > voxels:
        longer = [axis for axis, n in enumerate(patch_size) if n - whole[axis] >= 2 * whole[axis]]
        if not longer:
            break
        longest = max(longer, key=lambda axis: patch_size[axis])
        patch_size[longest] -= whole[longest]
    return patch_size
