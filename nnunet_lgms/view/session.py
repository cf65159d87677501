"""One open tab: the image that it shows and the labels that were found.

A session belongs to one connection that the page keeps open (see ``app``) and ends with it; there is no request that
ends one. Its name is random, like its folder's, which no request knows.
"""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anyio import CapacityLimiter, to_thread

from nnunet_lgms.files import NO_ROOM, one_line
from nnunet_lgms.runtime import Predictor
from nnunet_lgms.runtime.images import Case, read_case, write_labels
from nnunet_lgms.view.picture import Picture, amounts
from nnunet_lgms.view.uploads import Refused

NO_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate")  # what ITK and ONNX Runtime say


class Unwanted(Exception):
    """The tab was closed, or shows another image by now."""


@dataclass
class Shown:
    """An image in a tab.

    Attributes:
        number: of the image in its session.
        name: of its first file, without its ending, as the user calls it.
        progress: windows done and in all.
        task: finds the labels, and gives the amounts of them.
    """

    number: int
    name: str
    case: Case
    picture: Picture
    labels: np.ndarray | None = None
    progress: tuple[int, int] = (0, 0)
    task: asyncio.Task | None = None


@dataclass
class Session:
    """One tab.

    Args:
        predictor: the model.
        root: the program's folder.
        turn: whose turn it is to compute; shared by all sessions, one at a time.
    """

    predictor: Predictor
    root: Path
    turn: CapacityLimiter
    name: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    shown: Shown | None = None
    _numbers: int = 0

    def __post_init__(self):
        self.folder = Path(tempfile.mkdtemp(dir=self.root))

    def close(self) -> None:
        """Nothing of the tab stays, in memory or on the disk; what is being computed for it stops after its window."""
        self.shown = None
        shutil.rmtree(self.folder, ignore_errors=True)

    async def show(self, files: Sequence[Path], names: Sequence[str]) -> Shown:
        """Reads an image; it takes the place of the one before.

        Raises:
            Refused: it cannot be read, or is not what the model expects.
        """
        self._numbers += 1
        number = self._numbers
        case, picture = await _told(self._read, files, called=dict(zip(map(str, files), names)))
        if number != self._numbers or not self.folder.exists():
            raise Refused("Another image was opened in the meantime.", 409)
        name = re.split(r"[\\/]", names[0])[-1].removesuffix(self.predictor.description.file_ending)
        self.shown = Shown(number, name, case, picture)
        return self.shown

    def _read(self, files: Sequence[Path]) -> tuple[Case, Picture]:
        case = read_case(files, self.predictor.description)
        return case, Picture(case)

    def start(self, shown: Shown) -> asyncio.Task:
        """Finds the labels of an image, once, however often it is asked for."""
        if shown.task is None:
            shown.task = asyncio.create_task(self._segment(shown))
            shown.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # told to who waits for it
        return shown.task

    async def _segment(self, shown: Shown) -> list[dict]:
        def progress(done: int, total: int) -> None:
            if self.shown is not shown:
                raise Unwanted
            shown.progress = done, total

        def compute() -> list[dict]:
            progress(0, 0)
            labels = self.predictor.predict_case(shown.case, progress)
            shown.picture.add_labels(labels)
            shown.labels = labels
            return amounts(labels, shown.case, self.predictor.description)

        try:
            return await _told(compute, limiter=self.turn)
        except Unwanted:
            raise Refused("Another image was opened in the meantime.", 409) from None
        except Refused:
            if self.shown is shown:  # its samples were used up: it is read anew for the next try
                self.shown = None
            raise

    async def mask(self) -> tuple[bytes, str]:
        """The labels as a file of the model's format, and a name for it.

        Raises:
            Refused: there are none yet, or there is no room to write them.
        """
        shown = self.shown
        if shown is None or shown.labels is None:
            raise Refused("There is no mask yet: segment an image first.", 404)
        ending = self.predictor.description.file_ending

        def written() -> bytes:
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                write_labels(shown.labels, shown.case, file := Path(folder, f"mask{ending}"))
                return file.read_bytes()

        return await _told(written), f"{shown.name}_mask{ending}"


async def _told(work, *arguments, called: dict[str, str] | None = None, limiter: CapacityLimiter | None = None):
    """Does it in a thread; what goes wrong becomes one sentence in which files have the user's names."""
    try:
        return await to_thread.run_sync(work, *arguments, limiter=limiter)
    except (Unwanted, Refused):
        raise
    except Exception as error:
        sentence, status = explained(error)
        for path, name in (called or {}).items():
            sentence = sentence.replace(path, name)
        raise Refused(sentence, status) from error


def explained(error: Exception) -> tuple[str, int]:
    """One sentence for the user about what went wrong, and the status of the answer."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    if any(isinstance(c, MemoryError) or any(words in str(c).lower() for words in NO_MEMORY) for c in causes):
        return "There is too little memory for this image: close other programs, or use a machine with more.", 507
    if any(isinstance(c, OSError) and c.errno in NO_ROOM for c in causes):
        return "The disk for temporary files is full: free some space, or set TMPDIR to a folder that has more.", 507
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return "The page was closed, or its temporary files were removed: load it again.", 410
    if isinstance(error, ValueError):
        return " ".join(str(error).split()), 400
    return f"This went wrong ({type(error).__name__}: {one_line(error)}).", 500
