"""What plans cost, measured and written to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet_folders import nnunet_folder
from nnunet_lgms.planning.override import resolved
from nnunet_lgms.planning.plans_files import read_dataset_json, read_plans
from nnunet_lgms.planning.profile import LGMSNET, NNUNET, Subject, machine, measured_profile, static_profile


def profile_plans(
    dataset: str,
    plans_name: str,
    configuration: str | None = None,
    *,
    against: str | None = None,
    device: str,
    steps: int | None = None,
    compiled: bool = True,
    target: Path | None = None,
) -> tuple[list[dict[str, Any]], Path]:
    """Profiles LGMSNet in one plan and nnU-Net's network in the same or another one.

    Args:
        dataset: nnU-Net's name of it.
        plans_name: plans of LGMSNet.
        configuration: of both plans; default: 3d_fullres if it is there, else the first.
        against: plans of nnU-Net's network; default: the same.
        device: "cuda" or "cpu".
        steps: training steps that are timed; default: 10 on a GPU, none elsewhere.
        compiled: whether nnU-Net's network is compiled on a GPU.
        target: the file; default: PLANS_CONFIGURATION_profile.json beside the plans.

    Returns:
        Both profiles, and the file.

    Raises:
        ValueError: something of it is not there, or the file may not be written.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and PyTorch finds none: use --device cpu.")
    steps = steps if steps is not None else (10 if device == "cuda" else 0)
    if steps < 0:
        raise ValueError(f"--steps {steps} is negative: give 0 or more.")
    dataset_json = read_dataset_json(dataset)
    # as file names too
    own, other = (name.removesuffix(".json") for name in (plans_name, against or plans_name))
    if configuration is None:
        there = list(read_plans(dataset, own)["configurations"])
        configuration = "3d_fullres" if "3d_fullres" in there else there[0]
    subjects = []
    for kind, name in ((LGMSNET, own), (NNUNET, other)):
        plans = read_plans(dataset, name)
        if configuration not in plans["configurations"]:
            raise ValueError(
                f"{name} has no configuration {configuration!r}: there are {', '.join(plans['configurations'])}."
            )
        resolved(PlansManager(plans), configuration)
        subjects.append(Subject(kind, plans, configuration, dataset_json))
    if target is None:
        target = nnunet_folder("nnUNet_preprocessed") / dataset / f"{own}_{configuration}_profile.json"
    _check_target(target, steps)
    profiles = []
    for subject in tqdm(subjects, desc=f"profiling on {device}"):
        profile = static_profile(subject)
        if steps:
            profile["steps"] = measured_profile(subject, device, steps, device == "cuda" and compiled)
        profiles.append(profile)
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps({"machine": machine(device), "networks": profiles}, indent=2) + "\n", "utf-8")
    return profiles, target


def _check_target(target: Path, steps: int) -> None:
    """Before anything is measured: the profile can be written, and replaces nothing but an earlier profile."""
    if not target.parent.is_dir():
        raise ValueError(f"--json {target}: there is no folder {target.parent}; make it, or name a file in another.")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target.parent} cannot be written to: name a file in another folder with --json.")
    if not target.exists():
        return
    try:
        earlier = read_json(target) if target.is_file() else None
    except ValueError:
        earlier = None
    networks = earlier.get("networks") if isinstance(earlier, dict) and "machine" in earlier else None
    if not isinstance(networks, list) or not all(isinstance(network, dict) for network in networks):
        raise ValueError(f"{target} is no profile and stays: name another file with --json.")
    if not steps and any("steps" in network for network in networks):
        raise ValueError(f"{target} holds measured steps, which --steps 0 would remove: name another file with --json.")
