"""Files that a tab sends: where they go, and that they are images of one file each.

Some formats name other files, from which the pixels are to be read: any file of this machine, if a stranger wrote the
header. And readers choose a format by what is in a file, whatever it is called. So the first bytes have to be those of
the ending, and nothing in them may point elsewhere.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.requests import ClientDisconnect

PATIENCE = 60  # seconds without a byte
HEADER = 2**16  # bytes in which a text header ends; nobody's is longer
NIFTI = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: how files of each ending begin; what is compressed, once it is not
BEGINNINGS = {
    ".nii.gz": NIFTI,
    ".nii": NIFTI,
    ".nrrd": (b"NRRD",),
    ".mha": (b"",),  # text, by its last line
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".bmp": (b"BM",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".tif": TIFF,
    ".tiff": TIFF,
}


class Refused(Exception):
    """What a user is told, and the status of the answer."""

    def __init__(self, sentence: str, status: int = 400):
        super().__init__(sentence)
        self.status = status


def ending_of(name: str) -> str:
    """The ending for a file on the disk: one of ours, whatever the user's is called.

    Raises:
        Refused: it is none.
    """
    for ending in BEGINNINGS:
        if name.lower().endswith(ending):
            return ending
    raise Refused(f"{name} is no image that this page takes: allowed are {', '.join(BEGINNINGS)}.")


async def receive(parts: AsyncIterator[bytes], files: Sequence[Path], sizes: Sequence[int]) -> None:
    """Writes what is sent to the files, each with its size.

    Raises:
        Refused: less is sent than was announced, or nothing for a long time.
        OSError: it cannot be written.
    """
    part = b""
    try:
        for path, size in zip(files, sizes):
            with path.open("xb") as file:
                while size:
                    if not part:
                        part = await asyncio.wait_for(anext(parts), PATIENCE)
                    file.write(part[:size])
                    size, part = size - len(part[:size]), part[size:]
    except (ClientDisconnect, StopAsyncIteration):
        raise Refused("The upload was cut short: try again.") from None
    except (TimeoutError, asyncio.TimeoutError):
        raise Refused(f"Nothing was sent for {PATIENCE} seconds: try again.", 408) from None


def check_self_contained(file: Path, name: str) -> None:
    """A file is of the format that its ending says, and holds its pixels itself.

    Raises:
        Refused: it is not.
    """
    ending = ending_of(name)
    try:
        with gzip.open(file) if ending.endswith(".gz") else file.open("rb") as opened:
            start = opened.read(HEADER)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Refused(f"{name} is damaged or was cut short ({error}).") from None
    if not start.startswith(BEGINNINGS[ending]):
        raise Refused(f"{name} does not hold what files with the ending {ending} do: convert the image, or rename it.")
    if ending == ".nrrd":
        inside = re.search(rb"^data ?file *:", start.partition(b"\n\n")[0], re.I | re.M) is None
    elif ending == ".mha":
        found = re.findall(rb"^ElementDataFile *= *(\S+)", start, re.M)
        inside = found[:1] == [b"LOCAL"]
    elif ending in (".tif", ".tiff"):
        inside = b"FileName=" not in file.read_bytes()  # OME-TIFF
    else:
        inside = True
    if not inside:
        raise Refused(f"The pixels of {name} are in another file: give an image that is one file.")
