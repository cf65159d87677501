"""Files that are either there as a whole or not at all, and JSON files that others wrote."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# No file of ours or of nnU-Net's comes near it, and walking through what does would exhaust Python's stack.
DEEPEST_JSON = 64

#: refusals that only writing meets; the system names no file with them
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to, which then takes its place.

    If writing fails, for a full disk say, the temporary file is removed and `path` keeps what it was.

    Example::

        with atomic_write(Path("summary.json")) as temporary:
            temporary.write_text("{}")
    """
    # The ending is kept, because some libraries choose the format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # nobody knows the temporary name
        if error.filename == str(temporary) or error.filename is None and error.errno in NO_ROOM:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):  # Windows removes no file that is open, as it may be after an error, which counts more
            temporary.unlink(missing_ok=True)


def ignores_case(folder: Path) -> bool:
    """Whether ``Case_1`` and ``case_1`` are one file in a folder, as on most disks of Windows and macOS.

    Args:
        folder: it, or the nearest of its parents that is there, is asked by a temporary file.

    Raises:
        OSError: nothing can be written there.
    """
    there = next(f for f in (folder, *folder.absolute().parents) if f.is_dir())
    with tempfile.NamedTemporaryFile(prefix=".Case_", dir=there) as file:
        path = Path(file.name)
        return path.with_name(path.name.swapcase()).exists()


def check_utf8(name: object, what: str = "file") -> None:
    """A name is UTF-8, as everything that tables, JSON files and messages hold.

    Raises:
        ValueError: it is not; one sentence that shows its bytes.
    """
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise ValueError(f"The {what} {os.fsencode(str(name))!r} is not UTF-8: rename it.") from None


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files of a folder with that ending, sorted, but for hidden ones such as ``._case.png``.

    Raises:
        ValueError: the name of one is not UTF-8.
        OSError: the folder cannot be read.
    """
    found = sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.name[0] != ".")
    for path in found:
        check_utf8(path)
    return found


def read_json(path: Path, *, keys_once: bool = False) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        keys_once: refuse a table with the same key twice, of which the last would be taken without a word.

    Raises:
        ValueError: the file is not JSON, or is nested more than ``DEEPEST_JSON`` deep, or has a key twice; one
            sentence.
        OSError: it cannot be read.
    """
    twice: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return dict(pairs)

    try:
        content = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=table)
    except RecursionError:
        raise ValueError(_too_deep(path)) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): correct it, or write it anew.") from None
    if keys_once and twice:
        raise ValueError(f"{path} has the key {shown(twice[0])} more than once in one table: keep one of them.")
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [item for value in level for item in _items(value)]
        if not level:
            return content
    raise ValueError(_too_deep(path))


def shown(value: Any, longest: int = 80) -> str:
    """``repr`` of what somebody else wrote, cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def one_line(text: object, longest: int = 300) -> str:
    """What a library said, on one line. A long text ends at a word's end, and one that names a path is kept longer.

    Half a path names another file; paths have no blanks to speak of, so that whole words keep them whole.
    """
    line = " ".join(str(text).split())
    if "/" in line or "\\" in line:
        longest = max(longest, 1500)
    if len(line) <= longest:
        return line
    end = line.find(" ", longest)
    return line if end < 0 else f"{line[:end]} ..."


def _items(value: Any) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep(path: Path) -> str:
    return f"{path} is nested more than {DEEPEST_JSON} deep, which no file of nnU-Net's is: write it anew."
