"""What a ``study.yaml`` may hold; checked before the first job."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError

import nnunet_lgms
from nnunet_lgms.complaints import Complaint, allowed_in, described, first_complaint
from nnunet_lgms.data.datasets import DESCRIPTIONS
from nnunet_lgms.files import shown
from nnunet_lgms.names import alike
from nnunet_lgms.nearest import did_you_mean
from nnunet_lgms.nnunet_folders import dataset_number

PLANNERS = {
    "nnUNetPlans": "ExperimentPlanner",
    "nnUNetResEncUNetMPlans": "nnUNetPlannerResEncM",
    "nnUNetResEncUNetLPlans": "nnUNetPlannerResEncL",
    "nnUNetResEncUNetXLPlans": "nnUNetPlannerResEncXL",
}
"""Plans that a study can start from, and nnU-Net's planner of each."""

OWN_PLANS = re.compile(r"nnUNetLGMSNetPlans_(\d+(?:\.\d+)?)G")
"""Plans of ``nnunet_lgms plan --vram GB``, which a study can start from, too."""

NAME = r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*"  # no "__", which nnU-Net has between trainer and plans
PLANS_SENTENCE = f"{', '.join(PLANNERS)}, or nnUNetLGMSNetPlans_<GB>G"


def _known_plans(value: str) -> str:
    if value not in PLANNERS and not OWN_PLANS.fullmatch(value):
        raise ValueError("unknown plans")
    return value


def _unique(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("one is there twice")
    return values


def _number_as_text(name: Any) -> Any:
    return str(name) if type(name) in (int, float) else name


DatasetName = Annotated[str, Field(pattern=r"^Dataset\d{3}_[A-Za-z0-9_-]+$", max_length=100)]
VariantName = Annotated[str, BeforeValidator(_number_as_text), Field(pattern=f"^{NAME}$", max_length=100)]
Trainer = Annotated[str, Field(pattern=f"^{NAME}$")]
Plans = Annotated[str, AfterValidator(_known_plans)]
Cores = Annotated[int, Field(strict=True, ge=1, le=1024)]
Fold = Annotated[int, Field(strict=True, ge=0, le=999)]
Folds = Annotated[list[Fold], AfterValidator(_unique), Field(min_length=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # what NumPy takes
Seeds = Annotated[list[Seed], AfterValidator(_unique)]
ConfigurationName = Literal["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"]
Configurations = Annotated[list[ConfigurationName], Field(min_length=1), AfterValidator(_unique)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Conversion(_Strict):
    """How ``nnunet_lgms convert`` makes a data set."""

    name: Literal[tuple(DESCRIPTIONS)] = described(
        ..., ", ".join(DESCRIPTIONS), "data set, as `nnunet_lgms convert` names it"
    )
    source: str = described(..., "a path; $VARIABLES are filled in", "the unpacked download")
    splits: Literal["paper"] | None = described(None, '"paper"', "the paper's folds in place of nnU-Net's")
    size: Annotated[int, Field(strict=True, ge=8, le=8192)] | None = described(
        None, "pixels, 8 to 8192", "resize flat images"
    )


class Unseen(_Strict):
    """A data set that is only tested on."""

    convert: Conversion | None = described(None, "a table", "make it first; else it is in nnUNet_raw already")


class Dataset(Unseen):
    """A data set that is trained on. What is left out is the study's."""

    configurations: Configurations | None = described(None, "as for the study", "other configurations than the study's")
    folds: Folds | None = described(None, "as for the study", "other folds than the study's")
    test: StrictBool = described(False, "true or false", "predict imagesTs, and evaluate against labelsTs")
    zeroshot: list[DatasetName] = described([], "names under datasets or unseen", "test every model on these, too")
    mapping: str | None = described(None, "a path", "mapping file of `nnunet_lgms zeroshot`")


class Variant(_Strict):
    """One way to train. What is left out is the study's."""

    override: str | Annotated[list[str], Field(min_length=1)] | None = described(
        None, "a name in plans/, or a path from the study's file, or a list of these", "what differs; the later wins"
    )
    trainer: Trainer | None = described(None, "the name of a trainer", "another trainer than the study's")
    plans: Plans | None = described(None, PLANS_SENTENCE, "other plans than the study's")
    epochs: Annotated[int, Field(strict=True, ge=1, le=10**6)] | None = described(
        None, "a whole number, 1 to 1000000", "for the estimate of hours, where the trainer's name does not tell"
    )

    @property
    def overrides(self) -> tuple[str, ...]:
        """Names and paths of what differs, the first to be applied first."""
        return (self.override,) if isinstance(self.override, str) else tuple(self.override or ())


class Study(_Strict):
    """A whole ``study.yaml``."""

    name: VariantName = described(..., "letters, digits, '-', '.' and single '_'", "its folder and the report's title")
    folder: str | None = described(
        None, "a path; $VARIABLES are filled in", "where it is kept; default: studies/NAME in nnUNet_results"
    )
    device: Literal["cuda", "cpu"] = described("cuda", "cuda, cpu", "where networks run; with cuda one GPU a job")
    threads: Cores = described(8, "a whole number, 1 to 1024", "cores of a GPU's job")
    processes: Annotated[int, Field(strict=True, ge=0, le=1024)] = described(
        6, "a whole number, 0 to 1024", "of them, processes that prepare batches"
    )
    configurations: Configurations = described(
        ..., "a list of 2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres, each once", "nnU-Net's configurations"
    )
    trainer: Trainer = described("nnUNetTrainerLGMSNet", "the name of a trainer", "nnU-Net's or one of this package")
    plans: Plans = described("nnUNetPlans", PLANS_SENTENCE, "what is planned, and what overrides start from")
    folds: Folds = described([0, 1, 2, 3, 4], "a list of fold numbers, 0 to 999, each once", "folds that are trained")
    seeds: Seeds = described(
        [], "a list of whole numbers below 2^32, each once", "repeats; none: one training that is not seeded"
    )
    ensemble: StrictBool = described(False, "true or false", "whether pairs of configurations may win together")
    nsd_tolerance: Annotated[float, Field(strict=True, ge=0, le=1000)] = described(
        1.0, "a number, 0 to 1000", "in mm, for NSD"
    )
    datasets: Annotated[dict[DatasetName, Dataset], Field(min_length=1)] = described(
        ..., "a table with names such as Dataset101_BUSI", "data sets that are trained on"
    )
    unseen: dict[DatasetName, Unseen] = described({}, "as for datasets", "data sets that are only tested on")
    variants: Annotated[dict[VariantName, Variant], Field(min_length=1)] = described(
        ..., "a table of names, each with a table or {}", "what is compared"
    )

    @classmethod
    def read(cls, path_or_name: str | Path) -> Study:
        """Reads and checks a study: a file, or the name of one that comes with the package.

        Raises:
            ValueError: there is none, or something in it is not allowed. One sentence names the value, what is
                allowed, and the way out.
        """
        path = find_study(path_or_name)
        try:
            content = yaml.load(path.read_text("utf-8"), _Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            what = "cannot be read" if isinstance(error, yaml.constructor.ConstructorError) else "is not YAML"
            raise ValueError(f"{path} {what}: {error}") from None
        except (
            ValueError,
            OverflowError,
        ) as error:  # PyYAML hands on what Python says of 2024-99-99 or of a number of 5000 digits
            reason = str(error).split(";")[0]
            raise ValueError(f"{path} has a date or a number that cannot be ({reason}): correct or quote it.") from None
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply: docs/how-to/study.md lists what a study holds.") from None
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} is {type(content).__name__}, not a table: docs/how-to/study.md lists what a study holds."
            )
        try:
            study = cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(_sentence(first_complaint(error, cls, content), path)) from None
        _check_together(study, path)
        return study


class _Loader(yaml.SafeLoader):
    """YAML in which keys are texts, or numbers as they are written, and appear once.

    The usual loader lets the last of several win without a word.
    """

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # which says so
        self.flatten_mapping(node)
        content = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if type(key) in (int, float):
                key = key_node.value
            if not isinstance(key, str):
                written = shown(key_node.value, 40) if isinstance(key_node, yaml.ScalarNode) else "a list or table"
                problem = f"{written} cannot be a key: put it in quotes, if it is meant as a name"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in content:
                problem = f"{key!r} appears twice: keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            content[key] = self.construct_object(value_node, deep=deep)
        return content


def find_study(path_or_name: str | Path) -> Path:
    """The file of a study, given by its path or by the name of one that comes with the package.

    Raises:
        ValueError: there is none.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path.resolve()
    named = packaged("studies") / f"{path.stem}.yaml"
    if path.name == str(path_or_name) and named.is_file():
        return named
    known = ", ".join(sorted(p.stem for p in packaged("studies").glob("*.yaml")))
    raise ValueError(f"There is no study {str(path_or_name)!r}: give a file, or one that comes along: {known}.")


def packaged(folder: str) -> Path:
    """A folder that is installed inside the package and lies beside it in a checkout: ``workflow`` or ``studies``."""
    package = Path(nnunet_lgms.__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


def filled_in(path: str) -> Path:
    """A path of a study with its variables and ``~`` filled in.

    Raises:
        ValueError: a variable is not set.
    """
    filled = os.path.expandvars(os.path.expanduser(path))
    if missing := re.search(r"\$\{?(\w+)", filled):
        raise ValueError(f"The study names {path!r}, but {missing[1]} is not set: export {missing[1]}=FOLDER.")
    return Path(filled)


def _sentence(complaint: Complaint, path: Path) -> str:
    """One sentence about the study's file."""
    where = f"{path.name}: {'.'.join(complaint.path)}"
    if complaint.kind == "missing":
        return f"{where} is missing: give {complaint.allowed}; docs/how-to/study.md explains."
    if complaint.kind == "unknown":
        hint = did_you_mean(complaint.path[-1], complaint.known) or f"known are {', '.join(complaint.known)}."
        return f"{where} is not known; {hint}"
    if complaint.kind == "name":
        under = complaint.path[0]
        allowed = (
            "letters, digits, '-', '.' and single '_'" if under == "variants" else "a name such as Dataset101_BUSI"
        )
        return f"{path.name}: {complaint.given} cannot be a name under {under}: allowed is {allowed}."
    return f"{where} is {complaint.given}: allowed is {complaint.allowed}; see docs/how-to/study.md."


def _check_together(study: Study, path: Path) -> None:
    """What concerns several entries at once."""
    numbers: dict[int, str] = {}
    for name in [*study.datasets, *study.unseen]:
        other = numbers.setdefault(dataset_number(name), name)
        if other != name or (name in study.datasets and name in study.unseen):
            raise ValueError(f"{path.name}: {other} and {name} have the same number, which nnU-Net gives only once.")
    for name, dataset in study.datasets.items():
        for target in dataset.zeroshot:
            if target == name or not (target in study.datasets or target in study.unseen):
                raise ValueError(
                    f"{path.name}: datasets.{name}.zeroshot names {target}: it must be another data set, listed under "
                    f"datasets or unseen."
                )
        configurations = dataset.configurations or study.configurations
        if "3d_cascade_fullres" in configurations and "3d_lowres" not in configurations:
            raise ValueError(f"{path.name}: {name} has 3d_cascade_fullres, which needs 3d_lowres in configurations.")
    for what, names in (("data sets", study.datasets), ("data sets", study.unseen), ("variants", study.variants)):
        for a, b in alike(names):
            raise ValueError(
                f"{path.name}: the {what} {a} and {b} differ in capitals only, and name folders, which are one on "
                "Windows and macOS: rename one."
            )
    same: dict[tuple, str] = {}
    stems: dict[str, str] = {}
    for name, variant in study.variants.items():
        key = (variant.trainer or study.trainer, variant.plans or study.plans, variant.overrides)
        if (other := same.setdefault(key, name)) != name:
            raise ValueError(f"{path.name}: variants {other} and {name} are the same training: leave one out.")
        for override in variant.overrides:
            stem = Path(override).stem
            if not re.fullmatch(NAME, stem):
                raise ValueError(f"{path.name}: the override {override!r} cannot name plans: rename the file.")
            if (other := stems.setdefault(stem.casefold(), override)) != override:
                raise ValueError(f"{path.name}: {other} and {override} would name the same plans: rename one.")


def schema_table() -> str:
    """The tables of ``docs/how-to/study.md``, in Markdown."""
    parts = []
    tables = {"study": Study, "a data set": Dataset, "`convert`": Conversion, "a variant": Variant}
    for title, model in tables.items():
        parts.append(f"| {title} | default | allowed | what it is |\n|---|---|---|---|")
        for name, field in model.model_fields.items():
            default = "**needed**" if field.is_required() else f"`{json.dumps(field.default)}`"
            parts[-1] += f"\n| `{name}` | {default} | {allowed_in(field)} | {field.description} |"
    return "\n\n".join(parts)
