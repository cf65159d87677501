"""LGMSNet: encoder, decoder, network, and the reader of the authors' checkpoints."""

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.architecture.official import load_official

__all__ = ["LGMSNet", "load_official"]
