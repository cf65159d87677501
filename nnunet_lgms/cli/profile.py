"""`nnunet_lgms profile DATASET -c CONFIGURATION`: what a plan costs, beside nnU-Net's own network."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from nnunet_lgms.files import atomic_write, read_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="parameters, GMAC, receptive field, memory and time of a plan",
        description="What LGMSNet costs with a plan, beside nnU-Net's own network of that plan: parameters, GMAC, "
        "receptive field per level, memory and time of a training and an inference step on this machine.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="nnU-Net's number or name of the dataset")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", metavar="CONFIGURATION")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="plans (nnUNetPlans)")
    parser.add_argument("--against", metavar="PLANS", help="plans whose own network stands beside (default: the same)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="where steps are measured (default: cuda if there is one)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps; 0 for none (default: 10, on a CPU 1)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile, as with nnUNet_compile=f")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: PLANS_CONFIGURATION_profile.json with the plans"
    )


def run(args: argparse.Namespace) -> int:
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from tqdm import tqdm

    from nnunet_lgms.planning.override import resolved
    from nnunet_lgms.planning.plans_files import dataset_name, environment_folder, read_dataset_json, read_plans
    from nnunet_lgms.planning.profile import (
        LGMSNET,
        NNUNET,
        Subject,
        as_table,
        machine,
        measured_profile,
        static_profile,
    )

    dataset = dataset_name(args.dataset)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and PyTorch finds none: use --device cpu.")
    steps = args.steps if args.steps is not None else (10 if device == "cuda" else 1)
    if steps < 0:
        raise ValueError(f"--steps {steps} is negative: give 0 or more.")
    folder = environment_folder("nnUNet_preprocessed") / dataset
    dataset_json = read_dataset_json(dataset)
    # as file names too
    own, against = (name.removesuffix(".json") for name in (args.plans, args.against or args.plans))
    subjects = []
    for kind, plans_name in ((LGMSNET, own), (NNUNET, against)):
        plans = read_plans(dataset, plans_name)
        if args.configuration not in plans["configurations"]:
            raise ValueError(
                f"{plans_name} has no configuration {args.configuration!r}: there are "
                f"{', '.join(plans['configurations'])}."
            )
        resolved(PlansManager(plans), args.configuration)
        subjects.append(Subject(kind, plans, args.configuration, dataset_json))
    target = args.json or folder / f"{own}_{args.configuration}_profile.json"
    _check_target(target, steps)

    profiles = []
    for subject in tqdm(subjects, desc=f"profiling on {device}"):
        profile = static_profile(subject)
        if steps:
            profile["steps"] = measured_profile(subject, device, steps, device == "cuda" and not args.no_compile)
        profiles.append(profile)
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps({"machine": machine(device), "networks": profiles}, indent=2) + "\n", "utf-8")
    print(f"{dataset}, {args.configuration}; steps on {machine(device)['name']}\n")
    print(as_table(profiles))
    print(f"\nwritten to {target}")
    return 0


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
