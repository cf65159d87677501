"""One at a time: a lock with an owner on what is being written.

The lock is ``flock``'s, through filelock, on a small hidden file beside what is written. The system gives it back when
its process ends, however it ends, so what a killed process leaves behind is taken over without a word, and processes
that it forked do not keep it. The file holds the number and the host of the process, for the sentence that another one
gets; it is removed with the lock.

Linux hands ``flock`` on NFS to the server, so it holds across the hosts of a cluster, and another host is named in the
sentence; the server frees what a lost host held when its lease has run out. Where a file system has no locks at all,
which some cluster file systems are mounted without, a warning is printed and the work goes on.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

#: what file systems without locks answer
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
#: seconds between two looks at a lock that is waited for
LOOK = 0.5


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False, survives_exec: bool = False) -> Iterator[None]:
    """Holds a lock while something is written; nobody else, on this host or another one, holds it meanwhile.

    Args:
        path: the lock's file; its folder is made if need be, and removed again if nothing else was put there.
        what: what is being done, as in "another ... is running".
        wait: wait for the other one to end, instead of refusing.
        survives_exec: what this process becomes by ``os.exec`` keeps the lock.

    Raises:
        ValueError: another process holds the lock and ``wait`` is not set; one sentence that names it.
        OSError: the lock's file cannot be written.
    """
    made = _make_folders(path.parent)
    lock = file_lock(path, survives_exec=survives_exec)
    try:
        try:
            if not acquired(lock):
                if not wait:
                    raise ValueError(f"Another {what} is running ({owner(path)}): wait until it has ended, or stop it.")
                print(f"Waiting: another {what} is running ({owner(path)})", flush=True)
                lock.acquire(poll_interval=LOOK)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                error.filename = str(path.parent)  # nobody knows the file
                raise
            path.unlink(missing_ok=True)
            print(f"{path} cannot be locked ({error.strerror}): see to it that no other {what} runs", file=sys.stderr)
        yield
    finally:
        if lock.is_locked:
            _let_go(lock, path)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def file_lock(path: Path, *, survives_exec: bool = False) -> FileLock:
    """The lock of a file, not yet held, which writes its owner into the file when it is."""

    def sign(descriptor: int) -> None:
        with suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        if survives_exec:
            os.set_inheritable(descriptor, True)

    return FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=sign)


def _let_go(lock: FileLock, path: Path) -> None:
    if os.name == "nt":  # which removes no file that is open: by then it may be another one's
        lock.release()
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)  # who waits for the old file notices that it is gone
    lock.release()


def acquired(lock: FileLock) -> bool:
    """Whether the lock was free, and is held now.

    Raises:
        OSError: it cannot be, for another reason than that somebody else holds it.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def owner(path: Path) -> str:
    """Who holds a lock, as far as its file tells: ``"process 4711"``, with the host if it is another one."""
    try:
        process, host = path.read_text("utf-8").split()
    except (OSError, ValueError):
        return "its process is not known"
    return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder; those that were made, the innermost first."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
