"""The trainer of ``make demo``, for nnU-Net's finder (``nnUNet_extTrainer``)."""

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet


class nnUNetTrainerLGMSNet_demo(nnUNetTrainerLGMSNet):
    """A few minutes on two CPU cores, for ``make demo``: own optimiser, schedule and augmentation, not the paper's.

    400 steps of AdamW at 2e-3, polynomial decay, one planned patch a step (the planned batch is made for a GPU), no
    augmentation. Measured on the demo's data (24 training and 6 test cases of the hippocampus set, mean Dice of
    anterior and posterior, bfloat16): 0.83 after 200 and 0.87 after 400 steps; with the paper's rotations and flips
    0.74 and 0.80, because flips hide which end is anterior. Without flips in training there are none at prediction,
    which makes it eight times faster.

    A checkpoint is written every epoch, so that an interrupted demo goes on where it stopped.
    """

    num_epochs = 20
    num_iterations_per_epoch = 20
    num_val_iterations_per_epoch = 2
    initial_lr = 2e-3
    weight_decay = 1e-2
    save_every = 1

    def _set_batch_size_and_oversample(self):
        super()._set_batch_size_and_oversample()
        self.batch_size = 1

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=0.9)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """No axis rotates and none flips, neither in training nor at prediction."""
        self.inference_allowed_mirroring_axes = None
        return (), False, self.configuration_manager.patch_size, None
