"""Find the pairs of image and mask files in a downloaded dataset."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nnunet_lgms.data.description import DatasetDescription, Layout
from nnunet_lgms.files import check_utf8


@dataclass(frozen=True)
class Case:
    """One image with the mask files that belong to it (empty if none was found).

    Args:
        identifier: nnU-Net's name of it.
        image: its file, of the first channel if there are several.
        masks: files that mark what is in it.
        channels: files of the second and further channels.
        spacing: a JSON file with the spacing of a TIFF stack, which has none of its own.
    """

    identifier: str
    image: Path
    masks: tuple[Path, ...]
    channels: tuple[Path, ...] = ()
    spacing: Path | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """The files of all channels, in order."""
        return (self.image, *self.channels)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the case is made from."""
        return (*self.images, *self.masks, *([self.spacing] if self.spacing else []))


@dataclass(frozen=True, order=True)
class Problem:
    """Something that keeps a case from being converted."""

    identifier: str
    text: str

    def __str__(self) -> str:
        return f"{self.identifier}: {self.text}"


@dataclass(frozen=True)
class Found:
    """All cases of a source folder, in order of their identifiers, what is wrong with it, and what is worth a word."""

    layout: Layout | None
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    remarks: tuple[str, ...] = ()


def find_cases(description: DatasetDescription, source: Path, wanted_groups: Iterable[str] = ()) -> Found:
    """Pair images and masks below `source`, which may be the dataset's folder or any folder above it.

    Args:
        description: what to look for.
        source: where to look.
        wanted_groups: keys of `description.left_out` that are to be converted too.

    Raises:
        ValueError: `source` is no folder, or holds no pair of a known layout.
    """
    if not source.is_dir():
        reason = "is a file; unpack it and give the folder" if source.exists() else "does not exist"
        raise ValueError(f"The source {source} {reason}: {_expected(description)}")
    paths = sorted(files_below(source))
    matches = [_match(layout, source, paths) for layout in description.layouts]
    # An incomplete download must be reported as such, not as an unknown folder: take the layout that fits best.
    images, masks = max(matches, key=lambda m: (len(m[0].keys() & m[1].keys()), len(m[0])))
    layout = description.layouts[matches.index((images, masks))]
    if not images.keys() & masks.keys():
        raise ValueError(
            f"{source} does not look like {description.title}: {_expected(description)}, {_found(source, paths)} Pairs "
            "with other names: nnunet_lgms convert folder IMAGES MASKS --id N."
        )
    return _pair(description, layout, images, masks, wanted_groups)


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """All files but hidden ones, through links too; a link to a folder that the walk is in would have no end."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for path in folder.iterdir():
        if path.name.startswith((".", "__MACOSX")):
            continue
        if path.is_dir():
            yield from files_below(path, above | {here})
        elif path.is_file():
            yield path


Matches = tuple[dict[str, list[Path]], dict[str, list[Path]]]


def _match(layout: Layout, source: Path, paths: Iterable[Path]) -> Matches:
    """Images and masks by case. The source folder's own name takes part in the match."""
    images: dict[str, list[Path]] = defaultdict(list)
    masks: dict[str, list[Path]] = defaultdict(list)
    above = source.resolve().name
    for path in paths:
        name = f"{above}/{path.relative_to(source).as_posix()}"
        for pattern, found in ((layout.image_pattern, images), (layout.mask_pattern, masks)):
            if match := pattern.fullmatch(name):
                check_utf8(path)
                found[match["case"]].append(path)
    return dict(images), dict(masks)


def _pair(
    description: DatasetDescription,
    layout: Layout,
    images: dict[str, list[Path]],
    masks: dict[str, list[Path]],
    wanted_groups: Iterable[str],
) -> Found:
    unwanted = [pattern for group, pattern in description.left_out.items() if group not in set(wanted_groups)]
    cases: dict[str, Case] = {}
    problems: list[Problem] = []
    for key in sorted(images.keys() | masks.keys()):
        if any(_belongs(pattern, key) for pattern in unwanted):
            continue
        identifier = description.identify(key)
        if not identifier:
            problems.append(Problem(key, "its name has no letter and no digit, of which nnU-Net's name could be made"))
            continue
        if key not in images:
            problems.append(Problem(identifier, f"the mask {masks[key][0]} has no image"))
            continue
        image = images[key][0]
        if len(images[key]) > 1:
            problems.append(Problem(identifier, f"the image is there twice, {image} and {images[key][1]}"))
        if identifier in cases:
            problems.append(Problem(identifier, f"{image} and {cases[identifier].image} would get the same name"))
        names = [mask.name for mask in masks.get(key, ())]
        if len(names) != len(set(names)):
            problems.append(Problem(identifier, f"the mask {names[0]} is there twice, below different folders"))
        if not names:
            problems.append(Problem(identifier, f"the image {image} has no mask"))
        cases.setdefault(identifier, Case(identifier, image, tuple(masks.get(key, ()))))
    return Found(layout, tuple(cases[identifier] for identifier in sorted(cases)), tuple(problems))


def _belongs(pattern: str, key: str) -> bool:
    return re.match(pattern, key, re.IGNORECASE) is not None


def _expected(description: DatasetDescription) -> str:
    return "expected " + ", or ".join(str(layout) for layout in description.layouts)


def _found(source: Path, paths: list[Path], n_examples: int = 4) -> str:
    if not paths:
        return "found no file at all."
    examples = ", ".join(path.relative_to(source).as_posix() for path in paths[:n_examples])
    return f"found {len(paths)} file(s), such as {examples}."
