"""Label files, read by nnU-Net's own readers, and the geometry that they claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_lgms.files import check_gzip, one_line

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Segmentation:
    """One label file.

    Args:
        labels: int16, (Y, X) for flat images, (Z, Y, X) for volumes.
        spacing: of each axis in mm; 1 for formats without.
        placement: where the samples lie in space: origin and direction, or affine; empty for formats without.
    """

    labels: np.ndarray
    spacing: tuple[float, ...]
    placement: tuple[float, ...]


class Reader:
    """nnU-Net's reader of a dataset, by name, so that it can be sent to other processes.

    Args:
        file_ending: `.nii.gz`, `.png`, ….
        name: name of a class in `nnunetv2.imageio`; None chooses by file ending, as nnU-Net does.

    Raises:
        ValueError: nnU-Net has no such reader.
    """

    def __init__(self, file_ending: str, name: str | None = None):
        self.file_ending, self.name = file_ending, name
        self._make()

    @classmethod
    def of_dataset(cls, dataset_json: Mapping) -> Reader:
        return cls(dataset_json["file_ending"], dataset_json.get("overwrite_image_reader_writer"))

    @property
    def unit(self) -> str:
        """Unit of distances: flat image formats know no spacing."""
        return "pixels" if type(self._make()).__name__ == "NaturalImage2DIO" else "mm"

    def read_labels(self, path: Path) -> Segmentation:
        """Read a label file.

        Raises:
            ValueError: the file cannot be read, or holds something else than whole numbers.
        """
        try:
            check_gzip(path)
            samples, properties = self._make().read_seg(str(path))
        except Exception as error:  # readers raise whatever their libraries raise
            raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
        labels = np.rint(samples[0]).astype(np.int16)
        if len(samples) != 1 or not np.array_equal(labels, samples[0]):
            raise ValueError(f"{path} is not a label map: expected one channel of whole numbers")
        spacing = tuple(float(s) for s in properties["spacing"])
        if labels.shape[0] == 1:  # nnU-Net gives flat images a first axis with a spacing of no meaning
            labels, spacing = labels[0], spacing[1:]
        return Segmentation(labels, spacing, _placement(properties))

    def read_image(self, path: Path) -> np.ndarray:
        """The samples of an image file, (C, Z, Y, X)."""
        return self._make().read_images([str(path)])[0]

    def _make(self):
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        content = {"file_ending": self.file_ending, "overwrite_image_reader_writer": self.name or "None"}
        try:
            return determine_reader_writer_from_dataset_json(content, verbose=False)()
        except RuntimeError as error:
            raise ValueError(f"nnU-Net has no reader for {self.file_ending} files ({self.name}).") from error


def find_file_ending(folder: Path) -> str:
    """The ending that most label files in a folder have.

    Raises:
        ValueError: there is no file of a known ending.
    """
    names = [path.name.lower() for path in folder.iterdir()]
    counts = {ending: sum(name.endswith(ending) for name in names) for ending in FILE_ENDINGS}
    ending = max(counts, key=counts.get)
    if not counts[ending]:
        raise ValueError(f"{folder} has no label files: expected files ending in {', '.join(FILE_ENDINGS)}.")
    return ending


def differences(one: Segmentation, other: Segmentation) -> str:
    """In which way two label files do not describe the same grid; empty if they do."""
    if one.labels.shape != other.labels.shape:
        return f"sizes {one.labels.shape} and {other.labels.shape}"
    if not np.allclose(one.spacing, other.spacing, rtol=1e-3):
        return f"spacings {_rounded(one.spacing)} and {_rounded(other.spacing)} mm"
    if len(one.placement) == len(other.placement) and not np.allclose(one.placement, other.placement, atol=1e-2):
        return f"places in space (origin, direction) {_rounded(one.placement)} and {_rounded(other.placement)}"
    return ""


def _placement(properties: Mapping) -> tuple[float, ...]:
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        return (*map(float, stuff["origin"]), *map(float, stuff["direction"]))
    if "nibabel_stuff" in properties:
        return tuple(float(a) for a in np.ravel(properties["nibabel_stuff"]["original_affine"]))
    return ()


def _rounded(numbers: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{number:.4g}" for number in numbers) + ")"
