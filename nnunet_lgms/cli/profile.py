"""`nnunet_lgms profile DATASET`: what a plan costs beside nnU-Net's own network, or what the published one does."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="parameters, GMAC, receptive field, memory and time of a plan",
        description="What LGMSNet costs with a plan, beside nnU-Net's own network of that plan: parameters, GMAC, "
        "receptive field per level, memory, and on a GPU the time of a training and an inference step. With --paper, "
        "parameters and GMAC of the published network beside others; no data set is needed.",
    )
    parser.add_argument("dataset", nargs="?", metavar="DATASET", help="nnU-Net's number or name of the dataset")
    parser.add_argument("--paper", action="store_true", help="the published network in 2D and 3D, without a data set")
    parser.add_argument(
        "-c", dest="configuration", metavar="CONFIGURATION", help="default: 3d_fullres if it is there, else the first"
    )
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="plans (nnUNetPlans)")
    parser.add_argument("--against", metavar="PLANS", help="plans whose own network stands beside (default: the same)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="where steps are measured (default: cuda if there is one)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps; 0 for none (default: 10, on a CPU 0)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile, as with nnUNet_compile=f")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: PLANS_CONFIGURATION_profile.json with the plans"
    )


def run(args: argparse.Namespace) -> int:
    if args.paper:
        return _paper(args)
    if args.dataset is None:
        raise ValueError("Name a DATASET to profile its plans, or give --paper for the published network.")
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
    steps = f"; steps on {machine(device)['name']}, median and range" if "steps" in profiles[0] else ""
    print(f"{dataset}, {profiles[0]['configuration']}{steps}\n")
    print(as_table(profiles))
    print(f"\nwritten to {target}")
    return 0


def _paper(args: argparse.Namespace) -> int:
    import json

    from nnunet_lgms.files import atomic_write
    from nnunet_lgms.planning.paper import paper_profiles, paper_table

    if args.dataset is not None or args.configuration is not None:
        raise ValueError("--paper is of no data set: leave out DATASET and -c, or leave out --paper.")
    profiles = {dim: paper_profiles(dim) for dim in (2, 3)}
    print("\n\n".join(paper_table(dim, found) for dim, found in profiles.items()))
    print("\nGMAC: multiplications and additions of convolutions, linear layers and attention products, in 10^9.")
    if args.json:
        with atomic_write(args.json) as temporary:
            content = {f"{dim}d": found for dim, found in profiles.items()}
            temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return 0
