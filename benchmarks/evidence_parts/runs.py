"""What is trained: the stages, their models and their schedules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .sets import SETS

#: plans of the evidence, as `plans.py` writes them
PLANNED, PUBLISHED = "nnUNetPlans_evidence", "nnUNetPlans_evidence_published"
RESENC = "nnUNetPlans_evidence_resenc_m"  # of nnU-Net's own planner


@dataclass(frozen=True)
class Model:
    """A line of the tables.

    Args:
        title: what the tables call it.
        trainer: nnU-Net's or the plugin's, by name.
        plans: what its plans start from.
        override: a file of ``plans/``, or None.
        workers: processes that prepare its batches: colour images and nnU-Net's augmentation take the most.
    """

    title: str
    trainer: str = "nnUNetTrainerLGMSNet"
    plans: str = PLANNED
    override: str | None = None
    workers: int = 4

    @property
    def plans_name(self) -> str:
        return self.plans if self.override is None else f"{self.plans}_{self.override}"


MODELS = {
    "lgmsnet": Model("LGMSNet, nnU-Net's planned levels"),
    "nnunet": Model("nnU-Net's U-Net, nnU-Net's recipe", "nnUNetTrainer", workers=5),
    "resenc_m": Model("nnU-Net's ResEnc M, nnU-Net's recipe", "nnUNetTrainer", plans=RESENC),
    "lgmsnet_nnunetda": Model(
        "LGMSNet, planned levels, nnU-Net's augmentation", "nnUNetTrainerLGMSNet_nnUNetDA", workers=5
    ),
    "published": Model("LGMSNet, the five published levels", plans=PUBLISHED),
    "plain": Model("plain U-Net of LGMSNet's widths", override="plain_unet"),
    "lgmsnet_paper3d": Model("LGMSNet, planned levels, the paper's 3D recipe", "nnUNetTrainerLGMSNet_paper3D"),
}
ABLATIONS = {
    "default": "kernels 3, 5, 7, 9; ratio 3:1; LMS and GMS",
    "kernels_3": "kernel 3 alone",
    "kernels_auto": "kernels from the dataset",
    "ratio_1_0": "ratio 1:0, attention alone",
    "ratio_1_1": "ratio 1:1",
    "ratio_0_1": "ratio 0:1, convolution alone",
    "lms_only": "LMS alone",
    "gms_only": "GMS alone",
}


@dataclass(frozen=True)
class Stage:
    """Trainings that are compared with each other.

    Args:
        dataset: nnU-Net's name of what is trained on.
        configuration: nnU-Net's.
        models: name → model, in the order of worth.
        epochs: length of the schedule.
        seeds: of the initial weights.
        zero_shot: datasets that every model is tested on as well.
        mirrored: whether cases are predicted with mirroring as well.
        iterations: steps an epoch; None for one pass over the training cases.
        folds: how many splits there are: training k has seed k and split k, and begins again after the last.
    """

    dataset: str
    configuration: str
    models: dict[str, Model]
    epochs: int
    seeds: tuple[int, ...] = (0,)
    zero_shot: tuple[str, ...] = ()
    mirrored: bool = True
    iterations: int | None = None
    folds: int = 1


_UNSEEN = {"busi": ("stu",), "isic": ("ph2",)}
_FOLDS = {"kvasir": 3, "busi": 3, "acdc": 5, "hippocampus": 5, "chaos": 5}
SEVEN = {
    f"sets_{name}": Stage(
        row.name,
        row.configuration,
        {name: model for name, model in MODELS.items() if name != ("lgmsnet_paper3d" if row.is_flat else "published")},
        100,
        zero_shot=tuple(SETS[other].name for other in _UNSEEN.get(name, ())),
        iterations=100,
        folds=_FOLDS.get(name, 1),
    )
    for name, row in SETS.items()
    if row.rule
}


def _ablations(name: str, plans: str, left_out: str = "", **more: Any) -> Stage:
    """The default and its variants on one set."""
    models = {n: Model(title, plans=plans, override=n, workers=2) for n, title in ABLATIONS.items() if n != left_out}
    models["default"] = replace(models["default"], override=None)
    return Stage(SETS[name].name, SETS[name].configuration, models, 60, mirrored=False, **more)


STAGES = SEVEN | {
    # the planned kernels of "auto" are those of the default there, as its lesions are large
    "ablations_busi": _ablations("busi", PUBLISHED, "kernels_auto", seeds=(0, 1, 2), zero_shot=(SETS["stu"].name,)),
    "ablations_hippocampus": _ablations("hippocampus", PLANNED),
}


@dataclass(frozen=True)
class Run:
    """One training, with the prediction of its validation cases at the end.

    Args:
        stage: its name in `STAGES`.
        model: its name in the stage.
        epochs: length of the schedule.
        seed: of the initial weights and of this process's random numbers.
        iterations: steps an epoch; None for one pass over the training cases.
    """

    stage: str
    model: str
    epochs: int
    seed: int = 0
    iterations: int | None = None

    @classmethod
    def of_record(cls, record: dict) -> Run:
        """That of a finished training, also of one that was described by more than is asked for today."""
        return cls(**{field.name: record["run"][field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """Its folder and JSON."""
        steps = "" if self.iterations is None else f"x{self.iterations}"
        return f"{self.stage}-{self.model}-{self.epochs}{steps}-s{self.seed}"

    @property
    def of(self) -> Stage:
        return STAGES[self.stage]

    @property
    def settings(self) -> Model:
        return self.of.models[self.model]

    @property
    def fold(self) -> int:
        return self.seed % self.of.folds

    @property
    def predictions(self) -> list[tuple[str, bool]]:
        """What is predicted, and whether mirrored, in the order of worth."""
        ways = (False, True) if self.of.mirrored else (False,)
        return [(name, mirrored) for mirrored in ways for name in ("validation", *self.of.zero_shot)]

    def is_finished(self, folder: Path) -> bool:
        """Whether its folder holds everything."""
        files = ["record.json", *(file_of(*prediction) for prediction in self.predictions)]
        return all((folder / file).is_file() for file in files)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def file_of(name: str, mirrored: bool) -> str:
    return f"{name}{'-mirrored' if mirrored else ''}.npz"


def runs_of(words: str, iterations: int | None = None) -> list[Run]:
    """The trainings that ``STAGE[:MODELS[:EPOCHS[:SEEDS]]]`` names, all models with the first seed, then the next.

    Models and seeds are joined by commas; what is left out or empty is the stage's: ``sets_busi``,
    ``sets_busi:published,nnunet``, ``sets_busi::300``, ``ablations_busi:kernels_3:20:0,1``.

    Raises:
        ValueError: there is no such stage or model, or a number is none.
    """
    stage, models, epochs, seeds = (*words.split(":"), "", "", "")[:4]
    if stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}: choose from {', '.join(STAGES)}.")
    there = STAGES[stage].models
    chosen = models.split(",") if models else list(there)
    if unknown := [name for name in chosen if name not in there]:
        raise ValueError(f"The stage {stage} has no model {unknown[0]!r}: choose from {', '.join(there)}.")
    numbers = [*seeds.split(","), epochs] if seeds else [epochs]
    if any(number and not number.isdecimal() for number in numbers) or epochs == "0":
        raise ValueError(
            f"{words!r} is not understood: write STAGE:MODELS:EPOCHS:SEEDS, such as sets_busi:nnunet:300:0,1."
        )
    wanted = [int(seed) for seed in seeds.split(",")] if seeds else STAGES[stage].seeds
    iterations = iterations or STAGES[stage].iterations
    return [
        Run(stage, model, int(epochs or STAGES[stage].epochs), seed, iterations) for seed in wanted for model in chosen
    ]
