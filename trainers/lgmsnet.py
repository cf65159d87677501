"""LGMSNet's trainers, for nnU-Net's finder (``nnUNet_extTrainer``). Imports only: see nnunet_lgms.nnunet.trainer."""

from nnunet_lgms.nnunet.paper import nnUNetTrainerLGMSNet_paper2D, nnUNetTrainerLGMSNet_paper3D
from nnunet_lgms.nnunet.smoke import nnUNetTrainerLGMSNet_smoke
from nnunet_lgms.nnunet.trainer import (
    nnUNetTrainerLGMSNet,
    nnUNetTrainerLGMSNet_5epochs,
    nnUNetTrainerLGMSNet_50epochs,
    nnUNetTrainerLGMSNet_100epochs,
    nnUNetTrainerLGMSNet_250epochs,
    nnUNetTrainerLGMSNet_1000epochs,
    nnUNetTrainerLGMSNet_nnUNetDA,
)

__all__ = [
    "nnUNetTrainerLGMSNet",
    "nnUNetTrainerLGMSNet_nnUNetDA",
    "nnUNetTrainerLGMSNet_5epochs",
    "nnUNetTrainerLGMSNet_50epochs",
    "nnUNetTrainerLGMSNet_100epochs",
    "nnUNetTrainerLGMSNet_250epochs",
    "nnUNetTrainerLGMSNet_1000epochs",
    "nnUNetTrainerLGMSNet_paper2D",
    "nnUNetTrainerLGMSNet_paper3D",
    "nnUNetTrainerLGMSNet_smoke",
]
