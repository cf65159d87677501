"""What went wrong, as one sentence for who can put it right."""

from __future__ import annotations

import errno
import re

from nnunet_lgms.files import one_line

WAY_OUT = {
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
    errno.EROFS: "name a folder that can be written to",
    errno.ENOSPC: "free some space, or name another folder",
    errno.EDQUOT: "free some space, or name another folder",
    errno.ENOENT: "correct the path, or make its folder",
}
#: how libraries that raise no MemoryError say it: PyTorch, ITK, ONNX Runtime, NumPy in a subprocess
OUT_OF_MEMORY = re.compile(r"(out of|not enough) memory|(can'?t|unable to|failed to|cannot) alloc|bad.alloc", re.I)


def sentence(error: BaseException) -> str:
    """One line about an error: what the system reports gets the file in front and a way out behind."""
    if out_of_memory(error):
        reason = f" ({one_line(error)})" if str(error) else ""
        return f"There is not enough memory{reason}: end other programs, or raise what limits it (ulimit -v)."
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return " ".join(str(error).split())
    way_out = WAY_OUT.get(error.errno or 0)
    return f"{shown_path(error.filename)}: {error.strerror}" + (f"; {way_out}." if way_out else ".")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, whatever its class."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None
    )


def shown_path(path: object) -> str:
    """A path as it is written, with escapes for what UTF-8 cannot write."""
    return " ".join(str(path).encode("utf-8", "backslashreplace").decode().split())
