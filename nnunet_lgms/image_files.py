"""Whether an image file is whole and finite, asked of its content, whatever it is called.

Readers hide both. SimpleITK reads NIfTI, GIPL, BMP and JPEG files that were cut short without a word, as zeros or as
whatever its memory held before, and gives 0 for every NaN of a NIfTI file; tifffile leaves out the pages of a TIFF file
that are not there. Needs numpy alone, and a MiB of memory, whatever the size of the image; the orientation of pictures
needs Pillow, and decodes them.
"""

from __future__ import annotations

import errno
import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**20
HEADER = 544  # bytes of the longest header, NIfTI-2 with its four bytes of extension

#: NIfTI's numbers for floating point, real and complex, and the bytes of one float
NIFTI_FLOATS = {16: 4, 64: 8, 1536: 16, 32: 4, 1792: 8, 2048: 16}
#: GIPL's magic numbers, and its numbers for voxels with their bytes
GIPL_MAGIC = (4026526128, 719555000)
GIPL_TYPES = {1: 1, 7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112  # EXIF's


def check_image_file(path: Path) -> None:
    """Look at every byte of an image file, of both files of a pair (`.hdr` and `.img`).

    Known are gzip, NIfTI-1, NIfTI-2, Analyze, GIPL, PNG, JPEG, BMP and TIFF; the readers of NRRD and MetaImage refuse
    what is cut short themselves. What is not known is left to its reader.

    Raises:
        ValueError: it is damaged or was cut short, or it is NIfTI and holds NaN, infinity, or a spacing that
            is 0 or no number; one sentence.
        OSError: it cannot be read.
    """
    try:
        with _uncompressed(path) as file:
            head = file.read(HEADER)
            file.seek(0)
            nifti = _nifti(head)
            if nifti and not all(0 < abs(mm) < math.inf for mm in nifti.spacing):  # some write them below 0
                raise ValueError(
                    f"{path} has a spacing of {nifti.spacing} mm, of which readers make 1: correct its header."
                )
            if nifti and not nifti.is_pair:
                _check_voxels(file, nifti, path)
            elif head[252:256] in [struct.pack(">I", magic) for magic in GIPL_MAGIC]:
                _check_gipl(file, head)
            elif head.startswith(PNG_MAGIC):
                _check_png(file)
            elif head.startswith(b"\xff\xd8\xff"):
                _check_jpeg(file.read())
            elif head.startswith(b"BM"):
                _check_bmp(file, head)
            elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                _check_tiff(file)
            for _ in iter(lambda: file.read(CHUNK), b""):  # the checksum of gzip is at its end
                pass
        header, voxels = (path, _partner(path, ".img")) if nifti else (_partner(path, ".hdr"), path)
        if header and voxels and (nifti is None or nifti.is_pair):
            _check_pair(header, voxels)
    except (EOFError, gzip.BadGzipFile, zlib.error, _CutShort) as error:
        raise ValueError(f"{path} cannot be read: it is damaged or was cut short ({error}); get it anew.") from error


def says_to_turn(path: Path) -> bool:
    """Whether a readable picture says that viewers should turn or mirror it."""
    from PIL import Image

    with path.open("rb") as file, Image.open(file) as image:
        said = image.getexif().get(ORIENTATION, 1)  # of a TIFF, which Pillow turns when loading
        image.load()  # a PNG may say so behind its pixels
        return not {said, image.getexif().get(ORIENTATION, 1)} <= {0, 1}


def check_orientation(path: Path) -> None:
    """Raises ValueError if a picture says that it is to be turned, which nnU-Net's reader does not do."""
    try:
        turned = says_to_turn(path)
    except Exception:  # Pillow raises almost anything for kinds that it does not know, and their reader may
        return
    if turned:
        raise ValueError(
            f"{path} says that viewers turn it (EXIF orientation), as `nnunet_lgms convert` does and nnU-Net's reader "
            "does not: save it turned first."
        )


class _CutShort(Exception):
    """What is missing."""


def _seek(file: BinaryIO, offset: int, whence: int = os.SEEK_SET) -> None:
    """Goes where a header points to, which may be beyond the end of any file."""
    try:
        file.seek(offset, whence)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise _CutShort(f"it goes on {offset} bytes further") from error


@contextmanager
def _uncompressed(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if is_gzip:
            with gzip.GzipFile(fileobj=file) as content:
                yield content
        else:
            yield file


@dataclass(frozen=True)
class _Layout:
    """Where a header keeps what: struct's format and the byte where it starts."""

    length: int
    sizes: tuple[str, int]  # the number of axes, and the voxels of each
    kind: tuple[str, int]  # NIfTI's number of the type, and the bits of a voxel
    start: tuple[str, int]  # where the voxels start
    spacing: tuple[str, int]  # mm of each axis, behind a number of another meaning
    magic: int


NIFTI_LAYOUTS = (  # NIfTI-1 and Analyze, NIfTI-2
    _Layout(348, sizes=("8h", 40), kind=("2h", 70), start=("f", 108), spacing=("8f", 76), magic=344),
    _Layout(540, sizes=("8q", 16), kind=("2h", 12), start=("q", 168), spacing=("8d", 104), magic=4),
)


@dataclass(frozen=True)
class _Nifti:
    """What a NIfTI or Analyze header says: where voxels start, their bytes, and their type if that is floating."""

    is_pair: bool
    start: int
    n_bytes: int
    float_type: str | None
    spacing: tuple[float, ...]  # of the axes of space that have more than one voxel


def _nifti(head: bytes) -> _Nifti | None:
    """The header at the start of a file; None if there is none, or one that no reader takes."""
    known = [(order, layout) for order in "<>" for layout in NIFTI_LAYOUTS]
    order, layout = next((o_l for o_l in known if head[:4] == struct.pack(f"{o_l[0]}i", o_l[1].length)), (None, None))
    if layout is None:
        return None
    if len(head) < layout.length:
        raise _CutShort(f"{len(head)} bytes of a header of {layout.length}")

    def field(form: str, at: int) -> tuple:
        return struct.unpack_from(f"{order}{form}", head, at)

    n_axes, *sizes = field(*layout.sizes)
    kind, bits = field(*layout.kind)
    (start,) = field(*layout.start)
    if not 1 <= n_axes <= 7 or bits < 0 or not math.isfinite(start):
        return None
    n_bytes = math.prod(max(n, 1) for n in sizes[:n_axes]) * bits // 8
    float_type = f"{order}f{NIFTI_FLOATS[kind]}" if kind in NIFTI_FLOATS else None
    is_pair = head[layout.magic : layout.magic + 3] not in (b"n+1", b"n+2")
    spacing = tuple(mm for mm, n in zip(field(*layout.spacing)[1:4], sizes[: min(n_axes, 3)]) if n > 1)
    return _Nifti(is_pair, max(int(start), 0), n_bytes, float_type, spacing)


def _check_voxels(file: BinaryIO, nifti: _Nifti, path: Path) -> None:
    import numpy as np

    try:
        kind = nifti.float_type and np.dtype(nifti.float_type)
    except TypeError:  # this machine has no float of 16 bytes
        kind = None
    _seek(file, nifti.start)
    left = nifti.n_bytes
    while left > 0 and (part := file.read(min(left, CHUNK))):
        left -= len(part)
        if kind and not np.isfinite(np.frombuffer(part, kind, len(part) // kind.itemsize)).all():
            raise ValueError(f"{path} holds NaN or infinity, which its reader may take for 0: clean it first.")
    if left > 0:
        raise _CutShort(f"{nifti.n_bytes - left} bytes of {nifti.n_bytes}")


def _check_pair(header: Path, voxels: Path) -> None:
    with _uncompressed(header) as file:
        nifti = _nifti(file.read(HEADER))
    if nifti and nifti.is_pair:
        with _uncompressed(voxels) as file:
            _check_voxels(file, nifti, voxels)
            for _ in iter(lambda: file.read(CHUNK), b""):
                pass


def _partner(path: Path, ending: str) -> Path | None:
    """The other file of a pair, `.hdr` or `.img`, compressed or not and in capitals or not."""
    stem, own = os.path.splitext(path.name.removesuffix(path.suffix) if path.suffix.lower() == ".gz" else path.name)
    if own.lower() not in (".hdr", ".img"):
        return None
    names = {f"{stem}{form}{gz}" for form in (ending, ending.upper()) for gz in ("", ".gz", ".GZ")}
    return next((path.with_name(name) for name in sorted(names) if path.with_name(name).is_file()), None)


def _check_gipl(file: BinaryIO, head: bytes) -> None:
    sizes, kind = struct.unpack_from(">4H", head), struct.unpack_from(">H", head, 8)[0]
    n_bytes = math.prod(max(n, 1) for n in sizes) * GIPL_TYPES.get(kind, 0)
    there = file.seek(0, os.SEEK_END) - 256
    if there < n_bytes:
        raise _CutShort(f"{there} bytes of {n_bytes}")


def _check_png(file: BinaryIO) -> None:
    file.seek(len(PNG_MAGIC))
    while len(start := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", start)
        content, checksum = file.read(length), file.read(4)
        if len(content) < length or len(checksum) < 4:
            break
        # capitals: a chunk that no reader may leave out
        if name[:1].isupper() and zlib.crc32(name + content) != int.from_bytes(checksum, "big"):
            raise _CutShort(f"the checksum of {name.decode('latin1')} is wrong")
        if name == b"IEND":
            return
    raise _CutShort("its end is missing")


def _check_jpeg(content: bytes) -> None:
    at = 2
    while content[at : at + 1] == b"\xff" and len(content) >= at + 4:
        if content[at + 1] == 0xFF:  # filling
            at += 1
            continue
        if content[at + 1] == 0xDA:  # scans follow, in which FF D9 can be nothing but the end
            if content.find(b"\xff\xd9", at) >= 0:
                return
            break
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    raise _CutShort("its end is missing")


def _check_bmp(file: BinaryIO, head: bytes) -> None:
    if len(head) < 34:
        raise _CutShort(f"{len(head)} bytes of a header of 54")
    start, length, width, height = struct.unpack_from("<II2i", head, 10)
    bits, compression = struct.unpack_from("<HI", head, 28)
    if length < 40 or compression not in (0, 3):  # of another age, or packed
        return
    used = (width * bits + 7) // 8
    n_bytes = start + (used + 3) // 4 * 4 * (abs(height) - 1) + used
    there = file.seek(0, os.SEEK_END)
    if there < n_bytes:
        raise _CutShort(f"{there} bytes of {n_bytes}")


def _check_tiff(file: BinaryIO) -> None:
    """Follow the chain of pages; that the pixels of each are there is looked at by who reads them."""
    file.seek(0)
    order, big = ("<", ">")[file.read(2) == b"MM"], file.read(2).strip(b"\0") == b"+"
    number, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)

    def read(kind: str) -> int:
        content = file.read(struct.calcsize(f"<{kind}"))
        if len(content) < struct.calcsize(f"<{kind}"):
            raise _CutShort("a page is missing")
        return struct.unpack(f"{order}{kind}", content)[0]

    file.seek(8 if big else 4)
    seen: set[int] = set()
    while offset := read(number):
        if offset in seen:
            raise _CutShort("its pages go round in a circle")
        seen.add(offset)
        _seek(file, offset)
        _seek(file, read(count) * entry, os.SEEK_CUR)
