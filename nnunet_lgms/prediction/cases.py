"""The files of a list of cases: found, read, written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_lgms.arrays import check_values, is_flat
from nnunet_lgms.channel_files import check_listed_channels
from nnunet_lgms.dataset_json import channel_names
from nnunet_lgms.files import atomic_write, files_in, ignores_case, one_line
from nnunet_lgms.image_files import check_image_file, check_orientation
from nnunet_lgms.names import alike
from nnunet_lgms.nnunet_files import WITHOUT_SPACING, image_files
from nnunet_lgms.prediction.amount import grid_of


class CasesFailed(ValueError):
    """Some cases of a list could not be predicted.

    Attributes:
        errors: what went wrong, by the names of the cases.
        n_cases: of the list.
    """

    def __init__(self, errors: Mapping[str, BaseException], n_cases: int):
        first = one_line(next(iter(errors.values())))
        super().__init__(
            f"{len(errors)} of {n_cases} cases are not predicted: {', '.join(errors)} (the first: {first})."
        )
        self.errors, self.n_cases = dict(errors), n_cases


def find_cases(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Names of the cases in a folder, and the files of each in the order of their channels.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one with the images, CASE_0000{ending}.")
    cases = image_files(folder, ending)
    if not cases:
        raise ValueError(f"{folder} has no images named CASE_0000{ending}, as nnU-Net names channels.")
    return cases


def read_case(
    files: Sequence[str],
    previous: str | None,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
    name: str | None = None,
    case: str | None = None,
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """An image, the labels of a cascade's previous stage, and what nnU-Net's reader knows of it.

    Args:
        files: one a channel.
        previous: file with the labels of the previous stage, or None.
        plans: of the model, which name the reader.
        configuration: of the model.
        dataset_json: of the model.
        name: what messages call the image; default: its file.
        case: what the case is called, if that is known.

    Returns:
        (C, Z, Y, X) float32; (1, Z, Y, X) or None; properties.

    Raises:
        ValueError: a file is missing, damaged, not finite, of another kind than the training's, or of another
            channel than its place says; one sentence.
    """
    check_listed_channels([Path(file) for file in files], case)
    reader = plans.image_reader_writer_class()
    read = [*files, *([previous] if previous else [])]
    for file in read:
        if not Path(file).is_file():
            raise ValueError(
                f"{file} is not there: predict this case with the previous stage of the cascade first."
                if file == previous
                else f"The image {file} does not exist."
            )
        _check_ending(file, reader, dataset_json["file_ending"])
    name = name or f"The image {files[0]}"
    with ThreadPoolExecutor(len(read)) as pool:  # both decompress the file, and libraries do it outside Python's lock
        checks = [check_image_file]
        if type(reader).__name__ in WITHOUT_SPACING:  # pictures
            checks.append(check_orientation)
        checked = [pool.submit(check, Path(file)) for file in read for check in checks]
        try:
            samples, properties = reader.read_images(list(files))
            labels = None if previous is None else reader.read_seg(previous)[0]
        except Exception as error:  # readers raise whatever their libraries raise
            for check in checked:
                check.result()  # what is known better is said
            # nnU-Net's readers print what is wrong with several channels, and raise an error without words
            reason = one_line(str(error) or "its channels differ in size or spacing")
            raise ValueError(f"{name} cannot be read as the model's training images were ({reason}).") from error
        for check in checked:
            check.result()
    check_channels(samples, dataset_json, name)
    check_axes(is_flat(properties), configuration, name)
    check_values(samples, name)
    if not all(0 < mm < np.inf for mm in properties["spacing"]):
        raise ValueError(f"{name} has a spacing of {tuple(properties['spacing'])} mm: correct its header.")
    return samples, labels, properties


def _check_ending(file: str, reader: BaseReaderWriter, ending: str) -> None:
    """Libraries read more than nnU-Net asks of them: SimpleITK takes a colour picture for a volume."""
    known = {ending, *reader.supported_file_endings}
    known |= {".nii"} if ".nii.gz" in known else set()
    if not file.lower().endswith(tuple(end.lower() for end in known)):
        raise ValueError(f"The image {file} is none of the {ending} files that the model was trained on.")


def check_channels(samples: np.ndarray, dataset_json: dict, name: str) -> None:
    """Raises ValueError if an image (C, Z, Y, X) has another number of channels than the model."""
    names = channel_names(dataset_json)
    if len(samples) != len(names):
        raise ValueError(f"{name} has {len(samples)} channel(s), the model expects {len(names)}: {', '.join(names)}.")


def check_axes(flat: bool, configuration: ConfigurationManager, name: str) -> None:
    """Raises ValueError if an image is flat and the model takes volumes."""
    if flat and len(configuration.patch_size) == 3:
        raise ValueError(f"{name} is flat, the model takes volumes, in windows of {configuration.patch_size} voxels.")


def check_colours(samples: np.ndarray, configuration: ConfigurationManager, name: str) -> None:
    """Raises ValueError if colours are fractions of 1, as many libraries have them: the model would see black."""
    fractions = samples.dtype.kind == "f" and 0 <= samples.min() and 0 < samples.max() <= 1
    if fractions and "RGBTo01Normalization" in configuration.normalization_schemes:
        raise ValueError(
            f"{name} has values from {samples.min():g} to {samples.max():g}, the model takes colours from 0 to 255: "
            "multiply by 255."
        )


def write_case(
    output: str,
    labels: np.ndarray,
    probabilities: np.ndarray | None,
    properties: dict,
    plans: PlansManager,
    dataset_json: dict,
) -> None:
    """Writes the files that nnU-Net writes of a case, each whole or not at all, the labels last.

    Args:
        output: path without the ending.
        labels: (Z, Y, X).
        probabilities: (heads, Z, Y, X), or None.
        properties: of the reader.
        plans: of the model, which name the writer.
        dataset_json: of the model, which names the ending.
    """
    if probabilities is not None:
        with atomic_write(Path(f"{output}.npz")) as temporary:
            np.savez_compressed(temporary, probabilities=probabilities)
        with atomic_write(Path(f"{output}.pkl")) as temporary:
            save_pickle(properties, str(temporary))
    target = Path(output + dataset_json["file_ending"])
    with atomic_write(target) as temporary:
        try:
            plans.image_reader_writer_class().write_seg(labels, str(temporary), properties)
        except RuntimeError as error:
            raise OSError(f"{target} cannot be written ({one_line(error)}).") from error
        check_image_file(temporary)  # SimpleITK leaves out what does not fit on a disk without a word


def check_outputs(outputs: Sequence[str], ending: str) -> None:
    """No result takes the place of another one.

    Args:
        outputs: paths without the ending.
        ending: of the labels.

    Raises:
        ValueError: two of them would be one file, also where the disk knows no capitals.
        OSError: nothing can be written there.
    """
    seen: set[str] = set()
    for output in outputs:
        if output in seen:
            raise ValueError(f"Two cases would be written to {output}{ending}: give each an output of its own.")
        seen.add(output)
    for a, b in alike(outputs):
        if ignores_case(Path(b).parent):
            raise ValueError(
                f"{a}{ending} and {b}{ending} are one file on this disk, which knows no capitals: rename one of the "
                "cases, or predict into another folder."
            )


def finished(output: str, ending: str, with_probabilities: bool) -> bool:
    """Whether all files of a case are there."""
    return all(Path(output + end).is_file() for end in ([ending, ".npz"] if with_probabilities else [ending]))


def has_labels(outputs: str | Sequence[str], ending: str) -> bool:
    """Whether labels are there already: in a folder, or of these paths without the ending."""
    if not isinstance(outputs, str):
        return any(Path(output + ending).is_file() for output in outputs)
    return Path(outputs).is_dir() and bool(files_in(Path(outputs), ending))


def is_readable(file: str, reader: BaseReaderWriter) -> bool:
    """Whether a label map is whole; nnU-Net writes into the file itself, which a call that was killed leaves cut."""
    try:
        check_image_file(Path(file))
        grid_of([file], reader)
    except Exception:  # readers raise whatever their libraries raise
        return False
    return True


def remove_leftovers(outputs: Sequence[str], ending: str) -> None:
    """Removes files that a killed call was writing, of these cases, which are `.PROCESS.NAME`."""
    by_folder: dict[str, set[str]] = {}
    for output in outputs:
        folder, name = os.path.split(output)
        by_folder.setdefault(folder, set()).update(name + end for end in (ending, ".npz", ".pkl"))
    for folder, names in by_folder.items():
        for file in Path(folder or ".").glob(".*"):
            match = re.fullmatch(r"\.(\d+)\.(.+)", file.name)
            if match and match[2] in names and not _runs(int(match[1])):
                file.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this number is on this machine; on Windows always, as to ask would send it Ctrl+C."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
