"""Turn a downloaded dataset into an nnU-Net raw dataset: find, check everything, then write."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_lgms.data import natural_images, volumes
from nnunet_lgms.data.description import DatasetDescription
from nnunet_lgms.data.find import Case, Found, Problem, find_cases
from nnunet_lgms.data.inspection import Inspection
from nnunet_lgms.data.splits import Split, check_splits
from nnunet_lgms.files import atomic_write, ignores_case, read_json
from nnunet_lgms.locks import locked
from nnunet_lgms.names import alike, windows_refuses
from nnunet_lgms.parallel import default_workers, parallel_map

_FORMATS = {"image": natural_images, "volume": volumes}
_RECORD = "conversion.json"
_REMARKS = {
    "empty": "have an empty mask",
    "full": "have a mask that marks the whole picture",
    "turned": "say that they are to be turned (EXIF orientation), image and mask were turned as viewers show them",
}


@dataclass(frozen=True)
class Settings:
    """What decides the content of a converted dataset. An interrupted conversion goes on if these are the same.

    Args:
        name: the dataset's name, `busi`.
        source: the folder that was converted.
        groups: groups of cases that are usually left out and are wanted here.
        size: height and width in pixels that flat images are resized to; None keeps their own.
        skip_bad: leave out what cannot be converted.
        options: what else was said, of folders of one's own.
    """

    name: str
    source: str
    groups: tuple[str, ...] = ()
    size: int | None = None
    skip_bad: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Args:
        folder: the nnU-Net raw dataset.
        identifiers: its cases, sorted.
        skipped: what was left out, and why.
        remarks: sentences that the user should read.
    """

    folder: Path
    identifiers: tuple[str, ...]
    skipped: tuple[Problem, ...]
    remarks: tuple[str, ...]


def convert(
    description: DatasetDescription,
    source: Path,
    dataset_id: int,
    *,
    raw: Path,
    groups: Iterable[str] = (),
    size: int | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    wait: bool = False,
    find: Callable[[], Found] | None = None,
    options: Sequence[str] = (),
    splits_in: Path | None = None,
) -> Conversion:
    """Convert one dataset to `raw/DatasetXXX_Title`.

    All pairs are read and checked before the first byte is written. The dataset grows in a hidden folder beside its
    final place, is verified there by nnU-Net's own integrity check, and is then renamed. An interrupted conversion goes
    on where it stopped; one that fails leaves nothing behind.

    Args:
        description: which dataset.
        source: folder of the download, or one above it.
        dataset_id: nnU-Net's number of the dataset, 1 to 999.
        raw: nnU-Net's `nnUNet_raw` folder.
        groups: keys of `description.left_out` to convert as well.
        size: resize flat images to this height and width, in pixels.
        skip_bad: convert the rest if something is wrong with some pairs.
        workers: number of processes; default: one per core, at most 8.
        wait: let another conversion to this number end first, instead of refusing.
        find: finds the pairs; default: those of the description's layouts below `source`.
        options: what `find` and the description hang on, beside their names; written down with the settings.
        splits_in: nnU-Net's `nnUNet_preprocessed` folder, where `write_splits` is to follow: that it can is seen first.

    Raises:
        ValueError: the source is not this dataset, pairs are faulty (they are listed on stderr), the number is taken,
            nnU-Net's check fails, there can be no such splits, or another conversion to this number is running.
        OSError: the disk is full or not writable.
    """
    workers = workers or default_workers()
    with locked(raw / f".Dataset{dataset_id:03d}.lock", f"conversion to dataset {dataset_id}", wait=wait):
        ahead = prospect(
            description,
            source,
            dataset_id,
            raw=raw,
            groups=groups,
            size=size,
            skip_bad=skip_bad,
            find=find,
            options=options,
        )
        return ahead if isinstance(ahead, Conversion) else _convert(description, source, ahead, workers, splits_in)


@dataclass(frozen=True)
class Prospect:
    """A conversion that is still to be made.

    Args:
        folder: where to.
        settings: what decides its content.
        found: the pairs.
        files: digest of their names, sizes and times.
    """

    folder: Path
    settings: Settings
    found: Found
    files: str


def prospect(
    description: DatasetDescription,
    source: Path,
    dataset_id: int,
    *,
    raw: Path,
    groups: Iterable[str] = (),
    size: int | None = None,
    skip_bad: bool = False,
    find: Callable[[], Found] | None = None,
    options: Sequence[str] = (),
) -> Prospect | Conversion:
    """What `convert` does before it reads an image; the arguments are the same.

    Returns:
        What is to be converted; the finished conversion where it was made before, with the same settings.

    Raises:
        ValueError: the source is not this dataset, the number is taken, or the dataset is there and was made otherwise.
    """
    if size is not None and description.kind != "image":
        raise ValueError(
            f"--size {size} is for flat images; {description.title} holds volumes, which nnU-Net resamples."
        )
    if unknown := set(groups) - set(description.left_out):
        raise ValueError(f"{description.title} has no group {sorted(unknown)[0]!r} that could be included.")
    settings = Settings(description.name, str(source.resolve()), tuple(sorted(groups)), size, skip_bad, tuple(options))
    folder = _target(raw, dataset_id, description)
    if folder.exists() and not source.exists():  # nothing to compare with
        return _already_there(folder, settings, None)
    found = find() if find else find_cases(description, source, settings.groups)
    files = _digest_of_files(found.cases)
    return _already_there(folder, settings, files) if folder.exists() else Prospect(folder, settings, found, files)


def _convert(
    description: DatasetDescription, source: Path, ahead: Prospect, workers: int, splits_in: Path | None
) -> Conversion:
    folder, settings, files = ahead.folder, ahead.settings, ahead.files
    cases, problems, remarks = _checked_cases(description, ahead.found, workers)
    on_disk, remark = _names_on_disk([case.identifier for case in cases], folder.parent)
    problems, remarks = sorted([*problems, *on_disk]), [*remarks, *remark]
    if problems and not settings.skip_bad:
        print(_listing(problems), file=sys.stderr)
        raise ValueError(
            f"{len({p.identifier for p in problems})} case(s) of {description.title} cannot be converted (listed "
            f"above), so nothing was written: repair them, or leave them out with --skip-bad."
        )
    bad = {problem.identifier for problem in problems}
    good = [case for case in cases if case.identifier not in bad]
    if not good:
        raise ValueError(f"No case of {description.title} in {source} can be converted.")
    if splits_in is not None:
        splits_to_write(description, [case.identifier for case in good], _splits_file(splits_in, folder))

    partial_folder = folder.with_name(f".{folder.name}.partial")
    _prepare(partial_folder, settings, files)
    try:
        task = partial(_write_case, description=description, folder=partial_folder, size=settings.size)
        parallel_map(task, good, workers, f"writing {folder.name}")
        _remove_strays(partial_folder, {case.identifier for case in good}, description.file_ending)
        _write_dataset_json(partial_folder, description, len(good))
        _verify(partial_folder, workers)
        result = Conversion(folder, tuple(case.identifier for case in good), tuple(problems), tuple(remarks))
        _write_record(partial_folder, settings, files, result)
        os.rename(partial_folder, folder)
    except ValueError:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        reason = error.strerror or str(error)
        raise OSError(
            f"{folder} could not be written ({reason}) and nothing of it remains: make room there, or set nnUNet_raw "
            f"to another disk, and run the command again."
        ) from error
    return result


def write_splits(description: DatasetDescription, conversion: Conversion, preprocessed: Path) -> Path:
    """Write the paper's folds to `preprocessed/DatasetXXX_Title/splits_final.json`, where nnU-Net looks for them.

    Raises:
        ValueError: a fold would be empty, or other splits are already there.
    """
    path = _splits_file(preprocessed, conversion.folder)
    splits = splits_to_write(description, conversion.identifiers, path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(splits, indent=2))
    return path


def _splits_file(preprocessed: Path, dataset: Path) -> Path:
    return preprocessed / dataset.name / "splits_final.json"


def splits_to_write(description: DatasetDescription, identifiers: Sequence[str], path: Path) -> list[Split]:
    """The paper's folds of these cases, for `path`.

    Raises:
        ValueError: a fold would be empty, or other splits are already there.
    """
    splits = description.paper_splits(identifiers)
    check_splits(splits, identifiers)
    if path.exists() and _content_of(path) != splits:
        raise ValueError(f"{path} holds other splits, which trained models may depend on: move it away first.")
    return splits


def splits_remark(description: DatasetDescription, conversion: Conversion) -> str | None:
    """Says so where the folds are not the paper's, because only some of the published cases were converted."""
    n = len(conversion.identifiers)
    if not description.published_cases or n in description.published_cases:
        return None
    published = " or ".join(map(str, description.published_cases))
    return (
        f"the paper's folds are of all {published} published cases, these are of {n}: results are not comparable with "
        "the paper's."
    )


def _target(raw: Path, dataset_id: int, description: DatasetDescription) -> Path:
    """The dataset's folder; nnU-Net wants every number to belong to one name."""
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"--id {dataset_id} is not possible: nnU-Net's dataset numbers are 1 to 999.")
    folder = raw / f"Dataset{dataset_id:03d}_{description.title}"
    taken = [other.name for other in raw.glob(f"Dataset{dataset_id:03d}_*") if other != folder]
    if taken:
        raise ValueError(f"--id {dataset_id} belongs to {taken[0]} already: choose another number.")
    return folder


def _digest_of_files(cases: Sequence[Case]) -> str:
    """Changes when a source file is added, taken away, or written anew."""
    digest = hashlib.sha256()
    for path in sorted(path for case in cases for path in case.files):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _already_there(folder: Path, settings: Settings, files: str | None) -> Conversion:
    record = _record_in(folder)
    if record.get("settings") != _as_json(settings) or "identifiers" not in record:
        raise ValueError(f"{folder} exists and was made otherwise: choose another --id, or remove that folder first.")
    if files is not None and record.get("files", files) != files:
        raise ValueError(
            f"{folder} was made from files of {settings.source} that are others now: remove that folder to convert "
            "them, or choose another --id."
        )
    skipped = tuple(Problem(**problem) for problem in record["skipped"])
    remarks = (f"{folder.name} was converted before with the same settings; it was left as it is.",)
    return Conversion(folder, tuple(record["identifiers"]), skipped, remarks)


def _checked_cases(
    description: DatasetDescription, found: Found, workers: int
) -> tuple[tuple[Case, ...], list[Problem], list[str]]:
    complete = [case for case in found.cases if case.masks]
    task = partial(_inspect, description=description)
    inspections = parallel_map(task, complete, workers, f"checking {description.title}")
    problems = list(found.problems)
    for case, inspection in zip(complete, inspections):
        problems += [Problem(case.identifier, text) for text in inspection.problems]
    problems += _duplicates(complete, inspections, description)

    remarks = list(found.remarks)
    if description.published_cases and len(found.cases) not in description.published_cases:
        published = " or ".join(str(n) for n in description.published_cases)
        remarks.append(f"{len(found.cases)} cases were found; {description.title} is published with {published}.")
    for kind, text in _REMARKS.items():
        if of_kind := [case.identifier for case, seen in zip(complete, inspections) if getattr(seen, kind)]:
            remarks.append(f"{len(of_kind)} case(s) {text}, such as {of_kind[0]}.")
    held = frozenset().union(*(seen.labels for seen in inspections))
    if absent := [name for name, value in description.labels.items() if value != 0 and not held & _values(value)]:
        remarks.append(
            f"no mask holds the label(s) {', '.join(absent)}: the network cannot learn them from these cases."
        )
    if description.note:
        remarks.append(description.note)
    return found.cases, sorted(problems), remarks


def _values(label: int | Sequence[int]) -> set[int]:
    """Of a label, or of a region."""
    return {label} if isinstance(label, int) else set(label)


def _names_on_disk(identifiers: Sequence[str], raw: Path) -> tuple[list[Problem], list[str]]:
    """Problems where two names, or one of Windows' own, would lose a case on this disk; a remark for others' disks."""
    refused = [name for name in identifiers if os.name == "nt" and windows_refuses(name)]
    problems = [Problem(name, "Windows keeps this name for a device, so rename the image and mask") for name in refused]
    pairs = alike(identifiers)
    if pairs and ignores_case(raw):
        return [
            *problems,
            *(Problem(b, f"differs from {a} in capitals only, and on this disk they are one file") for a, b in pairs),
        ], []
    said = "case(s) differ from another one in capitals only, such as"
    one_file = "on most disks of Windows and macOS these are one file"
    return problems, [f"{len(pairs)} {said} {pairs[0][1]} from {pairs[0][0]}: {one_file}."] if pairs else []


def _inspect(case: Case, description: DatasetDescription) -> Inspection:
    return _FORMATS[description.kind].inspect(case, description)


def _duplicates(
    cases: Sequence[Case], inspections: Sequence[Inspection], description: DatasetDescription
) -> list[Problem]:
    """The same image under two names would stand in training and in validation."""
    first: dict[str, Case] = {}
    problems = []
    for case, inspection in zip(cases, inspections):
        if inspection.digest is None:
            continue
        other = first.setdefault(inspection.digest, case)
        if other is not case and {case.identifier, other.identifier} not in description.known_duplicates:
            problems.append(Problem(case.identifier, f"{case.image} shows the same image as {other.image}"))
    return problems


def _listing(problems: Sequence[Problem]) -> str:
    return "\n".join(f"  {problem}" for problem in problems)


def _prepare(folder: Path, settings: Settings, files: str) -> None:
    """Keep what an interrupted conversion of the same files with the same settings wrote; start anew otherwise."""
    record = {"settings": _as_json(settings), "files": files}
    if folder.exists() and _record_in(folder) != record:
        shutil.rmtree(folder)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / _RECORD) as temporary:
        temporary.write_text(json.dumps(record))


def _record_in(folder: Path) -> dict[str, Any]:
    """What a conversion wrote down about itself, empty if it cannot be read."""
    content = _content_of(folder / _RECORD)
    return content if isinstance(content, dict) else {}


def _content_of(path: Path) -> Any:
    """Content of a JSON file, None if it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _as_json(settings: Settings) -> dict:
    """Settings as they come back from a JSON file, where tuples are lists."""
    content = {name: value for name, value in asdict(settings).items() if name != "options" or value}
    return json.loads(json.dumps(content))


def _write_case(case: Case, description: DatasetDescription, folder: Path, size: int | None) -> None:
    ending = description.file_ending
    names = [f"{case.identifier}_{channel:04d}{ending}" for channel in range(len(case.images))]
    image_files = [folder / "imagesTr" / name for name in names]
    label_file = folder / "labelsTr" / f"{case.identifier}{ending}"
    # Files appear under their names only when they are complete, so these are from an interrupted conversion.
    if not all(file.exists() for file in (*image_files, label_file)):
        _FORMATS[description.kind].write(case, description, image_files, label_file, size)


def _remove_strays(folder: Path, identifiers: set[str], file_ending: str) -> None:
    """Remove files of cases that an interrupted conversion took and this one does not, and what it was writing."""
    for name, tail in (("imagesTr", rf"_\d{{4}}{re.escape(file_ending)}"), ("labelsTr", re.escape(file_ending))):
        for path in (folder / name).iterdir():
            if re.sub(rf"({tail}|\.json)$", "", path.name) not in identifiers:
                path.unlink()
    for path in folder.iterdir():
        if path.is_file() and path.name != _RECORD:
            path.unlink()


def _write_dataset_json(folder: Path, description: DatasetDescription, n_cases: int) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    generate_dataset_json(
        str(folder),
        channel_names=dict(enumerate(description.channel_names)),
        labels=dict(description.labels),
        num_training_cases=n_cases,
        file_ending=description.file_ending,
        regions_class_order=description.regions_class_order,
        dataset_name=description.title,
        reference=description.reference,
        license=description.licence,
        converted_by="nnunet_lgms convert",
        overwrite_image_reader_writer=description.reader,
    )


def _verify(folder: Path, workers: int) -> None:
    """nnU-Net's `--verify_dataset_integrity`."""
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    try:
        verify_dataset_integrity(str(folder), workers)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"nnU-Net's integrity check refuses the converted dataset, which was removed: {error}"
        ) from error


def _write_record(folder: Path, settings: Settings, files: str, conversion: Conversion) -> None:
    record = {
        "settings": _as_json(settings),
        "files": files,
        "identifiers": list(conversion.identifiers),
        "skipped": [asdict(problem) for problem in conversion.skipped],
    }
    with atomic_write(folder / _RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2))
