"""Files that are either there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to, which then takes its place.

    If writing fails, for a full disk say, the temporary file is removed and `path` keeps what it was.

    Example::

        with written_whole(Path("summary.json")) as temporary:
            temporary.write_text("{}")
    """
    # The ending is kept, because some libraries choose the format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
