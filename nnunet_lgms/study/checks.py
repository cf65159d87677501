"""What can be seen to be wrong before the first job.

``study check`` and ``study run`` both call :func:`check_study`. What a job would refuse in its first minute is refused
by the same function here, as far as what it looks at is there already.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from nnunet_lgms.config import KEY, LGMSSettings
from nnunet_lgms.config.planned import Planned
from nnunet_lgms.data.convert import Conversion, prospect, splits_to_write
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.dataset_json import n_channels, read_dataset_json
from nnunet_lgms.files import files_in, one_line, read_json
from nnunet_lgms.nearest import did_you_mean
from nnunet_lgms.nnunet_folders import dataset_number, nnunet_folder
from nnunet_lgms.study.graph import Graph, Model, configuration_of, planned_for
from nnunet_lgms.study.profiles import Profile, check_profile

N_FOLDS = 5
"""nnU-Net's, where there are no splits."""

FLAT_ENDINGS = (".png", ".bmp")
"""Of flat images, for which nnU-Net plans 2d alone."""


def check_study(graph: Graph, profile: Profile) -> None:
    """Whatever a run would refuse in its first minute.

    Raises:
        ValueError: a folder, a download, a data set, an override, a fold, a trainer, a GPU or a partition is not there,
            or what is there does not fit; one sentence.
    """
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        nnunet_folder(variable)
    for dataset in (*graph.study.datasets, *graph.study.unseen):
        check_data(graph, dataset)
    for variant in graph.study.variants.values():
        settings = _override(graph, variant.overrides)
        Planned.from_override(settings)
        LGMSSettings.from_plan(settings.get(KEY, {}))
    for dataset in graph.datasets:
        for fold in graph.folds(dataset):
            check_fold(graph, dataset, fold)
        for model in graph.models(dataset):
            _check_model(graph, model)
    check_trainers(graph)
    check_profile(graph, profile)


# ---- data sets -------------------------------------------------------------------------------------------------------


def check_data(graph: Graph, dataset: str) -> None:
    """A data set is there as a whole, or what it is made from.

    Raises:
        ValueError: it is not, or was made otherwise than the study says.
    """
    own = graph.study.datasets.get(dataset) or graph.study.unseen[dataset]
    raw = nnunet_folder("nnUNet_raw") / dataset
    made = (raw / "dataset.json").is_file()
    done = graph.folder / graph.converted(dataset)
    if own.convert and not done.is_file():
        title = DESCRIPTIONS[own.convert.name].title
        if dataset[11:] != title:
            raise ValueError(f"{dataset} is made from {own.convert.name}: call it {dataset[:11]}{title}.")
        _check_conversion(graph, dataset)
    elif not made:
        way_out = f"remove {done}" if own.convert else f"give it convert: in {graph.path.name}"
        raise ValueError(f"{dataset} is not in nnUNet_raw: put it there, or {way_out}.")
    trained_on = dataset in graph.study.datasets
    if made:
        n_cases = _check_raw(raw, trained_on)
        if trained_on and not (own.convert and own.convert.splits) and not _splits_file(dataset).is_file():
            check_enough_cases(dataset, n_cases)
    if not trained_on:
        return
    for folder in ("imagesTs", "labelsTs") if own.test else ():
        if not (raw / folder).is_dir():
            raise ValueError(f"{dataset} has no {folder}: put it there, or set test: false in {graph.path.name}.")
    if own.mapping and not graph.resolve(own.mapping).is_file():
        raise ValueError(f"datasets.{dataset}.mapping names {graph.resolve(own.mapping)}, which does not exist.")
    flat = DESCRIPTIONS[own.convert.name].kind == "image" if not made else _is_flat(read_dataset_json(raw))
    if flat and (others := [c for c in own.configurations or graph.study.configurations if c != "2d"]):
        raise ValueError(
            f"{dataset} has flat images, for which nnU-Net plans 2d alone, and is to be trained as {others[0]}: give "
            f"it configurations: [2d] in {graph.path.name}."
        )


def _check_conversion(graph: Graph, dataset: str) -> None:
    """It was converted with these settings, or the download has a mask for every image; what is in the files is looked
    at by the conversion."""
    conversion = (graph.study.datasets.get(dataset) or graph.study.unseen[dataset]).convert
    description, source = DESCRIPTIONS[conversion.name], graph.resolve(conversion.source)
    raw, number = nnunet_folder("nnUNet_raw"), dataset_number(dataset)
    if not (raw / dataset).exists() and not source.is_dir():
        raise ValueError(f"{dataset} is to be made from {source}, which is no folder.")
    ahead = prospect(description, source, number, raw=raw, size=conversion.size)
    if isinstance(ahead, Conversion):
        identifiers = ahead.identifiers
    else:
        if problems := ahead.found.problems:
            others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise ValueError(f"{source}, of which {dataset} is to be made, is not complete: {problems[0]}{others}.")
        identifiers = tuple(case.identifier for case in ahead.found.cases)
    if conversion.splits:
        splits_to_write(description, identifiers, _splits_file(dataset))


def _check_raw(raw: Path, trained_on: bool) -> int:
    """What nnU-Net's integrity check can say without reading an image; the number of training cases.

    Of names too: nnU-Net would fail hours later on one that is not UTF-8.
    """
    description = read_dataset_json(raw)
    n_channels(description)
    cases = set(description.get("dataset", ()))
    if not cases:
        ending = description["file_ending"]
        for folder in ("imagesTr", "labelsTr"):
            if not (raw / folder).is_dir():
                raise ValueError(f"{raw.name} has no {folder}: put it there.")
        for folder in ("imagesTs", "labelsTs"):
            if (raw / folder).is_dir():
                files_in(raw / folder, "")
        files_in(raw / "labelsTr", "")
        cases = {file.name[: -len(f"_0000{ending}")] for file in files_in(raw / "imagesTr", ending)}
        if missing := sorted(case for case in cases if not (raw / "labelsTr" / f"{case}{ending}").is_file()):
            raise ValueError(f"{raw.name} has no {missing[0]}{ending} in labelsTr: every image needs its labels.")
    if trained_on and description.get("numTraining") != len(cases):
        raise ValueError(
            f"{raw / 'dataset.json'} has numTraining {description.get('numTraining')}, and there are {len(cases)} "
            "training cases: correct it."
        )
    return len(cases)


def _is_flat(description: Mapping[str, Any]) -> bool:
    reader = description.get("overwrite_image_reader_writer", "None")
    return reader == "NaturalImage2DIO" or reader in ("None", None) and description["file_ending"] in FLAT_ENDINGS


def check_fold(graph: Graph, dataset: str, fold: int) -> None:
    """The splits have a fold; nnU-Net itself would take a random split.

    Raises:
        ValueError: they have not.
    """
    if fold >= (n := _n_folds(graph, dataset)):
        raise ValueError(f"{dataset} has {n} folds, there is no fold {fold}: correct folds in {graph.path.name}.")


def _n_folds(graph: Graph, dataset: str) -> int:
    """Of the splits that are there, or of those that will be written."""
    if _splits_file(dataset).is_file():
        return len(read_json(_splits_file(dataset)))
    own = graph.study.datasets[dataset]
    if own.convert and own.convert.splits:
        return len(DESCRIPTIONS[own.convert.name].paper_splits([f"case_{n}" for n in range(100)]))
    return N_FOLDS


def _splits_file(dataset: str) -> Path:
    return nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json"


def check_enough_cases(dataset: str, n_cases: int) -> None:
    """nnU-Net's folds have a validation case each.

    Raises:
        ValueError: there are fewer cases than folds.
    """
    if n_cases < N_FOLDS:
        raise ValueError(
            f"{dataset} has {n_cases} training case(s), of which nnU-Net makes no {N_FOLDS} folds: add some, or write "
            f"the folds to {_splits_file(dataset)}."
        )


# ---- plans and models ------------------------------------------------------------------------------------------------


def check_configuration(dataset: str, plans: str, configuration: str, identifier: str | None = None) -> None:
    """Plans have a configuration, and call its data as this package expects it.

    Raises:
        ValueError: they do not, or there are none.
    """
    from nnunet_lgms.planning.plans_files import read_plans

    planned = read_plans(dataset, plans)["configurations"]
    if configuration not in planned:
        raise ValueError(f"{plans} of {dataset} has no {configuration}: nnU-Net planned {', '.join(planned)} only.")
    if identifier and planned[configuration].get("data_identifier") not in (identifier, None):
        raise ValueError(f"{plans} of {dataset} calls its {configuration} data otherwise than {identifier}.")


def overridden(
    graph: Graph, model: Model, measure: Callable[[], Any], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The plans of a model with overrides, made from those that were planned.

    Args:
        graph: the study.
        model: one with overrides.
        measure: gives the components of the data set, for kernels that are chosen by them.
        say: takes remarks.

    Raises:
        ValueError: the override does not fit, or plans of this name are there and say something else.
    """
    from nnunet_lgms.planning.override import override_plans
    from nnunet_lgms.planning.plans_files import plans_file, read_plans

    planned = read_plans(model.dataset, model.base)
    new = override_plans(planned, _override(graph, model.overrides), model.plans, None, measure, say)
    target = plans_file(model.dataset, model.plans)
    if target.is_file() and read_json(target)["configurations"] != json.loads(json.dumps(new["configurations"])):
        raise ValueError(
            f"{target} exists and says something else than {model.base} with {' and '.join(model.overrides)}: models "
            "may have been trained with it, so rename the override, or move that file and its models away."
        )
    return new


class _NotMeasured(Exception):
    """Kernels would have to be chosen by all labels of a data set, which is no matter of seconds."""


def _no_measure() -> Any:
    raise _NotMeasured


def _check_model(graph: Graph, model: Model) -> None:
    """As far as its plans are there."""
    from nnunet_lgms.nnunet.same_training import check_same_training
    from nnunet_lgms.planning.plans_files import plans_file, read_plans

    preprocessed = nnunet_folder("nnUNet_preprocessed") / model.dataset
    shared, identifier = planned_for(model.data_identifier), model.data_identifier
    if plans_file(model.dataset, shared).is_file():
        check_configuration(model.dataset, shared, configuration_of(identifier), identifier)
    if not plans_file(model.dataset, model.base).is_file():
        return
    check_configuration(model.dataset, model.base, model.configuration)
    plans = read_plans(model.dataset, model.base)
    if model.overrides:
        try:
            plans = overridden(graph, model, _no_measure, say=lambda line: None)
        except _NotMeasured:
            return
    if (preprocessed / "dataset.json").is_file():
        description = read_json(preprocessed / "dataset.json")
        for run in graph.runs:
            folder = graph.results_of(run) / model.dataset / model.name
            check_same_training(folder, plans, description, model.configuration)


def _override(graph: Graph, overrides: tuple[str, ...]) -> dict[str, Any]:
    from nnunet_lgms.planning.plans_files import read_override

    return read_override(*map(graph.override_file, overrides))


# ---- trainers --------------------------------------------------------------------------------------------------------


def check_trainers(graph: Graph) -> None:
    """nnU-Net will find all trainers.

    Raises:
        ValueError: one is not there, is no trainer, or its module cannot be imported.
    """
    wanted = {}
    for name, variant in graph.study.variants.items():
        where = f"variants.{name}.trainer" if variant.trainer else "trainer"
        wanted.setdefault(variant.trainer or graph.study.trainer, where)
    (nnunet,) = find_spec("nnunetv2").submodule_search_locations
    stock = _classes_below([Path(nnunet, "training", "nnUNetTrainer")])
    for trainer, where in wanted.items():
        # reading the text takes no time, nnU-Net's search imports everything
        if trainer not in stock and (fault := _fault(trainer)) is not None:
            folders = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
            known = stock | _classes_below([Path(folder) for folder in folders if folder])
            hint = did_you_mean(trainer, known - {trainer}) or "correct the name, or add the trainer's folder there."
            raise ValueError(
                f"{graph.path.name}: {where} is {trainer}, which is neither nnU-Net's nor in a folder that "
                f"nnUNet_extTrainer names{fault}; {hint}"
            )


def _classes_below(folders: list[Path]) -> set[str]:
    """All classes that are written there."""
    files = (file for folder in folders for file in folder.rglob("*.py"))
    return {name for file in files for name in re.findall(r"^class (\w+)", file.read_text("utf-8", "replace"), re.M)}


def _fault(trainer: str) -> str | None:
    """None if nnU-Net's own search finds a trainer, as in the training; else what stopped it, empty if nothing did."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with redirect_stdout(StringIO()):
        try:
            recursive_find_trainer_class_by_name(trainer)
        except Exception as error:  # whatever the modules there raise when they are imported
            missing = isinstance(error, RuntimeError) and "Could not find requested" in str(error)
            return "" if missing else f" ({type(error).__name__} in the search: {one_line(error)})"
    return None
