"""Trainers with the epochs of the paper, and for volumes with the recipe of its released 3D script.

nnU-Net's epoch is 250 steps whatever the data; the paper's is one pass over the training cases.
"""

from __future__ import annotations

import math

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_lgms.nnunet.augmentation import training_transforms
from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

#: share of a training that warms up; the paper does not say how long its own does
WARM_UP = 0.02
#: of the learning rate, in the first step
BEGINNING = 0.01


class nnUNetTrainerLGMSNet_paper2D(nnUNetTrainerLGMSNet):
    """The paper's recipe with the paper's epochs: one pass over the training cases each, 500 of them.

    An epoch has as many steps as there are batches in the training cases, the last one filled up, and its validation as
    many as in the validation's. As in all of nnU-Net's trainings the cases of a batch are drawn at random, so a pass
    draws as many cases as there are, not each of them once. On BUSI's released splits, with 452 images in
    batches of 16, that is 14,500 steps, where ``nnUNetTrainerLGMSNet`` takes 125,000.
    """

    def get_tr_and_val_datasets(self):
        """As nnU-Net's, which asks for them before the first epoch."""
        datasets = super().get_tr_and_val_datasets()
        batch = self.configuration_manager.batch_size  # of all processes together
        cases = [len(dataset.identifiers) for dataset in datasets]
        steps = [math.ceil(n / batch) for n in cases]
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = steps
        self.print_to_log_file(
            f"An epoch is one pass: {steps[0]} steps on {cases[0]} training cases and {steps[1]} on {cases[1]} of the "
            f"validation, {self.num_epochs} epochs in all."
        )
        return datasets


class nnUNetTrainerLGMSNet_paper3D(nnUNetTrainerLGMSNet_paper2D):
    """The recipe of the paper's released 3D script, with the paper's epochs.

    - AdamW with learning rate 1e-3 and weight decay 1e-5.
    - The rate rises linearly during the first 2 % of the steps and falls as a cosine to 0. How long the script's own
      warm-up is, is not known.
    - Rotations by 90 degrees, and flips of each axis, with probability 0.2.

    The loss is that of ``nnUNetTrainerLGMSNet``. Patches of 96x96x96 and Dice per sample are the override
    ``published``; voxels of 1.5x1.5x2 mm are for nnU-Net's planning, ``-overwrite_target_spacing 2 1.5 1.5``.
    """

    initial_lr = 1e-3
    weight_decay = 1e-5

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay, fused=True
        )
        return optimizer, WarmUpAndCosine(optimizer, self.initial_lr, self.num_epochs)

    get_training_transforms = staticmethod(training_transforms(rotation_probability=0.2, flip_probability=0.2))


class WarmUpAndCosine(PolyLRScheduler):
    """A learning rate that rises linearly and falls as a cosine, as nnU-Net steps its own.

    Args:
        optimizer: whose rates it sets.
        initial_lr: the highest rate.
        max_steps: when the rate is 0; steps may be fractions.
    """

    def step(self, current_step: float | None = None):
        """Sets the rate of ``current_step``, or of the next whole step."""
        if current_step is None or current_step == -1:
            current_step = self.ctr
            self.ctr += 1
        warm_up = WARM_UP * self.max_steps
        if current_step < warm_up:
            part = BEGINNING + (1 - BEGINNING) * current_step / warm_up
        else:
            part = (1 + math.cos(math.pi * (current_step - warm_up) / (self.max_steps - warm_up))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * part
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
