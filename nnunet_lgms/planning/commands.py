"""nnU-Net's commands for plans, as its users type them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_lgms.nnunet_folders import dataset_number

TRAINER = "nnUNetTrainerLGMSNet"


def nnunet_commands(dataset: str, plans: dict[str, Any], configurations: Sequence[str], preprocessed: Path) -> str:
    """Commands to train and predict with each configuration; to preprocess first, where there is no data yet.

    nnU-Net's default device is the GPU; without one the lines say so, or they would end in an error.
    """
    device = "" if torch.cuda.is_available() else " -device cpu"
    number, name = dataset_number(dataset), shlex.quote(plans["plans_name"])
    manager = PlansManager(plans)
    blocks = []
    for configuration in configurations:
        data = preprocessed / manager.get_configuration(configuration).data_identifier
        configuration = shlex.quote(configuration)
        lines = [] if data.is_dir() else [f"nnUNetv2_preprocess -d {number} -plans_name {name} -c {configuration}"]
        lines.append(f"nnUNetv2_train {number} {configuration} 0 -p {name} -tr {TRAINER}{device}")
        where = f"-i INPUT -o OUTPUT -d {number} -c {configuration} -f 0"
        lines.append(f"nnUNetv2_predict {where} -p {name} -tr {TRAINER}{device}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
