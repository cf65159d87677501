"""Names and labels that others wrote, in plans, descriptions and exported models, before anything is built on them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from nnunet_lgms.files import shown

MAX_LABEL = 2**15 - 1  # nnU-Net keeps segmentations as int16
LONGEST = 200
TURNS = ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # Unicode's marks that reverse what follows
#: what may be a file's or folder's name on its own, and leads nowhere else
FILE_NAME = re.compile(rf"[^-./\\][^/\\]{{0,{LONGEST - 1}}}")
DATASET_NAME = re.compile(rf"Dataset[0-9]{{3,9}}_[^/\\]{{1,{LONGEST - 20}}}")
FILE_ENDING = re.compile(r"(\.[A-Za-z0-9]+)+")
FILE_NAME_ALLOWED = (
    f"a plain name of up to {LONGEST} characters, without folders and not beginning with '.' or '-', and on Windows "
    "none that it refuses"
)
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


def is_text(value: Any) -> bool:
    """Whether it is a line of text that acts on no terminal and that UTF-8 can write.

    No control characters, ends of lines, turns of the direction, or halves of what are two characters in UTF-16.
    """
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST
        and not any(
            unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in TURNS for c in value
        )
    )


def is_file_name(value: Any) -> bool:
    """Whether it is one part of a path, as names of data sets, plans, configurations and trainers become."""
    return is_text(value) and FILE_NAME.fullmatch(value) is not None and _is_for_this_system(value)


def is_dataset_name(value: Any) -> bool:
    """Whether nnU-Net would call a data set so: ``Dataset004_Hippocampus``."""
    return is_text(value) and DATASET_NAME.fullmatch(value) is not None and _is_for_this_system(value)


def _is_for_this_system(name: str) -> bool:
    return os.name != "nt" or not windows_refuses(name)


def windows_refuses(name: str) -> bool:
    """Whether Windows takes the name of a file for a device (``NUL``, ``con.png``), changes it, or refuses it."""
    device = name.split(".")[0].rstrip(" ").lower() in DEVICES
    return device or name[-1:] in (".", " ") or any(c in '<>:"|?*' for c in name)


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in capitals only, which Windows and macOS take for one."""
    first: dict[str, str] = {}
    return [(other, name) for name in names if (other := first.setdefault(name.casefold(), name)) != name]


def check_plans_names(plans: Mapping[str, Any], where: str) -> None:
    """The names in a plans file, of which nnU-Net and this package make paths, lead nowhere else.

    Args:
        plans: content of the file.
        where: what the message calls it.

    Raises:
        ValueError: one is not there, or is no plain name.
    """
    dataset = plans.get("dataset_name")
    if not is_dataset_name(dataset):
        raise ValueError(f"{where} has the dataset_name {shown(dataset)}: it must be such as Dataset004_Hippocampus.")
    named = {"plans_name": plans.get("plans_name")}
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping) or not configurations:
        raise ValueError(f"{where} has no configurations: it is no plans file of nnU-Net's.")
    for name, content in configurations.items():
        named[f"configuration {shown(name)}"] = name
        for key in ("data_identifier", "previous_stage", "inherits_from"):
            if isinstance(content, Mapping) and content.get(key) is not None:
                named[f"{key} of {shown(name)}"] = content[key]
    for what, name in named.items():
        if not is_file_name(name):
            raise ValueError(f"{where} has the {what} {shown(name)}: it must be {FILE_NAME_ALLOWED}.")
