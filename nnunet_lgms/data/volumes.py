"""Volumes: read as nnU-Net will, check, and copy unchanged, so that intensities and geometry stay the publisher's."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunet_lgms.arrays import check_values
from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.files import atomic_write, read_json, shown
from nnunet_lgms.nnunet_files import Grid, Reader


def inspect(case: Case, description: DatasetDescription) -> Inspection:
    """Read image and label of one case, as nnU-Net will, and say what is wrong with them."""
    reader, problems = Reader(description.file_ending, description.reader), []
    grid, digest = None, hashlib.blake2b(digest_size=16)
    spacing = None
    if case.spacing:
        try:
            spacing = read_spacing(case.spacing)
        except ValueError as error:
            problems.append(str(error))
    for path in case.images:
        try:
            samples, place = reader.read_image(path)
            place = replace(place, spacing=spacing) if spacing else place
        except ValueError as error:
            problems.append(str(error))
            continue
        digest.update(str(samples.shape).encode())
        digest.update(np.ascontiguousarray(samples))
        try:
            check_values(samples, f"the image {path}")
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        if grid and (difference := grid.differences(place)):
            problems.append(f"the images {case.image} and {path} have different {difference}")
        grid = grid or place
        n_channels = len(samples) if not case.channels else 1 + len(case.channels)
        if n_channels != len(description.channel_names) or case.channels and len(samples) != 1:
            problems.append(f"{path} has {n_channels} channel(s), expected {', '.join(description.channel_names)}")
    readable = grid is not None and not any("cannot be read" in problem for problem in problems)
    present: list[int] = []
    if len(case.masks) != 1:
        problems.append(f"expected one label file, found {len(case.masks)}")
    else:
        found, present = _inspect_label(case.masks[0], grid, description, reader, spacing)
        problems += found
    label_of = description.label_of or {}
    return Inspection(
        tuple(problems),
        digest.hexdigest() if readable else None,
        empty=bool(present) and not any(present),
        full=bool(present) and 0 not in present,
        labels=frozenset(label_of.get(value, value) for value in present),
    )


def spacing_file(stack: Path) -> Path | None:
    """The JSON file with the spacing of a TIFF stack: ``CASE.json`` beside ``CASE.tif``, or ``CASE_0000.tif``."""
    name = stack.name.rpartition(".")[0]
    names = [name, name[:-5]] if re.fullmatch(r".+_\d{4}", name) else [name]
    return next((file for n in names if (file := stack.with_name(f"{n}.json")).is_file()), None)


def read_spacing(file: Path) -> tuple[float, ...]:
    """What ``{"spacing": [z, y, x]}`` says, in mm.

    Raises:
        ValueError: it is not that.
    """
    content = read_json(file)
    spacing = content.get("spacing") if isinstance(content, dict) else None
    if not isinstance(spacing, list) or len(spacing) != 3 or not all(map(_is_mm, spacing)):
        raise ValueError(f'{file} has the spacing {shown(spacing)}: expected {{"spacing": [z, y, x]}} above 0, in mm')
    return tuple(map(float, spacing))


def _is_mm(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _inspect_label(
    path: Path, image: Grid | None, description: DatasetDescription, reader: Reader, spacing: tuple[float, ...] | None
) -> tuple[list[str], list[int]]:
    """What is wrong with a label file, and its values."""
    try:
        label = reader.read_labels(path)
    except ValueError as error:
        return [str(error)], []
    problems = []
    place = replace(label.grid, spacing=spacing) if spacing and not spacing_file(path) else label.grid
    if image and (difference := image.differences(place)):
        problems.append(f"image and label {path} have different {difference}")
    allowed = sorted(description.label_of or description.label_values)
    present = np.unique(label.labels).tolist()
    if unknown := [value for value in present if value not in allowed]:
        problems.append(
            f"the label file {path} has the value(s) {', '.join(map(str, unknown))}, "
            f"allowed are {', '.join(map(str, allowed))}"
        )
    return problems, present


def write(
    case: Case, description: DatasetDescription, image_files: Sequence[Path], label_file: Path, size: int | None
) -> None:
    """Copy one checked case; a label file is only written anew if its values are to be others.

    Raises:
        ValueError: a size is given.
    """
    if size is not None:
        raise ValueError(
            f"--size {size} is for flat images; {description.title} holds volumes, which nnU-Net resamples."
        )
    if case.spacing:  # before the files that tell whether a case is there
        for folder in (image_files[0].parent, label_file.parent):
            with atomic_write(folder / f"{case.identifier}.json") as temporary:
                temporary.write_text(json.dumps({"spacing": read_spacing(case.spacing)}) + "\n", "utf-8")
    for source, path in zip(case.images, image_files, strict=True):
        _copy(source, path)
    if any(value != label for value, label in (description.label_of or {}).items()):
        with atomic_write(label_file) as temporary:
            Reader(description.file_ending, description.reader).rewrite_labels(
                case.masks[0], temporary, description.label_of
            )
    else:
        _copy(case.masks[0], label_file)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        compressed = source.name.lower().endswith(".gz")
        if target.name.endswith(".gz") and not compressed:
            with source.open("rb") as file, gzip.open(temporary, "wb") as packed:
                shutil.copyfileobj(file, packed)
        elif compressed and not target.name.endswith(".gz"):
            with gzip.open(source) as packed, temporary.open("wb") as file:
                shutil.copyfileobj(packed, file)
        else:
            shutil.copyfile(source, temporary)
