"""Between nnU-Net and the network: plan to network, trainers, losses, augmentation."""
