"""What is written while a training goes on: checkpoints by a thread, the progress picture by a process of its own.

nnU-Net draws the picture (two thirds of a second of Python) and writes checkpoints between two epochs, and the GPU
waits. Drawn in a thread, the picture would take the interpreter's lock from the steps.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunet_lgms.files import atomic_write, one_line


class Writer:
    """A thread that writes files one after the other, in the order in which they were given."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writer")
        self._unfinished: deque[Future] = deque()

    def write(self, task: Callable[[], None]) -> None:
        self._unfinished.append(self._thread.submit(task))

    def wait(self) -> None:
        """Until all is written; raises the first error of those since the last call."""
        errors = [self._unfinished.popleft().exception() for _ in range(len(self._unfinished))]
        if error := next(filter(None, errors), None):
            raise error


class ProgressPicture:
    """nnU-Net's progress.png, drawn by a process of its own; if that is behind, it goes on with the newest."""

    def __init__(self) -> None:
        self._thread, self._lock = ThreadPoolExecutor(1, "picture"), threading.Lock()
        self._process: subprocess.Popen | None = None
        self._newest: bytes | None = None  # to be drawn
        self._drawing: Future | None = None
        self._error: str | None = None

    def draw(self, folder: str, logging: dict[str, list]) -> None:
        """Begins to draw and returns.

        Raises:
            OSError: one before could not be written.
        """
        self._raise_error()
        with self._lock:
            begin = self._newest is None and (self._drawing is None or self._drawing.done())
            self._newest = pickle.dumps((folder, logging))
            if begin:
                self._drawing = self._thread.submit(self._draw_newest)

    def finish(self) -> None:
        """Waits for the newest, and ends the process.

        Raises:
            OSError: it could not be written.
        """
        self._thread.shutdown()
        self._end_process()
        self._raise_error()

    def _end_process(self) -> None:
        if self._process is None:
            return
        with suppress(OSError):  # what it did not read
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._process = None

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error:
            raise OSError(error)

    def _draw_newest(self) -> None:
        while True:
            with self._lock:
                content, self._newest = self._newest, None
                if content is None:
                    self._drawing = None
                    return
            for process in ("killed, and another takes its place", "killed"):
                try:
                    self._error = self._ask(content) or self._error
                    break
                except (OSError, ValueError):  # it does not answer
                    print(f"The process that draws progress.png was {process}.", file=sys.stderr)
                    self._end_process()

    def _ask(self, content: bytes) -> str | None:
        """What kept the process from drawing, if anything did."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._process.stdin.write(content)
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def draw_picture(folder: str, logging: dict[str, list]) -> None:
    """nnU-Net's progress.png of what its logger holds, whole or not at all."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    logger = LocalLogger()
    logger.load_checkpoint(logging)
    with TemporaryDirectory() as temporary, atomic_write(Path(folder) / "progress.png") as file:
        logger.plot_progress_png(temporary)
        shutil.copyfile(Path(temporary) / "progress.png", file)


def main() -> None:
    """The process: pictures to draw come in by the standard input, and errors go out, until the training has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the training, after the last picture
    if hasattr(os, "nice"):
        os.nice(10)  # steps come first
    answers, sys.stdout = sys.stdout, sys.stderr
    while True:
        try:
            folder, logging = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # the training has ended, or was killed
            return
        error = _error_of(draw_picture, folder, logging)
        print(json.dumps(error), file=answers, flush=True)


def _error_of(function: Callable, *args: Any) -> str | None:
    try:
        function(*args)
    except Exception as error:
        return one_line(error)
    return None


if __name__ == "__main__":
    main()
