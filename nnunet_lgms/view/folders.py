"""The program's own folder of temporary files, which goes with it, however it ends.

Its name is random, and nothing that a request says becomes part of a path in it. What a killed program left is removed
by the next one: the lock in its folder is nobody's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "nnunet_lgms_view_"
LOCK = "lock"


@contextmanager
def program_folder() -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end; those of dead programs are removed first."""
    remove_left()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
            break
        except (Timeout, OSError):
            # another one that starts took it for a dead program's, before it was locked
            if folder.exists():
                raise
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_left() -> None:
    """Removes the folders of this user's programs that do not run any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.is_symlink() or not folder.is_dir() or not _is_own(folder):
            continue
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            with lock:
                for entry in folder.iterdir():  # the lock itself last: until then nobody else takes the folder
                    if entry.name != LOCK:
                        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):  # it runs, or is being removed by another one
            continue


def _is_own(folder: Path) -> bool:
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
