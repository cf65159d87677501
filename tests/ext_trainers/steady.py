"""The recipe in few steps, the same in every run: what comes out does not depend on where a run was interrupted."""

import random

import numpy as np
import torch

from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class nnUNetTrainerLGMSNet_steady(nnUNetTrainerLGMSNet):
    """Three epochs of two steps; every epoch draws its batches from its own number."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 3
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1

    def initialize(self):
        seed(0)
        super().initialize()

    def on_train_epoch_start(self):
        seed(1 + self.current_epoch)
        super().on_train_epoch_start()
