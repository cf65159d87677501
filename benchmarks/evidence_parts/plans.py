"""What nnU-Net makes of a gathered set, and the plans of the evidence beside its own."""

from __future__ import annotations

from functools import partial

from nnunet_lgms.planning.auto_kernels import components_of
from nnunet_lgms.planning.override import override_plans
from nnunet_lgms.planning.plans_files import plans_file, read_override, read_plans, write_plans

from .runs import PLAIN, PLANNED, PUBLISHED, RESENC, models_of
from .sets import DataSet

#: the paper's batch and its Dice per sample; nnU-Net would take a batch of 32 for BUSI, and one Dice over all of it
PAPER = {"batch_size": {"2d": 16}, "batch_dice": {"2d": False}}
#: plans of the evidence → nnU-Net's that they are made of, and what changes
CHANGES = {
    PLANNED: ("nnUNetPlans", PAPER),
    PUBLISHED: ("nnUNetPlans", PAPER | {"levels": {"2d": 5}}),
    RESENC: ("nnUNetResEncUNetMPlans", PAPER),
    PLAIN: ("nnUNetPlans", PAPER | read_override("plain_unet")),
}


def prepare(row: DataSet) -> None:
    """Plans and preprocessed cases of a gathered set, in nnU-Net's folders and by its own functions."""
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    extract_fingerprints([row.number])
    for planner in ("ExperimentPlanner", "nnUNetPlannerResEncM"):
        plan_experiments([row.number], planner)
    preprocess([row.number], configurations=[row.configuration], num_processes=[default_num_processes])
    for name in {model.plans for model in models_of(row).values()}:
        base, override = CHANGES[name]
        plans = read_plans(row.name, base)
        changed = override_plans(plans, override, name, [row.configuration], partial(components_of, row.name, plans))
        write_plans(plans_file(row.name, name), changed, force=True)
