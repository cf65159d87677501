"""What is trained: the stages, their models and their schedules."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .sets import SETS, DataSet

#: plans of the evidence, as `plans.py` writes them
PLANNED, PUBLISHED = "nnUNetPlans_evidence", "nnUNetPlans_evidence_published"
RESENC = "nnUNetPlans_evidence_resenc_m"  # of nnU-Net's own planner
EPOCHS = STEPS = 100  # of a training, and of each of its epochs


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


MODELS = {  # in the order of worth
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
#: the sets that are trained on
STAGES = {f"sets_{name}": row for name, row in SETS.items() if row.rule}


def models_of(row: DataSet) -> dict[str, Model]:
    """The published levels are those of the 2D experiments, the 3D recipe is for volumes."""
    left_out = "lgmsnet_paper3d" if row.is_flat else "published"
    return {name: model for name, model in MODELS.items() if name != left_out}


@dataclass(frozen=True)
class Run:
    """One training, with the prediction of its validation cases at the end.

    Args:
        stage: its name in `STAGES`.
        model: its name in `MODELS`.
        epochs: length of the schedule.
        seed: of the initial weights and of this process's random numbers; training k has split k, and begins again
            after the last.
        iterations: steps an epoch.
    """

    stage: str
    model: str
    epochs: int = EPOCHS
    seed: int = 0
    iterations: int = STEPS

    @classmethod
    def of_record(cls, record: dict) -> Run:
        """That of a finished training, also of one that was described by more than is asked for today."""
        return cls(**{field.name: record["run"][field.name] for field in fields(cls)})

    @property
    def name(self) -> str:
        """Its folder and JSON."""
        return f"{self.stage}-{self.model}-{self.epochs}x{self.iterations}-s{self.seed}"

    @property
    def of(self) -> DataSet:
        return STAGES[self.stage]

    @property
    def settings(self) -> Model:
        return MODELS[self.model]

    @property
    def fold(self) -> int:
        return self.seed % self.of.folds

    @property
    def predictions(self) -> list[tuple[str, bool]]:
        """What is predicted, and whether mirrored, in the order of worth."""
        unseen = [SETS[name].name for name in self.of.unseen]
        return [(name, mirrored) for mirrored in (False, True) for name in ("validation", *unseen)]

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

    Models and seeds are joined by commas; what is left out or empty is all models, 100 epochs, seed 0: ``sets_busi``,
    ``sets_busi:published,nnunet``, ``sets_busi::50``, ``sets_busi:lgmsnet:50:0,1``.

    Raises:
        ValueError: there is no such stage or model, or a number is none.
    """
    stage, models, epochs, seeds = (*words.split(":"), "", "", "")[:4]
    if stage not in STAGES:
        raise ValueError(f"There is no stage {stage!r}: choose from {', '.join(STAGES)}.")
    there = models_of(STAGES[stage])
    chosen = models.split(",") if models else list(there)
    if unknown := [name for name in chosen if name not in there]:
        raise ValueError(f"The stage {stage} has no model {unknown[0]!r}: choose from {', '.join(there)}.")
    numbers = [*seeds.split(","), epochs] if seeds else [epochs]
    if any(number and not number.isdecimal() for number in numbers) or epochs == "0":
        raise ValueError(
            f"{words!r} is not understood: write STAGE:MODELS:EPOCHS:SEEDS, as in sets_busi:nnunet:50:0,1."
        )
    return [
        Run(stage, model, int(epochs or EPOCHS), int(seed), iterations or STEPS)
        for seed in (seeds or "0").split(",")
        for model in chosen
    ]
