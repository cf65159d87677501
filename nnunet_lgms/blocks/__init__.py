"""The blocks of LGMSNet's figure: LMS, GMS, Fusion, Up, and the pieces that they share."""

from nnunet_lgms.blocks.conv_norm_act import ConvNormAct
from nnunet_lgms.blocks.fusion import FusionBlock
from nnunet_lgms.blocks.gms import GMSBlock
from nnunet_lgms.blocks.lms import LMSBlock
from nnunet_lgms.blocks.plain import PlainConvBlock
from nnunet_lgms.blocks.up import UpBlock

__all__ = ["ConvNormAct", "FusionBlock", "GMSBlock", "LMSBlock", "PlainConvBlock", "UpBlock"]
