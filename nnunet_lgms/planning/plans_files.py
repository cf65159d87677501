"""Where plans, datasets and the overrides that come with the package lie, and how plans files are read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nnunet_lgms
from nnunet_lgms import dataset_json
from nnunet_lgms.blocks.dimension import is_int
from nnunet_lgms.config import KEY, merge
from nnunet_lgms.config.planned import MAX_BATCH, Planned
from nnunet_lgms.files import atomic_write, read_json, shown
from nnunet_lgms.locks import locked
from nnunet_lgms.names import check_plans_names, is_file_name
from nnunet_lgms.nearest import did_you_mean
from nnunet_lgms.nnunet_folders import dataset_number, nnunet_folder

#: what a new plans file may be called: safe in a path, in a shell and as an argument
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,99}")
#: of which a message shows all
LONGEST_PATH = 300
STOCK_PLANS = "nnUNetPlans"
#: what nnU-Net's commands and this package's read of a configuration, beside its topology
NEEDED = {
    "batch_size": f"a whole number from 1 to {MAX_BATCH}",
    "data_identifier": "the name of a folder of preprocessed data",
}


def plans_file(name: str, plans_name: str) -> Path:
    """``nnUNet_preprocessed/<dataset>/<plans>.json``, whether it is there or not.

    Raises:
        ValueError: ``plans_name`` cannot be the name of a plans file.
    """
    if not PLAIN_NAME.fullmatch(plans_name) or "__" in plans_name:
        raise ValueError(
            f"{shown(plans_name)} cannot name a plans file: give a plain name of letters, digits, '_', '-', '.' and "
            "'+', without folders and without '__', which nnU-Net uses to separate trainer, plans and configuration; "
            "for example nnUNetPlans_k3."
        )
    return nnunet_folder("nnUNet_preprocessed") / name / f"{plans_name.removesuffix('.json')}.json"


def read_plans(name: str, plans_name: str) -> dict[str, Any]:
    """The plans of a dataset.

    Raises:
        ValueError: there are none of that name, the file is no plans file, or one of its configurations cannot be
            used.
    """
    path = plans_file(name, plans_name)
    if not path.is_file():
        if not path.parent.is_dir() and not (nnunet_folder("nnUNet_raw") / name).is_dir():
            raise ValueError(
                f"There is no dataset {name}, neither in nnUNet_preprocessed ({path.parent.parent}) nor in nnUNet_raw: "
                "correct its name, or the two variables."
            )
        there = sorted(p.stem for p in path.parent.glob("*.json") if _is_plans(p))
        raise ValueError(
            f"{name} has no plans {plans_name!r}: "
            + (
                f"there are {', '.join(there)}."
                if there
                else f"run nnUNetv2_plan_and_preprocess -d {dataset_number(name)}."
            )
        )
    plans = read_json(path)
    if not _holds_plans(plans):
        raise ValueError(f"{path} is not a plans file of nnU-Net: it must be a table with 'configurations'.")
    try:
        check_configurations(plans)
        check_plans_names(plans, "it")
    except ValueError as error:
        raise ValueError(f"{path.name} of {name}: {error}") from None
    return plans


def check_configurations(plans: Mapping[str, Any]) -> None:
    """Every configuration of the plans can be resolved as nnU-Net does it, and has what a training reads.

    Raises:
        ValueError: one cannot; the message names it.
    """
    there = plans["configurations"]
    if not there:
        raise ValueError("the plans have no configuration: plan again.")
    for name, content in there.items():
        if not isinstance(content, Mapping):
            raise ValueError(f"configuration {shown(name)} is {shown(content)}: it must be a table; plan again.")
        if not is_file_name(name):
            raise ValueError(f"{shown(name)} cannot name a configuration, which names files and folders: rename it.")
    for name in there:
        resolved: dict[str, Any] = {}
        heir, seen = name, []
        while heir is not None:
            if heir in seen:
                chain = " from ".join(map(shown, [*seen, heir]))
                raise ValueError(f"configurations inherit in a circle, {chain}: correct inherits_from.")
            if not isinstance(heir, str) or heir not in there:
                raise ValueError(
                    f"configuration {shown(name)} inherits from {shown(heir)}, which the plans do not have: there are "
                    f"{shown(', '.join(there))}."
                )
            seen.append(heir)
            resolved = {**there[heir], **resolved}
            heir = there[heir].get("inherits_from")
        _check_configuration(name, resolved)


def _check_configuration(name: str, configuration: Mapping[str, Any]) -> None:
    batch, data = configuration.get("batch_size"), configuration.get("data_identifier")
    fits = {
        "batch_size": is_int(batch) and 1 <= batch <= MAX_BATCH,
        "data_identifier": isinstance(data, str) and PLAIN_NAME.fullmatch(data) is not None,
    }
    for key, allowed in NEEDED.items():
        if not fits[key]:
            given = f"{key} {shown(configuration[key])}" if key in configuration else f"no {key}"
            raise ValueError(f"configuration {shown(name)} has {given}: it needs {allowed}; plan again.")


def read_dataset_json(name: str) -> dict[str, Any]:
    """The dataset's description: nnU-Net's copy beside the preprocessed data, or else the raw one.

    Raises:
        ValueError: there is none, or nnU-Net cannot work with it.
    """
    for variable in ("nnUNet_preprocessed", "nnUNet_raw"):
        path = nnunet_folder(variable) / name / "dataset.json"
        if path.is_file():
            description = dataset_json.read_dataset_json(path)
            _check_labels(description, path)
            dataset_json.n_channels(description)
            return description
    raise ValueError(f"{name} has no dataset.json, neither in nnUNet_preprocessed nor in nnUNet_raw: put it there.")


def check_writable(path: Path, force: bool) -> None:
    """Refuses to write over what is there; plans may be replaced with ``force``, nothing else, nor nnU-Net's own.

    Raises:
        ValueError: the file exists and ``force`` is not set, or it holds something other than plans of the user's.
    """
    if not path.exists():
        return
    if path.stem == STOCK_PLANS:
        raise ValueError(f"{STOCK_PLANS} are nnU-Net's own plans and stay: choose another name with --as.")
    try:
        content = read_json(path)
    except ValueError:
        content = None
    if not (isinstance(content, dict) and "plans_name" in content):
        raise ValueError(f"{path.name} in {path.parent.name} holds no plans and stays: choose another name with --as.")
    if not force:
        raise ValueError(f"{path.name} exists in {path.parent.name}: choose another name with --as, or add --force.")


def plans_lock(path: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """Held while a plans file is made: :func:`nnunet_lgms.locks.locked` on it."""
    return locked(
        path.with_name(f".{path.stem}.lock"), f"plan or override to {path.name} of {path.parent.name}", wait=wait
    )


def write_plans(path: Path, plans: dict[str, Any], force: bool) -> None:
    """Writes a plans file whole or not at all.

    Raises:
        ValueError: see :func:`check_writable`.
    """
    check_writable(path, force)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(plans, indent=4) + "\n", "utf-8")


def overrides_folder() -> Path:
    """The folder of the overrides that come with the package."""
    package = Path(nnunet_lgms.__file__).parent
    installed = package / "plans"
    return installed if installed.is_dir() else package.parent / "plans"


def read_override(*names_or_paths: str) -> dict[str, Any]:
    """An override: a path, or the name of one that comes with the package; of several, the later wins.

    Returns:
        settings under ``"lgmsnet"``, and keys of :class:`nnunet_lgms.config.planned.Planned`; their values are not
        looked at.

    Raises:
        ValueError: there is no such file, it has a key twice, or keys that no override has.
    """
    override: dict[str, Any] = {}
    for name_or_path in names_or_paths:
        path = Path(name_or_path)
        if not path.is_file():
            path = _override_of_the_package(name_or_path)
        content = read_json(path, keys_once=True)
        known = [KEY, *Planned.model_fields]
        if not isinstance(content, dict) or not content or not set(content) <= set(known):
            found = ", ".join(map(shown, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f'{path} holds {found or "nothing"}: an override is {{"{KEY}": {{...}}}}, beside it may stand '
                f"{', '.join(known[1:])}, and nothing else."
            )
        settings = [table for table in (override.get(KEY), content.get(KEY)) if table is not None]
        if len(settings) == 2 and all(isinstance(table, dict) for table in settings):
            content = {**content, KEY: merge(*settings)}
        override |= content
    return override


def _override_of_the_package(name: str) -> Path:
    known = {p.stem: p for p in sorted(overrides_folder().glob("*.json"))}
    stem = name.removesuffix(".json")
    if stem in known:
        return known[stem]
    by_name = f"by name there are {', '.join(known)}."
    if Path(name).is_dir():
        raise ValueError(
            f"The override {shown(name, LONGEST_PATH)} is a folder, not a file: give one of its files; {by_name}"
        )
    if Path(name).name != name:  # a path that leads nowhere means that file, not one of the package's of that name
        raise ValueError(f"There is no file {shown(name, LONGEST_PATH)}: correct the path; {by_name}")
    raise ValueError(f"There is no override {shown(name)}; {did_you_mean(stem, known) or by_name}")


def _check_labels(description: dict[str, Any], path: Path) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    try:
        LabelManager(description["labels"], description.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"nnU-Net refuses the labels in {path}: {' '.join(str(error).split())}") from None


def _is_plans(path: Path) -> bool:
    try:
        return _holds_plans(read_json(path))
    except (ValueError, OSError):
        return False


def _holds_plans(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("configurations"), dict)
