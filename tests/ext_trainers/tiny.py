"""A trainer folder as a user would have one: the recipe, cut down to seconds."""

import os
from pathlib import Path

import torch

from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet


class nnUNetTrainerLGMSNet_tiny(nnUNetTrainerLGMSNet):
    """Two epochs of two steps; TINY_TRAINER_STOPS=1 breaks off after the first, as a power cut would."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1

    def on_train_start(self):
        super().on_train_start()
        # the process that draws would cost more than these steps; an exported model takes the picture along
        self.logger.plot_progress_png = lambda folder: Path(folder, "progress.png").touch()

    def on_epoch_end(self):
        super().on_epoch_end()
        if os.environ.get("TINY_TRAINER_STOPS") == "1":
            raise KeyboardInterrupt("stopped by the test")
