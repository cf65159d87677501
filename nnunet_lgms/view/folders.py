"""The program's own folder of temporary files, which goes with it, however it ends.

Its name is random, and nothing that a request says becomes part of a path in it. What a killed program left is removed
by the next one: the lock in its folder is nobody's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_lgms.locks import NO_LOCKS, acquired, file_lock

PREFIX = "nnunet_lgms_view_"
LOCK = "lock"


@contextmanager
def program_folder() -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end; those of dead programs are removed first.

    Raises:
        OSError: it cannot be made.
    """
    remove_left()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        lock = file_lock(folder / LOCK)
        try:
            held = acquired(lock)
        except OSError as error:
            held = error.errno in NO_LOCKS  # then nobody else removes it either
            if not held and folder.exists():
                raise
        # another one that started just now may have taken it for a dead program's
        if held and folder.exists():
            break
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_left() -> None:
    """Removes the folders of this user's programs that do not run any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another one removes it, or its file system has no locks
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != _user():
                continue
            lock = file_lock(folder / LOCK)
            if acquired(lock):
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows gives every file the user 0
