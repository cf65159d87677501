"""What can be seen to be wrong before the first job."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from nnunet_lgms.config.planned import Planned
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.data.find import find_cases
from nnunet_lgms.files import files_in
from nnunet_lgms.nearest import did_you_mean
from nnunet_lgms.nnunet_folders import nnunet_folder
from nnunet_lgms.planning.plans_files import read_override
from nnunet_lgms.study.graph import Graph


def check_inputs(graph: Graph) -> None:
    """nnU-Net's folders, data sets, downloads, overrides and trainers.

    Raises:
        ValueError: something is not there, or is something else than the study says.
    """
    raw = nnunet_folder("nnUNet_raw")
    for variable in ("nnUNet_preprocessed", "nnUNet_results"):
        nnunet_folder(variable)
    for dataset, own in (graph.study.datasets | graph.study.unseen).items():
        if own.convert:
            title = DESCRIPTIONS[own.convert.name].title
            if dataset[11:] != title:
                raise ValueError(f"{dataset} is made from {own.convert.name}: call it {dataset[:11]}{title}.")
        if (raw / dataset / "dataset.json").is_file():
            _check_file_names(raw / dataset)
            continue
        if not own.convert:
            raise ValueError(f"{dataset} is not in nnUNet_raw: put it there, or give it convert: in {graph.path.name}.")
        if not graph.resolve(own.convert.source).is_dir():
            raise ValueError(f"{dataset} is to be made from {graph.resolve(own.convert.source)}, which is no folder.")
        _check_download(dataset, own.convert.name, graph.resolve(own.convert.source))
    for dataset, own in graph.study.datasets.items():
        for folder in ("imagesTs", "labelsTs") if own.test and (raw / dataset).is_dir() else ():
            if not os.path.isdir(raw / dataset / folder):
                raise ValueError(f"{dataset} has no {folder}: put it there, or set test: false in {graph.path.name}.")
        if own.mapping and not graph.resolve(own.mapping).is_file():
            raise ValueError(f"datasets.{dataset}.mapping names {graph.resolve(own.mapping)}, which does not exist.")
    for variant in graph.study.variants.values():
        Planned.from_override(read_override(*map(graph.override_file, variant.overrides)))
    _check_trainers(graph)


def _check_file_names(dataset: Path) -> None:
    """nnU-Net would fail on a name that is not UTF-8 hours later."""
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        if (dataset / folder).is_dir():
            files_in(dataset / folder, "")


def _check_download(dataset: str, name: str, source: Path) -> None:
    """Every image of a download has its mask; what is in the files is looked at by the conversion."""
    problems = find_cases(DESCRIPTIONS[name], source).problems
    if problems:
        others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"{source}, of which {dataset} is to be made, is not complete: {problems[0]}{others}.")


def _check_trainers(graph: Graph) -> None:
    """nnU-Net will find all trainers."""
    wanted = {}
    for name, variant in graph.study.variants.items():
        where = f"variants.{name}.trainer" if variant.trainer else "trainer"
        wanted.setdefault(variant.trainer or graph.study.trainer, where)
    known = _classes_in_trainer_folders()
    for trainer, where in wanted.items():
        if trainer not in known and not _found_by_nnunet(trainer):
            hint = did_you_mean(trainer, known) or "correct the name, or add the trainer's folder there."
            raise ValueError(
                f"{graph.path.name}: {where} is {trainer}, which is neither nnU-Net's nor in a folder that "
                f"nnUNet_extTrainer names; {hint}"
            )


def _classes_in_trainer_folders() -> set[str]:
    """All classes that are written there. Reading the text takes no time; nnU-Net's own search imports everything."""
    folders = [Path(place, "training", "nnUNetTrainer") for place in find_spec("nnunetv2").submodule_search_locations]
    folders += [Path(folder) for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    files = (file for folder in folders for file in folder.rglob("*.py"))
    return {name for file in files for name in re.findall(r"^class (\w+)", file.read_text("utf-8", "replace"), re.M)}


def _found_by_nnunet(trainer: str) -> bool:
    """By nnU-Net's own search, for a class that is not written as one."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with redirect_stdout(StringIO()):
        try:
            return recursive_find_trainer_class_by_name(trainer) is not None
        except Exception:  # whatever the modules there raise when they are imported
            return False
