"""nnU-Net's names of image files, a file a channel: `CASE_0000.nii.gz`, `CASE_0001.nii.gz`, …"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_lgms.sentences import shown_path

#: of image files, in small letters; a folder is not called so by anybody who means a folder
IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".hdr", ".gipl", ".dcm")
IMAGE_ENDINGS += (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
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


def images_left_out(folder: Path, ending: str) -> str:
    """A sentence about files that look like images and are none to a model, for their names; "" if there are none.

    Args:
        folder: that a model is to predict.
        ending: of the model's files.
    """
    endings = sorted({*IMAGE_ENDINGS, ending.lower()}, key=len, reverse=True)
    left_out = [
        (file.name, own)
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and (own := next((own for own in endings if file.name.lower().endswith(own)), None))
        and not re.fullmatch(rf".+_\d{{4}}{re.escape(ending)}", file.name)
        and file.is_file()
    ]
    if not left_out:
        return ""
    name, own = left_out[0]
    case = name[: -len(own)]
    wanted = f"{case if re.search(r'._[0-9]{4}$', case) else f'{case}_0000'}{ending}"
    verb = "rename" if own == ending.lower() else "convert"
    n = len(left_out)
    which = (
        f"{n} files of {shown_path(folder)} look like images and are"
        if n > 1
        else (f"1 file of {shown_path(folder)} looks like an image and is")
    )
    return (
        f"{which} left out, as this model takes CASE_0000{ending}, CASE_0001{ending}, …: for example, {verb} "
        f"{shown_path(name)} to {shown_path(wanted)}."
    )
