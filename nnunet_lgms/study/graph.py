"""What a study consists of, and where each part of it lies. Nothing is read or written here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nnunet_lgms.nnunet_folders import nnunet_folder
from nnunet_lgms.study.schema import Study, Variant, filled_in, find_study

UNSEEDED = "unseeded"
SHARED_DATA = ("2d", "3d_fullres")
"""Configurations whose preprocessed data all planners share, under the name of nnU-Net's default plans."""


@dataclass(frozen=True)
class Model:
    """What nnU-Net keeps in one folder: a trainer, plans and a configuration.

    Attributes:
        dataset: ``Dataset101_BUSI``.
        variant: its name in the study.
        trainer: name of the trainer.
        base: plans that were planned.
        plans: plans that are trained with: `base`, or `base` with an override.
        overrides: names or paths of the overrides, the first to be applied first.
        configuration: nnU-Net's configuration.
    """

    dataset: str
    variant: str
    trainer: str
    base: str
    plans: str
    overrides: tuple[str, ...]
    configuration: str

    @property
    def name(self) -> str:
        """Name of nnU-Net's folder."""
        return f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def data_identifier(self) -> str:
        """Name of the preprocessed data, as nnU-Net's planners (and ours) give it."""
        # the cascade reads the data of 3d_fullres
        configuration = "3d_fullres" if self.configuration == "3d_cascade_fullres" else self.configuration
        return f"{'nnUNetPlans' if configuration in SHARED_DATA else self.base}_{configuration}"


class Graph:
    """All parts of a study and the files that say that they are done, relative to the study's folder.

    Args:
        study: path of a ``study.yaml``, or the name of one that comes with the package.

    Raises:
        ValueError: see :meth:`Study.read`; or nnUNet_results is not set.
    """

    def __init__(self, study: str | Path):
        self.path = find_study(study)
        self.study = Study.read(self.path)
        self.runs = [f"seed_{seed}" for seed in self.study.seeds] or [UNSEEDED]
        self.datasets = list(self.study.datasets)
        own = self.study.folder
        self.folder = self.resolve(own) if own else nnunet_folder("nnUNet_results") / "studies" / self.study.name

    def resolve(self, path: str) -> Path:
        """A path that the study names; a relative one starts at the study's file."""
        return self.path.parent / filled_in(path)

    def override_file(self, override: str) -> str:
        """A path in a study starts at the study's file; what is no file there is a name in ``plans/``."""
        beside = self.path.parent / override
        return str(beside) if beside.is_file() else override

    @staticmethod
    def results_of(run: str) -> Path:
        """nnU-Net's results folder of a run: every seed has one of its own."""
        results = nnunet_folder("nnUNet_results")
        return results if run == UNSEEDED else results / run

    # ---- parts -------------------------------------------------------------------------------------------------------

    def folds(self, dataset: str) -> list[int]:
        return self.study.datasets[dataset].folds or self.study.folds

    def models(self, dataset: str, variant: str | None = None) -> list[Model]:
        """The models of a data set, of one variant or of all."""
        return [m for m in self._models[dataset].values() if variant in (None, m.variant)]

    def model(self, dataset: str, name: str) -> Model:
        """The model of that name."""
        return self._models[dataset][name]

    def base_of(self, dataset: str, plans: str) -> str:
        """The plans that an override starts from."""
        return next(m.base for m in self._models[dataset].values() if m.plans == plans)

    @cached_property
    def _models(self) -> dict[str, dict[str, Model]]:
        found: dict[str, dict[str, Model]] = {}
        for dataset, own in self.study.datasets.items():
            models = [
                self._model(dataset, name, variant, configuration)
                for name, variant in self.study.variants.items()
                for configuration in own.configurations or self.study.configurations
            ]
            found[dataset] = {model.name: model for model in models}
        return found

    def _model(self, dataset: str, name: str, variant: Variant, configuration: str) -> Model:
        base = variant.plans or self.study.plans
        plans = "_".join([base, *(Path(override).stem for override in variant.overrides)])
        trainer = variant.trainer or self.study.trainer
        return Model(dataset, name, trainer, base, plans, variant.overrides, configuration)

    # ---- files that say that a part is done --------------------------------------------------------------------------

    @staticmethod
    def converted(dataset: str) -> str:
        return f"done/convert/{dataset}.json"

    @staticmethod
    def planned(dataset: str, plans: str) -> str:
        return f"done/plan/{dataset}/{plans}.json"

    @staticmethod
    def preprocessed(dataset: str, identifier: str) -> str:
        return f"done/preprocess/{dataset}/{identifier}.json"

    @staticmethod
    def overridden(dataset: str, plans: str) -> str:
        return f"done/override/{dataset}/{plans}.json"

    def ready_plans(self, dataset: str, plans: str) -> str:
        """Plans that are trained with are there, whether planned or made by an override."""
        base = self.base_of(dataset, plans)
        return self.planned(dataset, plans) if plans == base else self.overridden(dataset, plans)

    def ready(self, model: Model) -> str:
        """The plans of a model are there."""
        return self.ready_plans(model.dataset, model.plans)

    @staticmethod
    def profile(model: Model) -> str:
        return f"profile/{model.dataset}/{model.plans}__{model.configuration}.json"

    @staticmethod
    def trained(run: str, dataset: str, model: str, fold: int) -> str:
        return f"train/{run}/{dataset}/{model}/fold_{fold}.json"

    @staticmethod
    def validated(run: str, dataset: str, model: str, fold: int) -> str:
        return f"evaluation/{run}/{dataset}/{model}/fold_{fold}/summary.json"

    @staticmethod
    def best(run: str, dataset: str, variant: str) -> str:
        return f"best/{run}/{dataset}/{variant}.json"

    @staticmethod
    def predicted(run: str, dataset: str, variant: str) -> str:
        return f"done/predict/{run}/{dataset}/{variant}.json"

    @staticmethod
    def tested(run: str, dataset: str, variant: str) -> str:
        return f"test/{run}/{dataset}/{variant}/summary.json"

    @staticmethod
    def zeroshot(run: str, dataset: str, model: str) -> str:
        return f"zeroshot/{run}/{dataset}/{model}/zeroshot.json"

    def folds_trained(self, run: str, model: Model) -> list[str]:
        """All folds of a model."""
        return [self.trained(run, model.dataset, model.name, fold) for fold in self.folds(model.dataset)]

    def previous_stage(self, run: str, model: Model) -> list[str]:
        """What the cascade's second stage stands on: the first stage's predictions of all folds."""
        if model.configuration != "3d_cascade_fullres":
            return []
        (first,) = (m for m in self.models(model.dataset, model.variant) if m.configuration == "3d_lowres")
        return self.folds_trained(run, first)

    # ---- all of them -------------------------------------------------------------------------------------------------

    def jobs(self) -> dict[str, list[str]]:
        """rule → the file of each of its jobs, in the order of the work; without duplicates."""
        found: dict[str, list[str]] = {
            "convert": [self.converted(dataset) for dataset in [*self.datasets, *self.study.unseen]]
        }
        for rule, file in self._jobs():
            found.setdefault(rule, []).append(file)
        order = ("convert", "plan", "preprocess", "override", "profile", "train", "validate")
        order += ("find_best", "predict", "evaluate", "zeroshot")
        return {rule: list(dict.fromkeys(found[rule])) for rule in order if rule in found}

    def _jobs(self) -> Iterator[tuple[str, str]]:
        for dataset, own in self.study.datasets.items():
            for model in self.models(dataset):
                yield "plan", self.planned(dataset, model.base)
                yield "plan", self.planned(dataset, planned_for(model.data_identifier))
                yield "preprocess", self.preprocessed(dataset, model.data_identifier)
                if model.overrides:
                    yield "override", self.overridden(dataset, model.plans)
                yield "profile", self.profile(model)
                for run in self.runs:
                    for fold in self.folds(dataset):
                        yield "train", self.trained(run, dataset, model.name, fold)
                        yield "validate", self.validated(run, dataset, model.name, fold)
                    if own.zeroshot:
                        yield "zeroshot", self.zeroshot(run, dataset, model.name)
            for run in self.runs:
                for variant in self.study.variants:
                    yield "find_best", self.best(run, dataset, variant)
                    if own.test:
                        yield "predict", self.predicted(run, dataset, variant)
                        yield "evaluate", self.tested(run, dataset, variant)


def configuration_of(identifier: str) -> str:
    """``nnUNetPlans_3d_fullres`` → ``3d_fullres``."""
    return next(c for c in ("2d", "3d_fullres", "3d_lowres") if identifier.endswith(f"_{c}"))


def planned_for(identifier: str) -> str:
    """The plans that data is preprocessed with: ``nnUNetPlans_3d_fullres`` → ``nnUNetPlans``."""
    return identifier.removesuffix(f"_{configuration_of(identifier)}")
