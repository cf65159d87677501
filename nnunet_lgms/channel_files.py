"""nnU-Net's names of image files, a file a channel: `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, …"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

CHANNEL_FILE = re.compile(r"(?P<case>.+)_\d{4}(?P<ending>(\.\w+)+)")


def check_channel_files(case: str, files: Sequence[Path], ending: str) -> None:
    """The files of a case are its channels 0, 1, …, each once and in this order.

    Raises:
        ValueError: they are not; one sentence.
    """
    expected = [f"{case}_{channel:04d}{ending}" for channel in range(len(files))]
    if (given := [file.name for file in files]) != expected:
        raise ValueError(
            f"The channels of {case} are {', '.join(given)}, not {', '.join(expected)}: give every channel once, in "
            "the order of their numbers."
        )


def check_listed_channels(files: Sequence[Path], case: str | None = None) -> None:
    """As :func:`check_channel_files`, of files that somebody listed, whose names need not be nnU-Net's.

    A number counts as that of a channel where several files have one behind the same name, and where the case is called
    what stands before it. One file alone may otherwise be called `img_0001.png`.

    Args:
        files: one a channel.
        case: what it is called, if that is known.
    """
    matches = [CHANNEL_FILE.fullmatch(file.name) for file in files]
    names = {match and (match["case"], match["ending"]) for match in matches}
    if len(names) > 1 or None in names:
        return
    ((numbered, ending),) = names
    if len(files) > 1 or numbered == case:
        check_channel_files(numbered, files, ending)
