"""Image and label files as nnU-Net's own readers read them, and the grid in space that they claim to lie on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from nnunet_lgms.files import check_utf8, files_in, one_line
from nnunet_lgms.image_files import check_image_file

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".tif", ".tiff", ".bmp")

WITHOUT_SPACING = ("NaturalImage2DIO",)
"""Readers of formats that know no mm: nnU-Net plans with a spacing of 1, which is a pixel."""

SAME_PLACE = 0.05
"""Of a voxel's shortest edge: nearer than this is where headers were rounded."""


@dataclass(frozen=True)
class Grid:
    """Where the samples of a file lie.

    Args:
        size: (Z, Y, X) in voxels; Z is 1 for flat images.
        spacing: of these axes, as the reader gives it to nnU-Net; for flat images the first has no meaning.
        affine: (x, y, z, 1) → place in space, (x, y, 1) of flat images; None for formats that know none.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray | None = None

    def differences(self, other: Grid, rtol: float = 1e-5) -> str:
        """In which way the grids of two files differ, such as "sizes (9, 18, 16) and (10, 18, 16)", or "".

        Args:
            other: the other file's grid.
            rtol: what spacings may differ; the default is what nnU-Net's own check lets pass.
        """
        if self.size != other.size:
            return f"sizes {self.size} and {other.size}"
        if not np.allclose(self.spacing, other.spacing, rtol=rtol):
            return f"spacings {_rounded(self.spacing)} and {_rounded(other.spacing)}"
        if self.affine is None or other.affine is None:
            return ""
        if self.affine.shape != other.affine.shape:
            return "dimensions: one is flat, the other is a volume of one slice"
        dim = len(self.affine) - 1
        corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in self.size[::-1][:dim]))])
        apart = np.linalg.norm(corners @ (self.affine - other.affine).T, axis=1).max()
        if not apart <= SAME_PLACE * min(self.spacing[-dim:]):
            return f"places in space (origin and direction): the same voxels lie up to {apart:.3g} mm apart"
        return ""


@dataclass(frozen=True)
class Segmentation:
    """One label file.

    Args:
        labels: int16, (Y, X) for flat images, (Z, Y, X) for volumes; of a volume of one slice its other two axes.
        spacing: of each of these axes, in the unit of `Reader.unit`.
        grid: where the samples lie.
    """

    labels: np.ndarray
    spacing: tuple[float, ...]
    grid: Grid


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
        self.class_name = type(self._make()).__name__

    @classmethod
    def of_dataset(cls, dataset_json: Mapping) -> Reader:
        """The reader that a `dataset.json` names or implies."""
        return cls(dataset_json["file_ending"], dataset_json.get("overwrite_image_reader_writer"))

    def unit(self, example: Path) -> str:
        """Unit of distances in files such as `example`: pixels or voxels where the format or the file knows no mm."""
        if self.class_name in WITHOUT_SPACING:
            return "pixels"
        if self.class_name == "Tiff3DIO":
            return "mm" if example.with_suffix(".json").is_file() else "voxels"
        if self.class_name.startswith("Nibabel"):  # SimpleITK turns other units into mm, nibabel does not
            import nibabel

            return {"micron": "µm", "meter": "m"}.get(nibabel.load(example).header.get_xyzt_units()[0], "mm")
        return "mm"

    def read_labels(self, path: Path) -> Segmentation:
        """Read a label file.

        Raises:
            ValueError: the file cannot be read, or holds something else than whole numbers.
        """
        samples, grid = self._read(path, is_seg=True)
        labels = np.rint(samples[0]).astype(np.int16)
        if len(samples) != 1 or not np.array_equal(labels, samples[0]):
            raise ValueError(f"{path} is not a label map: expected one channel of whole numbers")
        # One slice is flat, along whichever axis: across it everything would be surface. (To flat images nnU-Net gives
        # a first axis with a spacing of no meaning.)
        axes = [axis for axis, n in enumerate(labels.shape) if n > 1]
        if len(axes) == 2 or labels.shape[0] == 1:
            axes = axes if len(axes) == 2 else [1, 2]
            labels = labels.reshape([labels.shape[axis] for axis in axes])
            return Segmentation(labels, tuple(grid.spacing[axis] for axis in axes), grid)
        return Segmentation(labels, grid.spacing, grid)

    def read_image(self, path: Path) -> tuple[np.ndarray, Grid]:
        """The samples of an image file, (C, Z, Y, X) of float32, and where they lie.

        Raises:
            ValueError: the file cannot be read, or is damaged.
        """
        return self._read(path, is_seg=False)

    def rewrite_labels(self, source: Path, target: Path, label_of: Mapping[int, int]) -> None:
        """Write a label file again on its own grid, with other values."""
        reader = self._make()
        samples, properties = reader.read_seg(str(source))
        labels = np.zeros(samples[0].shape, np.uint8)
        for value, label in label_of.items():
            labels[samples[0] == value] = label
        reader.write_seg(labels, str(target), properties)

    def _read(self, path: Path, is_seg: bool) -> tuple[np.ndarray, Grid]:
        reader = self._make()
        check_image_file(path)
        try:
            samples, properties = reader.read_seg(str(path)) if is_seg else reader.read_images([str(path)])
        except Exception as error:  # readers raise whatever their libraries raise
            raise ValueError(f"{path} cannot be read ({one_line(error)})") from error
        spacing = tuple(float(s) for s in properties["spacing"])
        return samples, Grid(tuple(samples.shape[1:]), spacing, _affine(properties))

    def _make(self):
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        content = {"file_ending": self.file_ending, "overwrite_image_reader_writer": self.name or "None"}
        try:
            return determine_reader_writer_from_dataset_json(content, verbose=False)()
        except RuntimeError as error:
            raise ValueError(f"nnU-Net has no reader for {self.file_ending} files ({self.name}).") from error


def file_ending_of(folder: Path) -> str:
    """The ending that most image or label files in a folder have.

    Raises:
        ValueError: there is no file of a known ending.
    """
    names = [path.name.lower() for path in folder.iterdir() if not path.name.startswith(".")]
    counts = {ending: sum(name.endswith(ending) for name in names) for ending in FILE_ENDINGS}
    ending = max(counts, key=counts.get)
    if not counts[ending]:
        raise ValueError(f"{folder} has no image or label files: expected files ending in {', '.join(FILE_ENDINGS)}.")
    return ending


def cases_in(folder: Path, ending: str) -> dict[str, Path]:
    """Case → file of every file with an ending, in small letters or capitals, but for hidden ones such as `._case.png`.

    Raises:
        ValueError: there is no such folder or file, or two files would be the same case.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist.")
    cases: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.lower().endswith(ending.lower()):
            continue
        check_utf8(path)
        case = path.name[: -len(ending)]
        if case in cases:
            raise ValueError(f"{folder} has {cases[case].name} and {path.name}, which are one case: remove one.")
        cases[case] = path
    if not cases:
        raise ValueError(f"{folder} has no {ending} files.")
    return cases


def image_files(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Case → one file a channel, in nnU-Net's names `CASE_0000.nii.gz`; hidden files are left out."""
    cases = defaultdict(list)
    for path in files_in(folder, ending):
        if match := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", path.name):
            cases[match[1]].append(path)
    return dict(cases)


def _affine(properties: Mapping) -> np.ndarray | None:
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        n_axes = len(stuff["origin"])
        dim = min(n_axes, 3)  # the fourth axis is that of the channels
        affine = np.eye(dim + 1)
        direction = np.reshape(stuff["direction"], (n_axes, n_axes))[:dim, :dim]
        affine[:dim, :dim], affine[:dim, dim] = direction * stuff["spacing"][:dim], stuff["origin"][:dim]
        return affine
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]  # a reader that reorients gives the samples in the place of the second
        return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float)
    return None


def _rounded(numbers: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{number:.7g}" for number in numbers) + ")"
