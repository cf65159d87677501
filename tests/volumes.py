"""Images in three dimensions as files."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk


def write_volume(path: Path | str, samples: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
    """Samples (Z, Y, X) with the spacing of the same axes, in mm."""
    image = sitk.GetImageFromArray(samples)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(image, str(path))
