"""How much the images of a list give a network to compute, known before the first of them is read."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

#: voxels, of all windows and their mirrored copies, below which it takes longer to compile kernels than they save
LITTLE = 1 << 27

#: voxels and spacing (mm) along each axis of an image, (z, y, x)
Grid = tuple[tuple[int, ...], tuple[float, ...]]


def grid_of(files: list[str], reader: BaseReaderWriter) -> Grid:
    """Of an image, as its reader gives it: from the header alone where that is known to do."""
    if type(reader).__name__ == "SimpleITKIO":
        import SimpleITK

        header = SimpleITK.ImageFileReader()
        header.SetFileName(files[0])
        header.ReadImageInformation()
        size, spacing = header.GetSize(), header.GetSpacing()
    elif type(reader).__name__ == "NibabelIO":
        import nibabel

        image = nibabel.load(files[0])
        size, spacing = image.shape, image.header.get_zooms()
    else:
        samples, properties = reader.read_images(files[:1])
        return samples.shape[1:], tuple(properties["spacing"])
    # Flat images get a first axis; the first of four is that of the channels.
    return (1, *size[::-1])[-3:], (1.0, *map(float, spacing[::-1]))[-3:]


def n_windows(shape: Sequence[int], patch: Sequence[int], step: float) -> int:
    """Of nnU-Net's sliding window over an image (z, y, x) that is filled up to a window where it is smaller.

    Args:
        shape: of the image, on the network's grid.
        patch: of a window, (z, y, x), or (y, x) for each slice.
        step: from a window to the next, in patches, at most.
    """
    flat, deep = shape[: -len(patch)], shape[-len(patch) :]
    along = (math.ceil(max(n - size, 0) / (size * step)) + 1 for n, size in zip(deep, patch, strict=True))
    return math.prod(flat) * math.prod(along)
