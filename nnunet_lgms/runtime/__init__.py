"""Prediction of whole cases from an exported model with ONNX Runtime, without PyTorch and nnU-Net.

What nnU-Net's predictor does, in the same order: read, crop, normalise, resample, slide a window with Gaussian weights
and mirrored copies over the image, resample back, take the largest label.

Example::

    from nnunet_lgms.runtime import Predictor

    predictor = Predictor("model.onnx")
    labels = predictor.predict("case_0000.nii.gz")  # (Z, Y, X), or (Y, X) for a flat image
"""

from nnunet_lgms.runtime.predictor import Predictor

__all__ = ["Predictor"]
