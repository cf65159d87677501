"""Between nnU-Net and the network: plan to network, trainers, losses, augmentation."""

from nnunet_lgms.requirements import require_nnunetv2

require_nnunetv2()
