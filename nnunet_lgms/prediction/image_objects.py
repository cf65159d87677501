"""Images that SimpleITK or nibabel hold in memory, in and out through files, so that the model's own reader reads them.

Readers differ in where they take an image to lie and which axis is which: only they know what the model was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def is_image_object(image: Any) -> bool:
    """Whether it is an image of SimpleITK's or nibabel's; neither library is imported to find out."""
    return _library(image) is not None


def write_channels(images: Sequence[Any], folder: Path, ending: str) -> list[str]:
    """Writes images, one a channel, and returns their files.

    Args:
        images: of one library.
        folder: an empty one.
        ending: of the files that the model was trained on.

    Raises:
        ValueError: the library cannot write such files.
    """
    ending = ".nii" if ending == ".nii.gz" else ending  # compressing what is read at once takes its time
    files = [str(folder / f"image_{channel:04d}{ending}") for channel in range(len(images))]
    for image, file in zip(images, files):
        try:
            if _library(image) == "SimpleITK":
                import SimpleITK as sitk

                sitk.WriteImage(image, file)
            else:
                import nibabel as nib

                nib.save(image, file)
        except Exception as error:  # libraries raise whatever they like
            raise ValueError(
                f"The {_library(image)} image cannot become a {ending} file, which is what the model was trained on "
                f"({' '.join(str(error).split())[:120]})."
            ) from error
    return files


def labels_like(image: Any, labels: np.ndarray, properties: dict, writer: Any, folder: Path) -> Any:
    """Labels (Z, Y, X) as an image of the same library, in the same place.

    Args:
        image: that was predicted.
        labels: of it.
        properties: of nnU-Net's reader.
        writer: nnU-Net's reader and writer.
        folder: for a file.
    """
    file = str(folder / "labels.nii")
    writer.write_seg(labels, file, properties)
    if _library(image) == "SimpleITK":
        import SimpleITK as sitk

        return sitk.ReadImage(file)
    import nibabel as nib

    written = nib.load(file)
    return type(written)(np.asarray(written.dataobj).copy(), written.affine, written.header)


def _library(image: Any) -> str | None:
    for kind in type(image).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in ("SimpleITK", "nibabel"):
            return library
    return None
