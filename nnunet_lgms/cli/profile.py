"""`nnunet_lgms profile DATASET -c CONFIGURATION`: what a plan costs, beside nnU-Net's own network."""

from __future__ import annotations

import argparse
from pathlib import Path


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

    from nnunet_lgms.nnunet_folders import dataset_name
    from nnunet_lgms.planning.profile import as_table, machine
    from nnunet_lgms.planning.profile_file import profile_plans

    dataset = dataset_name(args.dataset)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    profiles, target = profile_plans(
        dataset,
        args.plans,
        args.configuration,
        against=args.against,
        device=device,
        steps=args.steps,
        compiled=not args.no_compile,
        target=args.json,
    )
    print(f"{dataset}, {args.configuration}; steps on {machine(device)['name']}\n")
    print(as_table(profiles))
    print(f"\nwritten to {target}")
    return 0
