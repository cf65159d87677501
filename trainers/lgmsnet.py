"""LGMSNet's trainers, for nnU-Net's finder (``nnUNet_extTrainer``). Imports only: see nnunet_lgms.nnunet.trainer."""

from nnunet_lgms.nnunet.trainer import (
    nnUNetTrainerLGMSNet,
    nnUNetTrainerLGMSNet_5epochs,
    nnUNetTrainerLGMSNet_demo,
    nnUNetTrainerLGMSNet_nnUNetDA,
)

__all__ = [
    "nnUNetTrainerLGMSNet",
    "nnUNetTrainerLGMSNet_5epochs",
    "nnUNetTrainerLGMSNet_demo",
    "nnUNetTrainerLGMSNet_nnUNetDA",
]
