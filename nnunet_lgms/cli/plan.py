"""`nnunet_lgms plan DATASET --vram GB`: nnU-Net's planning with LGMSNet's own need of memory."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="nnU-Net's planning, with patch and batch for LGMSNet on your card",
        description="Plan patch and batch size so that LGMSNet fills the card. nnU-Net finds planners inside its own "
        "package only, so this command runs ours; stock nnUNetv2_train reads the plans with -p.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="nnU-Net's number or name of the dataset")
    parser.add_argument(
        "--vram", type=float, metavar="GB", help="memory of the card (default: this machine's, or else 8)"
    )
    parser.add_argument("--apply", metavar="FILE", help="plan for these settings: a JSON file, or a name in plans/")
    parser.add_argument("--as", dest="name", metavar="NAME", help="name of the plans (nnUNetLGMSNetPlans_<GB>G)")
    parser.add_argument("--force", action="store_true", help="replace plans of that name")


def run(args: argparse.Namespace) -> int:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    from nnunet_lgms.config import KEY, LGMSSettings
    from nnunet_lgms.config.resolve import Topology, without_effect
    from nnunet_lgms.dataset_json import n_channels, read_dataset_json
    from nnunet_lgms.parallel import default_workers
    from nnunet_lgms.planning.auto_kernels import components_of
    from nnunet_lgms.planning.commands import nnunet_commands
    from nnunet_lgms.planning.planner import GIB, PLANS_NAME, LGMSNetPlanner
    from nnunet_lgms.planning.plans_files import (
        check_writable,
        dataset_id,
        dataset_name,
        environment_folder,
        plans_file,
        plans_lock,
        read_override,
    )

    vram = _vram(args.vram)
    settings = read_override(args.apply) if args.apply else {}
    dataset = dataset_name(args.dataset)
    raw, preprocessed = (environment_folder(f"nnUNet_{kind}") / dataset for kind in ("raw", "preprocessed"))
    if not (raw / "dataset.json").is_file():
        raise ValueError(
            f"{dataset} is not in nnUNet_raw, where planning reads it: put it there or correct nnUNet_raw."
        )
    description = read_dataset_json(raw)
    n_channels(description)
    if not isinstance(description.get("numTraining"), int):
        raise ValueError(f"dataset.json of {dataset} has no numTraining, the number of training cases: add it.")
    name = (f"{PLANS_NAME}_{vram:g}G" if args.name is None else args.name).removesuffix(".json")
    target = plans_file(dataset, name)
    with plans_lock(target):
        check_writable(target, args.force)
        if not (preprocessed / "dataset_fingerprint.json").is_file():
            extract_fingerprint_dataset(dataset_id(dataset), num_processes=default_workers(), clean=False)
        _check_fingerprint(preprocessed / "dataset_fingerprint.json")

        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints every configuration as one long line
            planner = LGMSNetPlanner(dataset, vram, settings, name)
            reader = {
                "image_reader_writer": planner.determine_reader_writer().__name__,
                "label_manager": "LabelManager",
                "transpose_forward": [int(i) for i in planner.determine_transpose()[0]],
            }
            planner.measure = lambda: components_of(dataset, reader)
            plans = planner.plan_experiment()

    print(f"{target.name} of {dataset}, planned for {vram:g} GiB:\n")
    print(f"  {'configuration':20} {'patch':>14} {'batch':>6} {'levels':>7} {'training step':>14}")
    own = [c for c, content in plans["configurations"].items() if "architecture" in content]
    for configuration in own:
        content = plans["configurations"][configuration]
        patch = "x".join(map(str, content["patch_size"]))
        levels = content["architecture"]["arch_kwargs"]["n_stages"]
        memory = planner.memory_of(content) / GIB
        print(f"  {configuration:20} {patch:>14} {content['batch_size']:>6} {levels:>7} {memory:>10.1f} GiB")
    limits = {c: planner.limits_of(plans["configurations"][c]) for c in own}
    for limit in sorted({limit for limit in limits.values() if limit}):
        print(f"\n{', '.join(c for c in own if limits[c] == limit)}: {limit}.")
    for configuration in own if settings else []:
        content = plans["configurations"][configuration]
        for remark in without_effect(LGMSSettings.from_plan(content[KEY]), Topology.of(content), settings):
            print(f"\n{configuration}: {remark}")
    print("\nTrain and predict with (after preprocessing, where a line for it is given):\n")
    print(nnunet_commands(dataset, plans, list(plans["configurations"]), preprocessed))
    return 0


def _check_fingerprint(path: Path) -> None:
    """nnU-Net's fingerprint has what planning reads; a killed extraction leaves half of it."""
    from nnunet_lgms.files import read_json

    needed = {"spacings", "shapes_after_crop", "median_relative_size_after_cropping"}
    needed.add("foreground_intensity_properties_per_channel")
    try:
        content = read_json(path)
    except ValueError:
        content = None
    if not isinstance(content, dict) or needed - content.keys() or not content["spacings"]:
        raise ValueError(f"{path} is no whole fingerprint of nnU-Net's: remove it, and it is extracted again.")


def _vram(given: float | None) -> float:
    import torch

    if given is not None and not (math.isfinite(given) and given > 0):
        raise ValueError(f"--vram {given:g} is no amount of memory: give the card's GiB, such as 8 or 24.")
    if given is None and torch.cuda.is_available():
        return float(round(torch.cuda.get_device_properties(0).total_memory / 2**30))
    return 8.0 if given is None else given
