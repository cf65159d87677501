"""Small images of one made-up picture in all formats, bit depths, orientations and headers, whole and cut short.

What is damaged, cut short or holds NaN must not be read as if nothing were wrong.
"""

from __future__ import annotations

import gzip
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

NIFTI = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
ITK, FLAT, TIFF = NIFTI[:2], ("NaturalImage2DIO",), ("Tiff3DIO",)
SHARES = (0.02, 0.3, 0.6, 0.9, 0.99)  # of a file that are left
Write = Callable[[Path], None]

X, Y, Z = np.mgrid[:7, :8, :6]
VOLUME = (20 + 90 * np.exp(-((X - 3) ** 2 + (Y - 4) ** 2 + (Z - 2) ** 2) / 6) + X + 2 * Y + 3 * Z).astype(np.float32)
GREY = (10 + np.add.outer(5 * np.arange(18), 4 * np.arange(22))).astype(np.uint8)
RGB = np.stack([GREY, GREY // 2, 255 - GREY], -1)
MASK = GREY > 90
AFFINE = np.diag([1.0, 1.1, 1.5, 1.0])
AFFINE[:3, 3] = 3, -4, 5


@dataclass(frozen=True)
class Entry:
    """One file.

    Attributes:
        name: of the file.
        readers: nnU-Net's names of those to try it with.
        write: writes it.
        whole: of a file that was cut short, writes what it was before.
    """

    name: str
    readers: tuple[str, ...]
    write: Write
    whole: Write | None = None

    @property
    def damaged(self) -> bool:
        return self.whole is not None or self.name.lower().startswith("nan")


def family() -> Iterator[Entry]:
    """All files, some three hundred."""
    yield from _nifti_types()
    yield from _nifti_orientations()
    yield from _nifti_headers()
    yield from _nifti_damage()
    yield from _itk()
    yield from _png()
    yield from _bmp_and_jpeg()
    yield from _flat_tiff()
    yield from _tiff_volumes()


def _cut(name: str, readers: tuple[str, ...], write: Write, part: str = "") -> Iterator[Entry]:
    """The same file cut at several lengths; of a pair, the file with the ending `part`."""

    def shorter(share: float) -> Write:
        def do(path: Path) -> None:
            write(path)
            file = path.with_suffix(part) if part else path
            content = file.read_bytes()
            file.write_bytes(content[: int(len(content) * share)])

        return do

    stem, dot, ending = name.partition(".")
    for share in SHARES:
        yield Entry(f"{stem}_cut{share * 100:g}{dot}{ending}", readers, shorter(share), write)


def _nifti(array=VOLUME, affine=AFFINE, kind=nib.Nifti1Image, header=None, **fields) -> Write:
    """Fields of the header are written into the file, so that nibabel does not correct them."""

    def write(path: Path) -> None:
        image = kind(array, affine, header, dtype=None if array.dtype.names else array.dtype)
        nib.save(image, path.with_name(path.name.lower()) if path.name.isupper() else path)
        if path.name.isupper():
            path.with_name(path.name.lower()).rename(path)
        if fields:
            content = bytearray(path.read_bytes())
            read = nib.Nifti1Header(bytes(content[:348]), check=False)
            for name, value in fields.items():
                read[name] = value
            path.write_bytes(read.binaryblock + bytes(content[348:]))

    return write


def _nifti_types() -> Iterator[Entry]:
    for kind in ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">i2", ">f4", "c8"):
        array = VOLUME.astype(kind) if kind != "i1" else (VOLUME / 2).astype(kind)
        header = nib.Nifti1Header(endianness=">") if kind[0] == ">" else None
        for ending in (".nii", ".nii.gz"):
            yield Entry(
                f"type_{kind.strip('>')}{'be' * (header is not None)}{ending}", NIFTI, _nifti(array, header=header)
            )


def _nifti_orientations() -> Iterator[Entry]:
    for order in itertools.permutations(range(3)):
        for signs in ((1, 1, 1), (-1, -1, 1), (1, -1, -1)):
            affine = AFFINE.copy()
            affine[:3, :3] = affine[:3, :3][:, order] * signs
            yield Entry(
                f"axes_{''.join(map(str, order))}{''.join('pm'[s < 0] for s in signs)}.nii",
                NIFTI,
                _nifti(affine=affine),
            )
    for degrees in (10, 44, 46, 100, 181):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        affine = AFFINE.copy()
        affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3, :3]
        yield Entry(f"oblique_{degrees}.nii.gz", NIFTI, _nifti(affine=affine))


def _nifti_headers() -> Iterator[Entry]:
    shifted, flipped = AFFINE.copy(), np.diag([-1, -1, 1.5, 1.0])
    shifted[:3, 3] = 10, -5, 3

    def rows(affine) -> dict:
        return {f"srow_{axis}": affine[i] for i, axis in enumerate("xyz")}

    sheared = AFFINE.copy()
    sheared[0, 1] = 0.3
    headers = {
        "sform_shifted": rows(shifted) | {"sform_code": 2, "qform_code": 1},
        "sform_flipped": rows(flipped) | {"sform_code": 1, "qform_code": 1},
        "sform_doubled": rows(np.diag([2, 2, 3, 1.0])) | {"sform_code": 2, "qform_code": 1},
        "sform_only": {"sform_code": 1, "qform_code": 0},
        "qform_only": {"sform_code": 0, "qform_code": 1},
        "sheared_by_hand": rows(sheared) | {"sform_code": 2, "qform_code": 0},
        "no_forms": {"sform_code": 0, "qform_code": 0},
        "sform_of_zeros": rows(np.zeros((4, 4))) | {"sform_code": 1, "qform_code": 1},
        "sform_nan": rows(np.full((4, 4), np.nan)) | {"sform_code": 1, "qform_code": 0},
        "units_micron": {"xyzt_units": 3},
        "units_meter": {"xyzt_units": 1},
        "units_none": {"xyzt_units": 0},
        "units_unknown": {"xyzt_units": 7},
        "pixdim_negative": {"pixdim": [1, -1, 1.1, -1.5, 1, 1, 1, 1]},
        "pixdim_zero": {"pixdim": [1, 0, 1.1, 1.5, 1, 1, 1, 1]},
        "pixdim_nan": {"pixdim": [1, np.nan, 1.1, 1.5, 1, 1, 1, 1]},
        "qfac_minus": {"pixdim": [-1, 1, 1.1, 1.5, 1, 1, 1, 1], "qform_code": 1, "sform_code": 0},
        "qfac_zero": {"pixdim": [0, 1, 1.1, 1.5, 1, 1, 1, 1], "qform_code": 1, "sform_code": 0},
        "intent_label": {"intent_code": 1002},
        "intent_vector": {"intent_code": 1007},
        "cal_range": {"cal_min": 30, "cal_max": 60},
        "wrong_bitpix": {"bitpix": 8},
        "offset_zero": {"vox_offset": 0},
        "dim_negative": {"dim": [3, 7, -8, 6, 1, 1, 1, 1]},
        "too_many_axes": {"dim": [9, 7, 8, 6, 1, 1, 1, 1]},
    }
    for name, fields in headers.items():
        yield Entry(f"{name}.nii", NIFTI, _nifti(**fields))
    slopes = ((0.1, -5), (0, -5), (np.nan, np.nan), (1, np.nan), (np.inf, 0), (-1, 0), (1, 7), (1e36, 0), (1e-30, 0))
    for number, (slope, inter) in enumerate(slopes):
        for kind in ("i2", "f4"):
            write = _nifti(VOLUME.astype(kind), scl_slope=slope, scl_inter=inter)
            yield Entry(f"slope_{number}_{kind}.nii", NIFTI, write)
    yield Entry("sheared.nii", NIFTI, _nifti(affine=sheared))
    yield Entry("nifti2.nii", NIFTI, _nifti(kind=nib.Nifti2Image))
    yield Entry("nifti2.nii.gz", NIFTI, _nifti(kind=nib.Nifti2Image))
    yield Entry("pair.img", NIFTI, _nifti(kind=nib.Nifti1Pair))
    yield Entry("analyze.img", NIFTI, _nifti(kind=nib.Spm99AnalyzeImage, affine=np.diag([1.0, 1.1, 1.5, 1.0])))
    yield Entry("header.hdr", NIFTI, lambda path: _nifti(kind=nib.Nifti1Pair)(path.with_suffix(".img")))
    yield Entry("trailing1.nii", NIFTI, _nifti(VOLUME[..., None]))
    yield Entry("two_volumes.nii.gz", NIFTI, _nifti(np.stack([VOLUME, VOLUME + 1], -1)))
    yield Entry("flat.nii.gz", NIFTI, _nifti(VOLUME[..., 2]))
    yield Entry("rgb.nii", NIFTI, _nifti(np.zeros((7, 8, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])))
    for axis, name in enumerate("xyz"):
        yield Entry(f"slice_{name}.nii", NIFTI, _nifti(np.take(VOLUME, [3], axis)))
    yield Entry("voxel.nii.gz", NIFTI, _nifti(VOLUME[3:4, 4:5, 2:3]))
    yield Entry("bordered.nii", NIFTI, _nifti(np.pad(VOLUME[2:5, 2:5, 2:5], 2)))
    yield Entry("zipped_without_saying.nii", NIFTI, lambda path: _gzipped(path, _nifti()))
    yield Entry("not_zipped.nii.gz", NIFTI, lambda path: _renamed(path, "plain.nii", _nifti()))
    yield Entry("CAPITALS.NII", NIFTI, _nifti())
    yield Entry("CAPITALS.NII.GZ", NIFTI, _nifti())


def _gzipped(path: Path, write: Write) -> None:
    write(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def _renamed(path: Path, name: str, write: Write) -> None:
    write(path.with_name(name))
    path.with_name(name).rename(path)


def _nifti_damage() -> Iterator[Entry]:
    for name in ("whole.nii", "whole.nii.gz", "WHOLE.NII", "WHOLE.NII.GZ"):
        yield from _cut(name, NIFTI, _nifti())
    yield from _cut("whole2.nii", NIFTI, _nifti(kind=nib.Nifti2Image))
    yield from _cut("pair.img", NIFTI, _nifti(kind=nib.Nifti1Pair), ".img")
    yield from _cut("header.img", NIFTI, _nifti(kind=nib.Nifti1Pair), ".hdr")
    for value in (np.nan, np.inf):
        array = VOLUME.copy()
        array[2, 3, 4] = value
        for ending in (".nii", ".nii.gz", ".NII", ".img"):
            kind = nib.Nifti1Pair if ending == ".img" else nib.Nifti1Image
            name = f"nan_{value}{ending}"
            yield Entry(name.upper() if ending.isupper() else name, NIFTI, _nifti(array, kind=kind))
        yield Entry(f"nan_{value}_double.nii", NIFTI, _nifti(array.astype("f8")))
        header = nib.Nifti1Header(endianness=">")
        yield Entry(f"nan_{value}_big_endian.nii.gz", NIFTI, _nifti(array.astype(">f4"), header=header))
        yield Entry(f"nan_{value}_nifti2.nii", NIFTI, _nifti(array, kind=nib.Nifti2Image))

    def flipped(path: Path) -> None:
        _nifti()(path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)

    yield Entry("flipped_bits.nii.gz", NIFTI, flipped, _nifti())


def _itk() -> Iterator[Entry]:
    def volume(kind: str = "i2", compress: bool = False, direction=None, vector: bool = False):
        def write(path: Path) -> None:
            array = VOLUME.T.astype(kind)
            image = sitk.GetImageFromArray(np.stack([array, array], -1) if vector else array, isVector=vector)
            image.SetSpacing((1.0, 1.1, 1.5))
            image.SetOrigin((3, -4, 5))
            if direction:
                image.SetDirection(direction)
            sitk.WriteImage(image, str(path), compress)

        return write

    for ending in (".nrrd", ".mha", ".gipl", ".mhd", ".nhdr"):
        for kind in ("u1", "i2", "u2", "f4") if ending == ".gipl" else ("u1", "i2", "u2", "i4", "f4", "f8", "c8"):
            yield Entry(f"itk_{kind}{ending}", ITK, volume(kind))
        yield Entry(f"turned{ending}", ITK, volume(direction=(0, 1, 0, -1, 0, 0, 0, 0, 1)))
        if ending in (".nrrd", ".mha", ".mhd"):
            yield Entry(f"packed{ending}", ITK, volume(compress=True))
            yield Entry(f"vector{ending}", ITK, volume(vector=True))
        if ending in (".nrrd", ".mha", ".gipl"):
            yield from _cut(f"itk{ending}", ITK, volume())
        if ending in (".nrrd", ".mha"):
            yield from _cut(f"packed{ending}", ITK, volume(compress=True))
            yield Entry(
                f"nan{ending}",
                ITK,
                lambda path: sitk.WriteImage(
                    sitk.GetImageFromArray(np.where(VOLUME > 100, np.nan, VOLUME).astype(np.float32)), str(path)
                ),
            )
            yield Entry(f"flat{ending}", ITK, lambda path: sitk.WriteImage(sitk.GetImageFromArray(GREY), str(path)))
            yield Entry(
                f"four{ending}",
                ITK,
                lambda path: sitk.WriteImage(
                    sitk.JoinSeries([sitk.GetImageFromArray(VOLUME), sitk.GetImageFromArray(VOLUME + 1)]), str(path)
                ),
            )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png_by_hand(bits: int, colour: int, array: np.ndarray, extra: bytes = b"") -> Write:
    """A PNG file of a kind that Pillow does not write."""
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in array]
    else:
        rows = [np.packbits(np.unpackbits(row[:, None].astype("u1"), axis=1)[:, -bits:]).tobytes() for row in array]
    size = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    return lambda path: path.write_bytes(content)


def _picture(array: np.ndarray, mode: str | None = None, **options) -> Write:
    def write(path: Path) -> None:
        image = Image.fromarray(array, mode) if mode in ("LA", "RGBA") else Image.fromarray(array)
        if mode == "P":
            image = image.quantize(32)
        image.save(path, **options)

    return write


def _png() -> Iterator[Entry]:
    opaque = np.full_like(GREY, 255)
    yield Entry("bit1.png", FLAT, _picture(MASK))
    yield Entry("bit2.png", FLAT, _png_by_hand(2, 0, GREY // 64))
    yield Entry("bit4.png", FLAT, _png_by_hand(4, 0, GREY // 16))
    yield Entry("grey8.png", FLAT, _picture(GREY))
    yield Entry("grey16.png", FLAT, _picture(GREY.astype(np.uint16) * 256 + 7))
    yield Entry("rgb8.png", FLAT, _picture(RGB))
    yield Entry("rgb16.png", FLAT, _png_by_hand(16, 2, RGB.astype(np.uint16) * 256 + 9))
    yield Entry("rgba8.png", FLAT, _picture(np.dstack([RGB, opaque]), "RGBA"))
    yield Entry("rgba16.png", FLAT, _png_by_hand(16, 6, np.dstack([RGB, opaque]).astype(np.uint16) * 257))
    yield Entry("la8.png", FLAT, _picture(np.dstack([GREY, opaque]), "LA"))
    yield Entry("la16.png", FLAT, _png_by_hand(16, 4, np.dstack([GREY, opaque]).astype(np.uint16) * 257))
    yield Entry("palette.png", FLAT, _picture(RGB, "P"))
    yield Entry("palette_seen_through.png", FLAT, _picture(RGB, "P", transparency=3))
    yield Entry("grey_seen_through.png", FLAT, _picture(GREY, transparency=int(GREY[3, 4])))
    yield Entry("rgb_seen_through.png", FLAT, _picture(RGB, transparency=(1, 2, 3)))
    yield Entry(
        "gamma.png", FLAT, _png_by_hand(16, 0, GREY.astype(np.uint16), _chunk(b"gAMA", struct.pack(">I", 45455)))
    )
    orientation = Image.Exif()
    orientation[274] = 3
    yield Entry("exif.png", FLAT, _picture(RGB, exif=orientation))
    yield Entry("jpeg_named.png", FLAT, _picture(RGB, format="JPEG", quality=95))
    yield Entry("jpeg_turned.png", FLAT, _picture(RGB, format="JPEG", exif=orientation))
    yield Entry("bmp_named.png", FLAT, _picture(RGB, format="BMP"))
    yield Entry("gif_named.png", FLAT, _picture(GREY, format="GIF"))
    yield Entry("wide3.png", FLAT, _picture(GREY[:, :3]))
    yield Entry("high4.png", FLAT, _picture(GREY[:4]))
    yield Entry("pixel.png", FLAT, _picture(GREY[:1, :1]))
    yield Entry("CAPITALS.PNG", FLAT, _picture(GREY))
    yield from _cut("grey8.png", FLAT, _picture(GREY))
    yield from _cut("rgb8.PNG", FLAT, _picture(RGB))
    yield from _cut("bit1.png", FLAT, _picture(MASK))
    yield from _cut("jpeg_named.png", FLAT, _picture(RGB, format="JPEG"))


def _bmp_and_jpeg() -> Iterator[Entry]:
    yield Entry("bit1.bmp", FLAT, _picture(MASK))
    yield Entry("grey8.bmp", FLAT, _picture(GREY))
    yield Entry("palette.bmp", FLAT, _picture(RGB, "P"))
    yield Entry("rgb.bmp", FLAT, _picture(RGB))
    yield Entry("rgba.bmp", FLAT, _picture(np.dstack([RGB, GREY]), "RGBA"))
    yield from _cut("grey8.bmp", (*FLAT, "SimpleITKIO"), _picture(GREY))
    yield from _cut("rgb.BMP", FLAT, _picture(RGB))
    yield Entry("grey.jpg", FLAT, _picture(GREY))
    yield Entry("rgb.jpg", FLAT, _picture(RGB))
    yield Entry("progressive.jpg", FLAT, _picture(RGB, progressive=True))
    yield from _cut("grey.jpg", (*FLAT, "SimpleITKIO"), _picture(GREY))
    yield from _cut("progressive.jpg", FLAT, _picture(RGB, progressive=True))


def _tiff(array: np.ndarray, **options) -> Write:
    return lambda path: tifffile.imwrite(path, array, **{"photometric": "minisblack"} | options)


def _flat_tiff() -> Iterator[Entry]:
    for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8", ">u2", ">f4", "c8"):
        yield Entry(
            f"tiff_{kind.strip('>')}{'be' * (kind[0] == '>')}.tif",
            FLAT,
            _tiff((GREY // 2).astype(kind), byteorder=kind[0] if kind[0] == ">" else None),
        )
    for number, options in enumerate(
        (
            {"photometric": "miniswhite"},
            {"tile": (16, 16)},
            {"rowsperstrip": 4},
            {"bigtiff": True},
            {"resolution": (300, 150), "resolutionunit": 2},
            {"compression": "zlib"},
            {"compression": "lzw"},
            {"compression": "zstd"},
            {"compression": "zlib", "predictor": True},
            {"compression": "packbits"},
        )
    ):
        yield Entry(f"options_{number}.tif", FLAT, _tiff(GREY, **options))
    yield Entry("rgb.tif", FLAT, _tiff(RGB, photometric="rgb"))
    yield Entry("planar.tif", FLAT, _tiff(np.moveaxis(RGB, -1, 0), photometric="rgb", planarconfig="separate"))
    yield Entry("rgba.tif", FLAT, _tiff(np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unassalpha"]))
    yield Entry("three_slices.tif", FLAT, _tiff(np.stack([GREY, GREY, GREY])))
    yield Entry("two_pages.tif", FLAT, _tiff(np.stack([GREY, GREY])))
    yield Entry("bit1.tif", FLAT, _picture(MASK))
    yield Entry("fax.tif", FLAT, _picture(MASK, compression="group4"))
    yield Entry("palette.tif", FLAT, _picture(RGB, "P"))
    yield Entry("turned.tif", FLAT, _picture(GREY, tiffinfo={274: 3}))
    yield Entry("jpeg.tif", FLAT, _picture(RGB, compression="jpeg"))
    yield Entry("wide4.tif", FLAT, _tiff(GREY[:, :4]))
    for name, options in (
        ("strips", {"rowsperstrip": 4}),
        ("packed", {"compression": "zlib"}),
        ("big", {"bigtiff": 1}),
    ):
        yield from _cut(f"{name}.tif", FLAT, _tiff(GREY, **options))
    yield from _cut("lzw.TIF", FLAT, _picture(GREY, compression="tiff_lzw"))


def _tiff_volumes() -> Iterator[Entry]:
    def pages(path: Path) -> None:
        slices = [Image.fromarray(plane) for plane in VOLUME.T.astype(np.uint8)]
        slices[0].save(path, format="TIFF", save_all=True, append_images=slices[1:])

    def with_spacing(content) -> Write:
        def write(path: Path) -> None:
            _tiff(VOLUME.T)(path)
            path.with_name(f"{path.name.rpartition('_')[0]}.json").write_text(json.dumps(content))

        return write

    for kind in ("u1", "u2", "i2", "f4", "f8"):
        for ending in (".tif", ".tiff"):
            yield Entry(f"volume_{kind}{ending}", TIFF, _tiff(VOLUME.T.astype(kind)))
    yield Entry("volume_zlib.tif", TIFF, _tiff(VOLUME.T, compression="zlib"))
    yield Entry("volume_tiled.tif", TIFF, _tiff(VOLUME.T, tile=(16, 16)))
    yield Entry("volume_imagej.tif", TIFF, _tiff(VOLUME.T, imagej=True, metadata={"axes": "ZYX"}))
    yield Entry("pages.tif", TIFF, pages)
    yield Entry("flat.tif", TIFF, _tiff(GREY))
    yield Entry("colours.tif", TIFF, _tiff(RGB, photometric="rgb"))
    yield Entry("PAGES.TIFF", TIFF, pages)
    yield Entry("spacing_0000.tif", TIFF, with_spacing({"spacing": [1.5, 1.1, 1.0]}))
    yield Entry("no_spacing_0000.tif", TIFF, with_spacing({"x": 1}))
    yield Entry("two_numbers_0000.tif", TIFF, with_spacing({"spacing": [1, 1]}))
    yield from _cut("volume.tif", TIFF, _tiff(VOLUME.T))
    yield from _cut("pages.tif", TIFF, pages)
    yield from _cut("packed.tiff", TIFF, _tiff(VOLUME.T, compression="zlib"))
