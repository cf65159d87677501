"""`nnunet_lgms plan DATASET --vram GB`: nnU-Net's planning with LGMSNet's own need of memory."""

from __future__ import annotations

import argparse
import math


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
    parser.add_argument(
        "--apply", nargs="+", default=[], metavar="FILE", help="plan for these settings: JSON files, or names in plans/"
    )
    parser.add_argument("--as", dest="name", metavar="NAME", help="name of the plans (nnUNetLGMSNetPlans_<GB>G)")
    parser.add_argument("--force", action="store_true", help="replace plans of that name")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.config import KEY, LGMSSettings
    from nnunet_lgms.config.resolve import Topology, without_effect
    from nnunet_lgms.nnunet_folders import dataset_name, nnunet_folder
    from nnunet_lgms.planning.commands import nnunet_commands
    from nnunet_lgms.planning.plan import plan_dataset
    from nnunet_lgms.planning.planner import GIB, PLANS_NAME
    from nnunet_lgms.planning.plans_files import read_override

    vram = _vram(args.vram)
    override = read_override(*args.apply)
    if decided := [key for key in override if key != KEY]:
        raise ValueError(
            f"--apply {' '.join(args.apply)} sets {', '.join(decided)}, which this command is to find out: use "
            "nnunet_lgms override, which takes them as they are."
        )
    settings = override.get(KEY, {})
    dataset = dataset_name(args.dataset)
    preprocessed = nnunet_folder("nnUNet_preprocessed") / dataset
    name = (f"{PLANS_NAME}_{vram:g}G" if args.name is None else args.name).removesuffix(".json")
    planner, plans, target = plan_dataset(dataset, vram, settings, name, force=args.force)

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


def _vram(given: float | None) -> float:
    import torch

    if given is not None and not (math.isfinite(given) and given > 0):
        raise ValueError(f"--vram {given:g} is no amount of memory: give the card's GiB, such as 8 or 24.")
    if given is None and torch.cuda.is_available():
        return float(round(torch.cuda.get_device_properties(0).total_memory / 2**30))
    return 8.0 if given is None else given
