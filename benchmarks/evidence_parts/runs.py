"""What is trained: the stages, their models and their schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .sets import SETS

BUSI, STU, HIPPOCAMPUS = (SETS[name].name for name in ("busi", "stu", "hippocampus"))

#: plans of the evidence, as `plans.py` writes them
PLANNED, PUBLISHED = "nnUNetPlans_evidence", "nnUNetPlans_evidence_published"
RESENC = "nnUNetPlans_evidence_resenc_m"  # of nnU-Net's own planner
ALONE_AT = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Model:
    """A line of the tables.

    Args:
        title: what the tables call it.
        trainer: nnU-Net's or the plugin's, by name.
        plans: what its plans start from.
        override: a file of ``plans/``, or None.
        workers: processes that prepare its batches; `evidence.py loading` measures what they manage.
    """

    title: str
    trainer: str = "nnUNetTrainerLGMSNet"
    plans: str = PLANNED
    override: str | None = None
    workers: int = 2

    @property
    def plans_name(self) -> str:
        return self.plans if self.override is None else f"{self.plans}_{self.override}"


MODELS = {
    "published": Model("LGMSNet, the five published levels", plans=PUBLISHED),
    "lgmsnet": Model("LGMSNet, nnU-Net's planned levels"),
    "lgmsnet_nnunetda": Model(
        "LGMSNet, planned levels, nnU-Net's augmentation", "nnUNetTrainerLGMSNet_nnUNetDA", workers=6
    ),
    "nnunet": Model("nnU-Net's U-Net, nnU-Net's recipe", "nnUNetTrainer", workers=4),
    "plain": Model("plain U-Net of LGMSNet's widths", override="plain_unet"),
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


def ablation(name: str, plans: str) -> Model:
    return Model(ABLATIONS[name], plans=plans, override=None if name == "default" else name)


@dataclass(frozen=True)
class Stage:
    """Trainings that are compared with each other.

    Args:
        dataset: nnU-Net's name of what is trained on.
        configuration: nnU-Net's.
        models: name → model, in the order of worth.
        epochs: length of the schedule; an epoch is one pass over the training cases.
        seeds: of the initial weights.
        zero_shot: datasets that every model is tested on as well.
        equal_time_of: a stage whose measured steps set the epochs, so that every model gets the GPU time of "nnunet".
        mirrored: whether cases are predicted with mirroring as well.
        iterations: steps an epoch; None for one pass over the training cases.
        folds: how many splits there are: training k has seed k and split k, and begins again after the last.
        alone_at: shares of the schedule at which the steps of an epoch have the GPU to themselves.
    """

    dataset: str
    configuration: str
    models: dict[str, Model]
    epochs: int
    seeds: tuple[int, ...] = (0,)
    zero_shot: tuple[str, ...] = ()
    equal_time_of: str | None = None
    mirrored: bool = True
    iterations: int | None = None
    folds: int = 1
    alone_at: tuple[float, ...] = ALONE_AT


#: a batch of volumes with nnU-Net's augmentation is dearer to prepare and quicker to train on than one of images
_WORKERS_3D = {"lgmsnet": 2, "nnunet": 8, "lgmsnet_nnunetda": 8}
_3D = {name: replace(MODELS[name], workers=workers) for name, workers in _WORKERS_3D.items()}
STAGES = {
    "busi": Stage(BUSI, "2d", MODELS, 500, zero_shot=(STU,)),
    "hippocampus": Stage(HIPPOCAMPUS, "3d_fullres", _3D, 200),
    "hippocampus_equal_time": Stage(
        HIPPOCAMPUS,
        "3d_fullres",
        {name: model for name, model in _3D.items() if name != "nnunet"},  # whose time it is
        200,
        equal_time_of="hippocampus",
    ),
    "ablations_busi": Stage(
        BUSI,
        "2d",
        # the planned kernels of "auto" are those of the default there, see `plans.py`
        {name: ablation(name, PUBLISHED) for name in ABLATIONS if name != "kernels_auto"},
        60,
        seeds=(0, 1, 2),
        zero_shot=(STU,),
        mirrored=False,
    ),
    "ablations_hippocampus": Stage(
        HIPPOCAMPUS, "3d_fullres", {name: ablation(name, PLANNED) for name in ABLATIONS}, 60, mirrored=False
    ),
}

#: the seven data sets, every one alike; loading of colour images and nnU-Net's augmentation take the most processes
_EVERYWHERE = {
    "lgmsnet": replace(MODELS["lgmsnet"], workers=4),
    "nnunet": replace(MODELS["nnunet"], workers=5),
    "resenc_m": Model("nnU-Net's ResEnc M, nnU-Net's recipe", "nnUNetTrainer", plans=RESENC, workers=4),
    "lgmsnet_nnunetda": replace(MODELS["lgmsnet_nnunetda"], workers=5),
}
_FLAT_TOO = {"published": replace(MODELS["published"], workers=4), "plain": replace(MODELS["plain"], workers=4)}
_VOLUMES_TOO = {
    "plain": _FLAT_TOO["plain"],
    "lgmsnet_paper3d": Model(
        "LGMSNet, planned levels, the paper's 3D recipe", "nnUNetTrainerLGMSNet_paper3D", workers=4
    ),
}
_UNSEEN = {"busi": ("stu",), "isic": ("ph2",)}
_FOLDS = {"kvasir": 3, "busi": 3, "acdc": 5, "hippocampus": 5, "chaos": 5}
SEVEN = {
    f"sets_{name}": Stage(
        row.name,
        row.configuration,
        _EVERYWHERE | (_FLAT_TOO if row.is_flat else _VOLUMES_TOO),
        100,
        zero_shot=tuple(SETS[other].name for other in _UNSEEN.get(name, ())),
        iterations=100,
        alone_at=(),  # an epoch alone would cost the others more than a minute
        folds=_FOLDS.get(name, 1),
    )
    for name, row in SETS.items()
    if row.rule
}
STAGES |= SEVEN


@dataclass(frozen=True)
class Run:
    """One training, with the prediction of its validation cases at the end.

    Args:
        stage: its name in `STAGES`.
        model: its name in the stage.
        epochs: length of the schedule.
        seed: of the initial weights and of this process's random numbers.
        iterations: steps an epoch; None for one pass over the training cases.
        time_of: with equal time, the epochs of nnU-Net's U-Net whose GPU time it has.
        timed: whether some of its steps have the GPU to themselves; once for all seeds, as others wait for it.
    """

    stage: str
    model: str
    epochs: int
    seed: int = 0
    iterations: int | None = None
    time_of: int | None = None
    timed: bool = True

    @property
    def name(self) -> str:
        """Its folder and JSON."""
        steps = "" if self.iterations is None else f"x{self.iterations}"
        return f"{self.stage}-{self.model}-{self.time_of or self.epochs}{steps}-s{self.seed}"

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

    Models and seeds are joined by commas; what is left out or empty is the stage's: ``busi``,
    ``busi:published,nnunet``, ``busi::300``, ``ablations_busi:kernels_3:20:0,1``.

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
        raise ValueError(f"{words!r} is not understood: write STAGE:MODELS:EPOCHS:SEEDS, such as busi:nnunet:300:0,1.")
    wanted = [int(seed) for seed in seeds.split(",")] if seeds else STAGES[stage].seeds
    iterations = iterations or STAGES[stage].iterations
    return [
        Run(stage, model, int(epochs or STAGES[stage].epochs), seed, iterations, timed=seed == wanted[0])
        for seed in wanted
        for model in chosen
    ]


def with_equal_time(run: Run, records: Sequence[dict]) -> Run | None:
    """The run with as many epochs as fit into the GPU time of nnU-Net's U-Net; None while that is not known.

    Args:
        run: of a stage with `equal_time_of`.
        records: of finished runs, see `training.py`.
    """
    timed = [r for r in records if r["run"]["stage"] == run.of.equal_time_of and r["step_ms_alone"]]
    steps = {r["run"]["model"]: r["step_ms_alone"][0] for r in timed}
    if "nnunet" not in steps or run.model not in steps:
        return None
    epochs = max(1, round(run.epochs * steps["nnunet"] / steps[run.model]))
    return replace(run, epochs=epochs, time_of=run.epochs)
