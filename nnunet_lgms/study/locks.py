"""Locks that end with the process that holds them, however it ends; and one GPU a job."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """:func:`hold` for a block of code."""
    with hold(path, what):
        yield


def hold(path: Path, what: str) -> IO:
    """Waits until no other process, on this host or another one of the same file system, holds `path`.

    Args:
        path: a file, made if need be; it stays.
        what: what is waited for, for the one who reads the log.

    Returns:
        The open file; closing it gives the lock back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        if not _acquired(file):
            print(f"Waiting for another job with {what}", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:  # some cluster file systems are mounted without locks
        print(f"{path} cannot be locked ({error.strerror}): going on without", file=sys.stderr)
    return file


@contextmanager
def one_gpu(poll_seconds: float = 5) -> Iterator[str | None]:
    """Holds one of the visible GPUs that no other job of this user on this host holds, and makes it the only one.

    Sets CUDA_VISIBLE_DEVICES, so it must come before torch is used. On a cluster that shows a job its own GPU alone
    there is nothing to choose and nothing to wait for. Yields the GPU, or None where there is none.
    """
    gpus = visible_gpus()
    if not gpus:
        yield None
        return
    folder = Path(tempfile.gettempdir()) / f"nnunet_lgms_gpus_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu, file = _first_free(gpus, folder, poll_seconds)
    with file:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        try:
            yield gpu
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; [] if there are none."""
    listed: list[tuple[str, str]] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True)
        lines = answer.stdout.splitlines() if answer.returncode == 0 else []
        listed = [tuple(cell.strip() for cell in line.split(",")) for line in lines]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [uuid for _, uuid in listed]
    by_index = dict(listed)
    # what is no index is a name already: a GPU's UUID, or that of a MIG instance
    return [by_index.get(word.strip(), word.strip()) for word in visible.split(",") if word.strip() not in ("", "-1")]


def _first_free(gpus: Sequence[str], folder: Path, poll_seconds: float) -> tuple[str, IO]:
    said = False
    while True:
        for gpu in gpus:
            file = (folder / f"{gpu.replace('/', '_')}.lock").open("a")
            if _acquired(file):
                return gpu, file
            file.close()
        if not said:
            print(f"Waiting for one of {len(gpus)} GPU(s)", flush=True)
            said = True
        time.sleep(poll_seconds)


def _acquired(file: IO) -> bool:
    """Whether the lock was free, and is ours now.

    A POSIX lock is not passed on to forked processes: what a killed training leaves behind does not keep it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # systems differ in what they call it
        return False
    return True
