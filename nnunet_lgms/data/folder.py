"""Any folder of images and one of masks or label maps, described so that they are converted as the paper's are."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_lgms.data.description import RGB, DatasetDescription
from nnunet_lgms.data.find import Case, Found, Problem, files_below
from nnunet_lgms.data.pictures import open_picture
from nnunet_lgms.data.splits import patient_splits
from nnunet_lgms.data.volumes import spacing_file
from nnunet_lgms.files import shown

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
STACKS = "Tiff3DIO"
READERS = {"NaturalImage2DIO": PICTURES, STACKS: (".tif", ".tiff")}
"""What a reader reads; all others read `VOLUMES`."""

NNUNET_CHANNEL = re.compile(r".+_\d{4}")
FIELDS = {"case": "(?P<case>.+)", "channel": "(?P<channel>[^/]+?)", "patient": "(?P<patient>.+?)", "*": "[^/]*"}


def describe(
    images: Path,
    *,
    title: str,
    labels: Sequence[str] = (),
    channels: Sequence[str] = (),
    reader: str | None = None,
    n_splits: int | None = None,
    patient: str | None = None,
) -> DatasetDescription:
    """A description made of what a user says, and of the first image where nothing is said.

    Args:
        images: folder of the images.
        title: of nnU-Net's folder, `Dataset101_TITLE`.
        labels: `NAME=VALUE` for what a label file holds, VALUE a number or a colour `#ff0000`, no background; they are
            numbered in this order. None: masks of flat images, one thing on black.
        channels: nnU-Net's channel names; None: colours for pictures in colour, else one.
        reader: nnU-Net's; None: by the ending of the files.
        n_splits: folds to write.
        patient: template of identifiers, such as `{patient}_frame*`: a patient's cases are in one part of a fold.

    Raises:
        ValueError: the folder has no images, or something is not as described here.
    """
    if not re.fullmatch(r"[A-Za-z0-9]\w*", title, re.ASCII):
        raise ValueError(f"--name {shown(title)} cannot be a folder of nnU-Net: use letters, digits and underscores.")
    if not images.is_dir():
        raise ValueError(f"The folder of images {images} does not exist.")
    files = sorted(files_below(images))
    ending = _usual_ending(images, files, reader)
    flat = reader == "NaturalImage2DIO" if reader else ending in PICTURES and not _is_stack(images, files, ending)
    values = _label_values(labels)
    if not flat and not values:
        raise ValueError("Volumes need --labels, such as --labels liver=1 tumour=2: no value is guessed.")
    if not channels:
        first = next(path for path in files if path.name.lower().endswith(ending))
        channels = RGB if flat and _is_coloured(first) else ("ultrasound",) if flat else ()
    if not channels:
        raise ValueError(
            "Volumes need --channels, such as --channels CT, or --channels T1 T2: it chooses how nnU-Net normalises."
        )
    names = {name: i for i, name in enumerate(values, start=1)} or {"foreground": 1}
    return DatasetDescription(
        name="folder",
        title=title,
        layouts=(),
        channel_names=tuple(channels),
        labels={"background": 0, **names},
        label_of={0: 0, **{value: names[name] for name, value in values.items()}} if values else None,
        published_cases=(),
        reference="",
        licence="as its source says",
        kind="image" if flat else "volume",
        volume_ending=ending,
        reader=reader or ("NaturalImage2DIO" if flat else _reader_of(ending)),
        deep=True,
        paper_splits=partial(patient_splits, n_splits=n_splits or 5, patient=patient and template(patient)),
    )


def find_pairs(
    description: DatasetDescription,
    images: Path,
    masks: Path,
    image_names: str | None = None,
    mask_names: str | None = None,
) -> Found:
    """Pair the files of two folders by their names.

    Args:
        description: of `describe`.
        images: folder of the images.
        masks: folder of the masks; it may be the same, if names tell them apart.
        image_names: template such as `{case}_{channel}.nii.gz`, for paths below the folder; `*` stands for anything.
        mask_names: the same, `{case}_seg.nii.gz`. Without templates an image's name must be a part of its mask's, with
            the same text before and behind it for all (`case1.png`, `case1_mask.png`).

    Raises:
        ValueError: a template is none, nothing fits, or two images would be one.
    """
    if not masks.is_dir():
        raise ValueError(f"The folder of masks {masks} does not exist.")
    endings = PICTURES if description.kind == "image" else (description.volume_ending,)
    found_images = _files(images, endings)
    found_masks = _files(masks, (*endings, ".nii", ".nii.gz") if ".nii" in description.volume_ending else endings)
    channels, unfit = _grouped(found_images, image_names or "{case}")
    if image_names is None and all(map(NNUNET_CHANNEL.fullmatch, found_images)):  # tr_0001 may be a case as well
        as_channels, _ = _grouped(found_images, "{case}_{channel}")
        if _n_pairs(as_channels, found_masks) > _n_pairs(channels, found_masks):
            channels = as_channels
    mask_pattern = template(mask_names, "--mask-names") if mask_names else _usual_affixes(channels, found_masks)
    of_case: dict[str, list[Path]] = defaultdict(list)
    strangers = {}
    for name, path in found_masks.items():
        if match := mask_pattern.fullmatch(_as_named(name, path, mask_names or "")):
            of_case[match["case"]].append(path)
        else:
            strangers[name] = path
    if images.resolve() == masks.resolve():  # what is no image is a mask there, and the other way round
        of_images = {path for files in channels.values() for path in files.values()}
        of_masks = {path for files in of_case.values() for path in files}
        unfit = {name: path for name, path in unfit.items() if path not in of_masks}
        strangers = {name: path for name, path in strangers.items() if path not in of_images | set(unfit.values())}
    problems = [Problem(n, f"the image {p} does not fit --image-names {shown(image_names)}") for n, p in unfit.items()]
    problems += [Problem(name, f"the mask {path} has no image of its name") for name, path in strangers.items()]
    taken = set(found_images.values()) | set(found_masks.values())
    others = [path for path in sorted(files_below(images)) if path not in taken]
    volumes = VOLUMES if description.kind == "volume" else ()
    for path in others:
        if path.name.lower().endswith(volumes):
            said = f"the image {path} is of another format than most, which end in {description.volume_ending}"
            problems.append(Problem(path.name, said))
    remarks = []
    known = (*volumes, ".json") if description.reader == STACKS else volumes
    if left := [path for path in others if not path.name.lower().endswith(known)]:
        remarks.append(
            f"{len(left)} file(s) in {images} are no images of this kind and were left out, such as {left[0]}."
        )
    if not channels.keys() & of_case.keys():
        raise ValueError(
            f"No image in {images} and mask in {masks} belong together by name, such as "
            f"{next(iter(found_images.values())).name} and {next(iter(found_masks.values())).name}: say how with "
            "--image-names '{case}.png' and --mask-names '{case}_mask.png'."
        )
    return _as_found(description, channels, of_case, problems, remarks)


def _as_found(
    description: DatasetDescription,
    channels: dict[str, dict[str, Path]],
    masks: dict[str, list[Path]],
    problems: list[Problem],
    remarks: list[str],
) -> Found:
    usual = Counter(tuple(sorted(files)) for files in channels.values()).most_common(1)[0][0]
    cases: dict[str, Case] = {}
    for key in sorted(channels.keys() | masks.keys()):
        identifier = description.identify(key)
        files = [path for _, path in sorted(channels.get(key, {}).items())]
        if not identifier:
            problems.append(Problem(key, "its name has no letter and no digit, of which nnU-Net's name could be made"))
        elif not files:
            problems.append(Problem(identifier, f"the mask {masks[key][0]} has no image"))
        elif identifier in cases:
            problems.append(Problem(identifier, f"{files[0]} and {cases[identifier].image} would get the same name"))
        else:
            if tuple(sorted(channels[key])) != usual:
                said = "has the channel(s) " + ", ".join(sorted(channels[key])) + ", others have " + ", ".join(usual)
                problems.append(Problem(identifier, f"the image {files[0]} {said}"))
            if key not in masks:
                problems.append(Problem(identifier, f"the image {files[0]} has no mask"))
            of_case = tuple(masks.get(key, ()))
            cases[identifier] = Case(
                identifier, files[0], of_case, tuple(files[1:]), _spacing(description, files, of_case)
            )
    ordered = tuple(cases[identifier] for identifier in sorted(cases))
    if description.reader == STACKS:
        without = [case for case in ordered if case.spacing is None]
        hint = 'a JSON file beside it, NAME.json with {"spacing": [z, y, x]} in mm'
        if len(without) == len(ordered):
            remarks.append(f"no stack has a spacing, so that a voxel counts as 1 mm; {hint}, gives one.")
        else:
            problems += [
                Problem(c.identifier, f"the stack {c.image} has no spacing, as others have: {hint}") for c in without
            ]
    return Found(None, ordered, tuple(problems), tuple(remarks))


def _spacing(description: DatasetDescription, images: Sequence[Path], masks: Sequence[Path]) -> Path | None:
    """The file with the spacing of a TIFF stack, of its image or else of its labels."""
    if description.reader != STACKS:
        return None
    return next(filter(None, map(spacing_file, (*images, *masks))), None)


def template(text: str, option: str = "--patient") -> re.Pattern[str]:
    """A pattern from a name with fields: "{case}_{channel}.nii.gz", "{patient}_*".

    Raises:
        ValueError: it has no field, or one that is not known.
    """
    parts = re.split(r"(\{[^}]*\}|\*)", text)
    pattern, fields = "", set()
    for part in parts:
        field = part.strip("{}")
        if part.startswith("{") and field not in FIELDS:
            raise ValueError(f"{option} {shown(text)} has {part}: there are {{case}}, {{channel}}, {{patient}} and *.")
        if part.startswith("{") and field in fields:
            pattern += f"(?P={field})"
        else:
            pattern += FIELDS[field] if part and field in FIELDS and part != field or part == "*" else re.escape(part)
        fields.add(field)
    wanted = "patient" if option == "--patient" else "case"
    if wanted not in fields:
        raise ValueError(f"{option} {shown(text)} has no {{{wanted}}}: write the part of the name that tells it.")
    return re.compile(pattern, re.IGNORECASE)


def _files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Path below the folder without its ending → file, for files of these endings.

    Raises:
        ValueError: there is none.
    """
    longest = sorted(endings, key=len, reverse=True)
    found: dict[str, Path] = {}
    for path in sorted(files_below(folder)):
        if ending := next((e for e in longest if path.name.lower().endswith(e)), None):
            name = path.relative_to(folder).as_posix()[: -len(ending)]
            if name in found:
                raise ValueError(f"{found[name]} and {path} have one name: remove one of them.")
            found[name] = path
    if not found:
        raise ValueError(f"{folder} has no file that ends in {', '.join(endings)}.")
    return found


def _grouped(images: dict[str, Path], names: str) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Case → channel → file, and the files that do not fit the template.

    Raises:
        ValueError: two files are one by the template.
    """
    pattern = template(names, "--image-names")
    channels: dict[str, dict[str, Path]] = defaultdict(dict)
    unfit = {}
    for name, path in images.items():
        if match := pattern.fullmatch(_as_named(name, path, names)):
            of_case, channel = channels[match["case"]], match.groupdict().get("channel", "")
            if channel in of_case:
                raise ValueError(
                    f"--image-names {shown(names)} makes one image of {of_case[channel]} and {path}: tell them apart."
                )
            of_case[channel] = path
        else:
            unfit[name] = path
    return dict(channels), unfit


def _n_pairs(images: dict[str, dict[str, Path]], masks: dict[str, Path]) -> int:
    pattern = _usual_affixes(images, masks)
    return sum(match["case"] in images for match in map(pattern.fullmatch, masks) if match)


def _as_named(name: str, path: Path, names: str) -> str:
    """With the ending, where the template has one."""
    return name + path.name[len(Path(name).name) :] if "." in Path(names).name else name


def _usual_affixes(images: dict[str, dict[str, Path]], masks: dict[str, Path]) -> re.Pattern[str]:
    """What stands before and behind an image's name in its mask's: what most masks agree on, the shortest of these."""
    by_affixes: Counter[tuple[str, str]] = Counter()
    keys = {key for key in images}
    for name in list(masks)[:200]:
        for start in range(len(name)):
            for end in range(len(name), start, -1):
                if name[start:end] in keys:
                    by_affixes[name[:start], name[end:]] += 1
    if not by_affixes:
        return re.compile("(?P<case>.+)")
    before, behind = max(by_affixes, key=lambda pair: (by_affixes[pair], -len(pair[0] + pair[1])))
    return re.compile(f"{re.escape(before)}(?P<case>.+){re.escape(behind)}")


def _label_values(words: Sequence[str]) -> dict[str, int | tuple[int, int, int]]:
    """Name → value or colour.

    Raises:
        ValueError: a word is none, or a name or a value comes twice.
    """
    values: dict[str, int | tuple[int, int, int]] = {}
    for name, value in map(_label, words):
        if name in values:
            raise ValueError(f"--labels names {name} twice: give every label one name and one value.")
        if same := next((other for other in values if values[other] == value), None):
            given = words[len(values)].rpartition("=")[2]
            raise ValueError(
                f"--labels gives {same} and {name} the same value, {given}: each label needs a value of its own."
            )
        values[name] = value
    return values


def _label(word: str) -> tuple[str, int | tuple[int, int, int]]:
    name, _, value = word.rpartition("=")
    if colour := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", value):
        value = tuple(int(channel, 16) for channel in colour.groups())
    elif value.isdecimal() and 0 < int(value) < 2**16:
        value = int(value)
    else:
        value = None
    if not name or value is None or name.casefold() == "background":
        raise ValueError(f"--labels {shown(word)} is not understood: write liver=1, or cup=128, or lesion=#ff0000.")
    return name, value


def _usual_ending(folder: Path, files: Sequence[Path], reader: str | None) -> str:
    known = READERS.get(reader, VOLUMES) if reader else (*VOLUMES, *PICTURES)
    ordered = sorted(known, key=len, reverse=True)
    counts = Counter(next((e for e in ordered if path.name.lower().endswith(e)), None) for path in files)
    counts.pop(None, None)
    if not counts:
        raise ValueError(f"{folder} has no images: expected files that end in {', '.join(known)}.")
    return counts.most_common(1)[0][0]


def _is_stack(folder: Path, files: Sequence[Path], ending: str) -> bool:
    """Whether TIFF files are volumes: many pages, none of which is a colour."""
    if ending not in (".tif", ".tiff"):
        return False
    import tifffile

    first = next(path for path in files if path.name.lower().endswith(ending))
    try:
        return tifffile.imread(first).ndim == 3 and tifffile.TiffFile(first).pages[0].ndim == 2
    except Exception:  # inspected later, with a sentence for it
        return False


def _is_coloured(path: Path) -> bool:
    try:
        image = np.asarray(open_picture(path, deep=True).convert("RGB")).astype(np.int16)
    except ValueError:
        return False  # inspected later
    return bool((image.max(axis=-1) - image.min(axis=-1)).max() > 16)


def _reader_of(ending: str) -> str:
    if ending in READERS[STACKS]:
        return STACKS
    from nnunet_lgms.nnunet_files import Reader

    return Reader(ending).class_name


def common_title(images: Path) -> str:
    """A name from the folder: of `…/ACDC/images` it is ACDC."""
    generic = {"images", "image", "img", "imagestr", "data", "input"}
    resolved = Path(os.path.abspath(images))
    name = resolved.name if resolved.name.casefold() not in generic else resolved.parent.name
    return re.sub(r"\W+", "", name) or "Folder"
