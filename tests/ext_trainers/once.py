"""One step of training, one of validation: enough to go through every command that a feature needs."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet


class nnUNetTrainerLGMSNet_once(nnUNetTrainerLGMSNet):
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature, to the letter
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1


class nnUNetTrainer_once(nnUNetTrainer):
    """nnU-Net's own U-Net, to ensemble with."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.num_iterations_per_epoch = self.num_val_iterations_per_epoch = 1


class nnUNetTrainerLGMSNet_compiled(nnUNetTrainerLGMSNet_once):
    """Compiles on every device, where nnU-Net would not on the CPU."""

    def _do_i_compile(self):
        return True
