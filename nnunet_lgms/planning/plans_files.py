"""Where plans, datasets and the overrides that come with the package lie, and how plans files are read and written."""

from __future__ import annotations

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nnunet_lgms
from nnunet_lgms.config import KEY
from nnunet_lgms.files import written_whole


def environment_folder(variable: str) -> Path:
    """The folder that one of nnU-Net's environment variables names.

    Raises:
        ValueError: it is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{variable} is not set: export {variable}=FOLDER, as nnU-Net itself needs it.")
    return Path(value)


def dataset_name(dataset: str | int) -> str:
    """``4``, ``"4"`` or ``"Dataset004_Hippocampus"`` -> ``"Dataset004_Hippocampus"``.

    Raises:
        ValueError: nnU-Net knows no such dataset.
    """
    environment_folder("nnUNet_preprocessed")
    environment_folder("nnUNet_raw")
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return maybe_convert_to_dataset_name(int(dataset) if str(dataset).isdigit() else dataset)
    except RuntimeError as error:
        raise ValueError(f"{dataset!r} names no dataset: {' '.join(str(error).split())}") from None


def dataset_id(name: str) -> int:
    """``"Dataset004_Hippocampus"`` -> 4."""
    return int(name[len("Dataset") :].split("_")[0])


def plans_file(name: str, plans_name: str) -> Path:
    """``nnUNet_preprocessed/<dataset>/<plans>.json``, whether it is there or not.

    Raises:
        ValueError: ``plans_name`` cannot be the name of a plans file.
    """
    if not plans_name or Path(plans_name).name != plans_name or plans_name.startswith(".") or "__" in plans_name:
        raise ValueError(
            f"{plans_name!r} cannot name a plans file: give a plain name without folders and without '__', which "
            f"nnU-Net uses to separate trainer, plans and configuration; for example nnUNetPlans_k3."
        )
    return environment_folder("nnUNet_preprocessed") / name / f"{plans_name.removesuffix('.json')}.json"


def read_plans(name: str, plans_name: str) -> dict[str, Any]:
    """The plans of a dataset.

    Raises:
        ValueError: there are none of that name, or the file is no plans file.
    """
    path = plans_file(name, plans_name)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.json") if _is_plans(p))
        raise ValueError(
            f"{name} has no plans {plans_name!r}: "
            + (
                f"there are {', '.join(there)}."
                if there
                else f"run nnUNetv2_plan_and_preprocess -d {dataset_id(name)}."
            )
        )
    if not _is_plans(path):
        raise ValueError(f"{path} is not a plans file of nnU-Net: it must be a table with 'configurations'.")
    return json.loads(path.read_text("utf-8"))


def read_dataset_json(name: str) -> dict[str, Any]:
    """The dataset's description: nnU-Net's copy beside the preprocessed data, or else the raw one.

    Raises:
        ValueError: there is none.
    """
    for variable in ("nnUNet_preprocessed", "nnUNet_raw"):
        path = environment_folder(variable) / name / "dataset.json"
        if path.is_file():
            return json.loads(path.read_text("utf-8"))
    raise ValueError(f"{name} has no dataset.json, neither in nnUNet_preprocessed nor in nnUNet_raw: put it there.")


def check_writable(path: Path, force: bool) -> None:
    """Refuses to write over what is there; plans may be replaced with ``force``, nothing else.

    Raises:
        ValueError: the file exists and ``force`` is not set, or it holds something other than plans.
    """
    if not path.exists():
        return
    try:
        holds_plans = "plans_name" in json.loads(path.read_text("utf-8"))
    except (ValueError, TypeError):
        holds_plans = False
    if not holds_plans:
        raise ValueError(f"{path.name} in {path.parent.name} holds no plans and stays: choose another name with --as.")
    if not force:
        raise ValueError(f"{path.name} exists in {path.parent.name}: choose another name with --as, or add --force.")


def write_plans(path: Path, plans: dict[str, Any], force: bool) -> None:
    """Writes a plans file whole or not at all.

    Raises:
        ValueError: see :func:`check_writable`.
    """
    check_writable(path, force)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(plans, indent=4) + "\n", "utf-8")


def overrides_folder() -> Path:
    """The folder of the overrides that come with the package."""
    package = Path(nnunet_lgms.__file__).parent
    installed = package / "plans"
    return installed if installed.is_dir() else package.parent / "plans"


def read_override(name_or_path: str) -> dict[str, Any]:
    """The settings of an override: a path, or the name of one that comes with the package.

    Raises:
        ValueError: there is no such file, or it does not hold exactly one key, ``"lgmsnet"``.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = overrides_folder() / f"{Path(name_or_path).stem}.json"
    if not path.is_file():
        known = sorted(p.stem for p in overrides_folder().glob("*.json"))
        near = get_close_matches(Path(name_or_path).stem, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"by name there are {', '.join(known)}."
        raise ValueError(f"There is no override {name_or_path!r}; {hint}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict) or list(content) != [KEY]:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} holds {found or "nothing"}: an override is {{"{KEY}": {{...}}}} and nothing else.')
    return content[KEY]


def _is_plans(path: Path) -> bool:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("configurations"), dict)
