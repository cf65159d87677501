"""nnU-Net's readers and writers of images, each on the library that nnU-Net's own stands on.

What two libraries make of one file differs: the affine of a NIfTI file with two of them, its units, a picture of 1 bit.
A network saw its training images through one of them, so its images are read by the same. Written after
`nnunetv2/imageio`, whose names they bear.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from nnunet_lgms.arrays import FLAT_SPACING
from nnunet_lgms.files import read_json

TIFF_ENDINGS = (".tif", ".tiff")

#: samples (C, Z, Y, X) in float32, spacing (z, y, x), and what the writer needs to put labels on the same grid
Image = tuple[np.ndarray, tuple[float, ...], Any]


class Reader(ABC):
    """One of nnU-Net's readers."""

    @abstractmethod
    def read(self, file: Path) -> Image:
        """One file.

        Raises:
            ValueError: it is no image that this reader takes.
            Exception: whatever the library raises.
        """

    @abstractmethod
    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        """Labels (Z, Y, X), or (Y, X) for a flat image, on the grid that :meth:`read` found."""

    def is_flat(self, geometry: Any) -> bool:
        """Whether it was one flat image, and not a volume that may have one slice."""
        return False

    def affine(self, geometry: Any) -> np.ndarray | None:
        """From a voxel of the samples, (x, y, z, 1), to mm, (4, 4); None where the format has no such thing."""
        return None


class SimpleITKReader(Reader):
    """`SimpleITKIO`, nnU-Net's reader of `.nii.gz`, `.nrrd`, `.mha` and `.gipl`."""

    def read(self, file: Path) -> Image:
        return self._samples(sitk.ReadImage(str(file)))

    def _samples(self, image: sitk.Image) -> Image:
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise ValueError("it has several values a voxel: give one file for each channel")
        samples = sitk.GetArrayFromImage(image)
        geometry = image.GetSpacing(), image.GetOrigin(), image.GetDirection()
        del image  # two copies of a large volume are enough
        samples = _real(samples)
        spacing = tuple(abs(mm) for mm in geometry[0][::-1])
        if samples.ndim == 2:
            return samples[None, None], (max(spacing) * FLAT_SPACING, *spacing), geometry
        if samples.ndim == 4:  # several channels in one file
            return samples, spacing[1:], geometry
        if samples.ndim != 3:
            raise ValueError(f"it has {samples.ndim} axes, expected are 2 to 4")
        return samples[None], spacing, geometry

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        sitk.WriteImage(self._image(labels, geometry), str(file), True)

    def _image(self, labels: np.ndarray, geometry: Any) -> sitk.Image:
        image = sitk.GetImageFromArray(labels)
        spacing, origin, direction = self._in_space(geometry)
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection(direction)
        return image

    @staticmethod
    def _in_space(geometry: Any) -> tuple[tuple[float, ...], ...]:
        spacing, origin, direction = geometry
        if len(spacing) < 4:
            return spacing, origin, direction
        # channels in one file: the first three axes are space
        return spacing[:3], origin[:3], tuple(np.reshape(direction, (4, 4))[:3, :3].ravel())

    def is_flat(self, geometry: Any) -> bool:
        return len(geometry[0]) == 2

    def affine(self, geometry: Any) -> np.ndarray | None:
        spacing, origin, direction = self._in_space(geometry)
        affine = np.eye(4)
        n = len(spacing)
        affine[:n, :n] = np.reshape(direction, (n, n)) * spacing
        affine[:n, 3] = origin
        return affine


class SimpleITKReaderWithReorient(SimpleITKReader):
    """`SimpleITKIOWithReorient`: axes are turned to RAS, as SimpleITK understands it, and back for writing."""

    def read(self, file: Path) -> Image:
        image = sitk.ReadImage(str(file))
        if image.GetDimension() != 3:
            raise ValueError(f"it has {image.GetDimension()} axes, this model's reader takes volumes")
        orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
        samples, spacing, geometry = self._samples(sitk.DICOMOrient(image, "RAS"))
        return samples, spacing, (*geometry, orientation)

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        *geometry, orientation = geometry
        sitk.WriteImage(sitk.DICOMOrient(self._image(labels, geometry), orientation), str(file), True)

    def affine(self, geometry: Any) -> np.ndarray | None:
        return super().affine(geometry[:3])


class NibabelReader(Reader):
    """`NibabelIO`, nnU-Net's reader of `.nii`: spacing from the header, affine as nibabel chooses it."""

    def read(self, file: Path) -> Image:
        image = self._load(file)
        return self._samples(image), self._spacing(image), image.affine

    def _load(self, file: Path) -> nibabel.spatialimages.SpatialImage:
        image: Any = nibabel.load(str(file))
        if image.ndim != 3:
            raise ValueError(f"it has {image.ndim} axes, this model's reader takes volumes of 3")
        if not np.isfinite(image.affine).all() or np.linalg.det(image.affine) == 0:
            raise ValueError(f"its affine {image.affine[:3].tolist()} is no place in space")
        return image

    @staticmethod
    def _spacing(image: nibabel.spatialimages.SpatialImage) -> tuple[float, ...]:
        return tuple(float(mm) for mm in image.header.get_zooms()[::-1])

    @staticmethod
    def _samples(image: nibabel.spatialimages.SpatialImage) -> np.ndarray:
        """(1, Z, Y, X) of what `get_fdata` gives, scaled slice by slice in float64: a volume is not held in it."""
        stored: Any = image.dataobj
        slope, inter = 1.0, 0.0
        if nibabel.is_proxy(stored):
            stored, slope, inter = stored.get_unscaled(), stored.slope, stored.inter
        if stored.dtype.kind == "c":
            raise ValueError("its voxels are complex numbers")
        slope, inter = np.float64(slope), np.float64(inter)
        samples = np.empty((1, *stored.shape[::-1]), np.float32)
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
            for z in range(stored.shape[2]):
                samples[0, z] = apply_read_scaling(np.asarray(stored[..., z]), slope, inter).astype(np.float64).T
        return samples

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), geometry), str(file))

    def affine(self, geometry: Any) -> np.ndarray | None:
        return geometry


class NibabelReaderWithReorient(NibabelReader):
    """`NibabelIOWithReorient`: axes are turned to RAS, and back for writing."""

    def read(self, file: Path) -> Image:
        image = self._load(file)
        turned = image.as_reoriented(io_orientation(image.affine))
        return self._samples(turned), self._spacing(turned), (image.affine, turned.affine)

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        original, turned = geometry
        image = nibabel.Nifti1Image(labels.transpose(2, 1, 0), turned)
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(original))
        nibabel.save(image.as_reoriented(back), str(file))

    def affine(self, geometry: Any) -> np.ndarray | None:
        return geometry[1]


class NaturalImageReader(Reader):
    """`NaturalImage2DIO`, nnU-Net's reader of `.png`, `.bmp` and flat `.tif`: what scikit-image does with them."""

    def read(self, file: Path) -> Image:
        image = _tiff(file) if _is_tiff(file) else np.asarray(imageio.imread(str(file)))
        if image.ndim > 2 and image.shape[-1] not in (3, 4) and image.shape[-3] in (3, 4):
            image = np.moveaxis(image, -3, -1)  # planes of one colour each
        if image.ndim == 3 and image.shape[-1] in (3, 4):
            image = np.moveaxis(image, -1, 0)
        elif image.ndim == 2:
            image = image[None]
        else:
            raise ValueError(f"it has the shape {image.shape}, expected is a flat image in grey, RGB or RGBA")
        return _real(np.ascontiguousarray(image))[:, None], (FLAT_SPACING, 1.0, 1.0), None

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        if _is_tiff(file):
            tifffile.imwrite(file, labels, photometric="minisblack")
        else:
            imageio.imwrite(str(file), labels)

    def is_flat(self, geometry: Any) -> bool:
        return True


class TiffReader(Reader):
    """`Tiff3DIO`, nnU-Net's reader of volumes in `.tif` and `.tiff`; the spacing is in a JSON file, or 1."""

    def read(self, file: Path) -> Image:
        if not _is_tiff(file):
            raise ValueError(f"this model's reader takes {' and '.join(TIFF_ENDINGS)}")
        image = _tiff(file)
        if image.ndim != 3:
            raise ValueError(f"it has {image.ndim} axes, this model's reader takes volumes of 3")
        spacing = self._spacing(file)
        return _real(image)[None], spacing, spacing

    @staticmethod
    def _spacing(file: Path) -> tuple[float, ...]:
        # CASE.json beside CASE_0000.tif
        beside = Path(str(file)[: -len(file.suffix) - len("_0000")] + ".json")
        if not beside.is_file():
            return 1.0, 1.0, 1.0
        content = read_json(beside)
        spacing = content.get("spacing") if isinstance(content, dict) else None
        try:
            numbers = tuple(float(mm) for mm in spacing or ())
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != 3 or not all(0 < mm < np.inf for mm in numbers):
            raise ValueError(f"{beside} has the spacing {spacing!r}, expected are three numbers above 0 for z, y, x")
        return numbers

    def write(self, labels: np.ndarray, geometry: Any, file: Path) -> None:
        tifffile.imwrite(file, labels, compression="zlib", photometric="minisblack")
        file.with_suffix(".json").write_text(json.dumps({"spacing": geometry}), "utf-8")


#: by nnU-Net's names, which plans and descriptions hold
READERS: dict[str, Reader] = {
    "SimpleITKIO": SimpleITKReader(),
    "SimpleITKIOWithReorient": SimpleITKReaderWithReorient(),
    "NibabelIO": NibabelReader(),
    "NibabelIOWithReorient": NibabelReaderWithReorient(),
    "NaturalImage2DIO": NaturalImageReader(),
    "Tiff3DIO": TiffReader(),
}


def _is_tiff(file: Path) -> bool:
    return file.name.lower().endswith(TIFF_ENDINGS)


def _tiff(file: Path) -> np.ndarray:
    return tifffile.imread(Path(file))  # a name as text would be a pattern


def _real(samples: np.ndarray) -> np.ndarray:
    if samples.dtype.kind == "c":
        raise ValueError("its voxels are complex numbers")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
        return samples.astype(np.float32)
