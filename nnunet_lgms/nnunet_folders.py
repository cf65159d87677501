"""nnU-Net's three folders, the numbers and names of the data sets in them, and the models that are shipped."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from nnunet_lgms.files import shown
from nnunet_lgms.names import is_dataset_name


def nnunet_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        ValueError: it is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{variable} is not set: export {variable}=FOLDER, as nnU-Net itself needs it.")
    return Path(value).absolute()


def dataset_number(name: str) -> int:
    """``"Dataset004_Hippocampus"`` -> 4."""
    return int(name[len("Dataset") :].split("_")[0])


def dataset_name(dataset: str | int) -> str:
    """``4``, ``"4"`` or ``"Dataset004_Hippocampus"`` -> ``"Dataset004_Hippocampus"``.

    Raises:
        ValueError: nnU-Net knows no such dataset, or the name is none that it would give.
    """
    nnunet_folder("nnUNet_preprocessed")
    nnunet_folder("nnUNet_raw")
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    if str(dataset).isdecimal() and len(str(dataset)) <= 9:
        try:
            return str(maybe_convert_to_dataset_name(int(dataset)))
        except RuntimeError as error:
            raise ValueError(f"{dataset!r} names no dataset: {' '.join(str(error).split())}") from None
    if not is_dataset_name(str(dataset)):
        raise ValueError(
            f"{shown(dataset)} names no dataset: give nnU-Net's number, or a name such as Dataset004_Hippocampus."
        )
    return str(dataset)


def raw_dataset(dataset: str) -> Path:
    """Folder of a raw dataset, by number (`101`), name (`Dataset101_BUSI`) or path (its own, or of its dataset.json).

    Raises:
        ValueError: there is none.
    """
    path = Path(os.path.abspath(dataset))  # with a name of its own: results go into folders of that name
    if path.is_file() or (path / "dataset.json").is_file():
        return path if path.is_dir() else path.parent
    if path.is_dir() or Path(dataset).name != dataset or dataset in ("", ".."):
        raise ValueError(f"{dataset} has no dataset.json: give a dataset's folder, its name, or its number.")
    try:
        raw = nnunet_folder("nnUNet_raw")
    except ValueError as error:
        raise ValueError(f"To find dataset {dataset}: {error}") from None
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdecimal() else glob.escape(dataset)
    found = sorted(folder for folder in raw.glob(pattern) if (folder / "dataset.json").is_file())
    if len(found) != 1:
        there = ", ".join(sorted(folder.name for folder in raw.glob("Dataset*"))) or "none"
        raise ValueError(f"{raw} has {len(found)} datasets {dataset}, expected one; there are: {there}.")
    return found[0]


def shipped_models() -> dict[str, Path]:
    """Name -> folder of the trained models that are shipped: installed inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    folders = [folder for place in (package.parent, package) for folder in sorted((place / "models").glob("*"))]
    return {folder.name: folder for folder in folders if (folder / "plans.json").is_file()}


def model_path(model: str | Path) -> Path:
    """The folder or zip of a model that is given by its path or, where it is shipped, by its name.

    Folders of images may have such a name: only one with plans takes the place of the shipped model.

    Raises:
        ValueError: it is neither.
    """
    path, shipped = Path(model), shipped_models()
    if str(model) in shipped and not (path.is_file() or (path / "plans.json").is_file()):
        return shipped[str(model)]
    if path.exists():
        return path
    raise ValueError(
        f"{shown(str(model))} is neither a folder or zip of a trained model nor the name of a shipped one: there are "
        f"{', '.join(shipped) or 'none'}."
    )
