"""What is trained: models, their plans and their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .sets import FLAT, SETS, DataSet

PLANNED, PUBLISHED = "nnUNetPlans_evidence", "nnUNetPlans_evidence_published"
RESENC, PLAIN = "nnUNetPlans_evidence_resenc_m", "nnUNetPlans_evidence_plain_unet"
STEPS = 100  # of an epoch


@dataclass(frozen=True)
class Model:
    """A line of the tables.

    Args:
        title: what the tables call it.
        trainer: nnU-Net's or the plugin's, by name.
        plans: as `plans.py` writes them.
        workers: processes that prepare its batches: colour images, nnU-Net's augmentation and ResEnc M's batches in 3D,
            up to seven times the others', take the most.
    """

    title: str
    trainer: str = "nnUNetTrainerLGMSNet"
    plans: str = PLANNED
    workers: int = 4


MODELS = {  # in the order of worth
    "lgmsnet": Model("LGMSNet, nnU-Net's planned levels"),
    "nnunet": Model("nnU-Net's U-Net, nnU-Net's recipe", "nnUNetTrainer", workers=5),
    "resenc_m": Model("nnU-Net's ResEnc M, nnU-Net's recipe", "nnUNetTrainer", RESENC, workers=8),
    "lgmsnet_nnunetda": Model(
        "LGMSNet, planned levels, nnU-Net's augmentation", "nnUNetTrainerLGMSNet_nnUNetDA", workers=5
    ),
    "published": Model("LGMSNet, the five published levels", plans=PUBLISHED),
    "plain": Model("plain U-Net of LGMSNet's widths", plans=PLAIN),
    "lgmsnet_paper3d": Model("LGMSNet, planned levels, the paper's 3D recipe", "nnUNetTrainerLGMSNet_paper3D"),
}
#: the sets that are trained on
STAGES = {f"sets_{name}": row for name, row in SETS.items() if row.rule}


def models_of(row: DataSet) -> dict[str, Model]:
    """The published levels are those of the 2D experiments, the 3D recipe is for volumes."""
    left_out = "lgmsnet_paper3d" if row.configuration == FLAT else "published"
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
    epochs: int
    seed: int = 0
    iterations: int = STEPS

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


def runs_of(sets: Sequence[str], models: Sequence[str], seeds: Sequence[int], **schedule: int) -> list[Run]:
    """These trainings, those with the first seed before those with the next; each set has its `models_of`."""
    return [
        Run(f"sets_{name}", model, seed=seed, **schedule)
        for seed in seeds
        for name in sets
        for model in models
        if model in models_of(SETS[name])
    ]
