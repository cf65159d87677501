"""`nnunet_lgms override DATASET --apply FILE --as NAME`: a new plans file with another LGMSNet."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "override",
        help="new plans with other kernels, ratios, widths, blocks, patch or batch (docs/reference/plans.md)",
        description="Write a new plans file beside an old one: same data, another LGMSNet, and another patch, batch or "
        "number of levels if asked for. The preprocessed data is shared. Prints nnU-Net's commands that train and "
        "predict with it.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="nnU-Net's number or name of the dataset")
    parser.add_argument("--plans", default="nnUNetPlans", metavar="NAME", help="plans to start from (nnUNetPlans)")
    parser.add_argument(
        "--apply",
        nargs="+",
        default=[],
        metavar="FILE",
        help='a JSON file {"lgmsnet": {...}}, or a name in plans/; of several, the later wins',
    )
    parser.add_argument("--patch-size", nargs="+", type=int, metavar="N", help="voxels of a patch along each axis")
    parser.add_argument("--batch-size", type=int, metavar="N", help="patches of a batch")
    parser.add_argument("--as", dest="name", metavar="NAME", help="name of the new plans (default: PLANS_FILE)")
    parser.add_argument(
        "-c", nargs="+", metavar="CONFIGURATION", help="change these configurations only (default: all)"
    )
    parser.add_argument("--force", action="store_true", help="replace plans of that name")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.nnunet_folders import dataset_name, nnunet_folder
    from nnunet_lgms.planning.auto_kernels import components_of
    from nnunet_lgms.planning.commands import nnunet_commands
    from nnunet_lgms.planning.memory import memory_remarks
    from nnunet_lgms.planning.override import override_plans
    from nnunet_lgms.planning.plans_files import (
        check_writable,
        plans_file,
        plans_lock,
        read_dataset_json,
        read_plans,
        write_plans,
    )

    override = _override(args)
    dataset = dataset_name(args.dataset)
    start = args.plans.removesuffix(".json")
    plans = read_plans(dataset, start)
    name = ("_".join([start, *_parts_of_name(args)]) if args.name is None else args.name).removesuffix(".json")
    target = plans_file(dataset, name)
    if name == start:
        raise ValueError(f"--as {name} would replace the plans that it starts from: choose another name.")
    preprocessed = nnunet_folder("nnUNet_preprocessed") / dataset
    with plans_lock(target):
        check_writable(target, args.force)
        description = read_dataset_json(dataset)
        new = override_plans(plans, override, name, args.c, lambda: components_of(dataset, plans))
        remarks = memory_remarks(plans, new, args.c, description)
        commands = nnunet_commands(dataset, new, args.c or list(new["configurations"]), preprocessed)
        write_plans(target, new, args.force)
    print(f"{target.name} written beside {start}.json of {dataset}.")
    smaller = f"nnunet_lgms override {args.dataset} --plans {name} --patch-size N ... --batch-size N"
    for needs, is_more in remarks:
        print(needs + (f"; for a smaller patch or batch: {smaller}, or {_plan(args)}" if is_more else ""))
    print("\nTrain and predict with:\n")
    print(commands)
    return 0


def _override(args: argparse.Namespace) -> dict[str, Any]:
    from nnunet_lgms.planning.plans_files import read_override

    given = {"patch_size": args.patch_size, "batch_size": args.batch_size}
    given = {key: value for key, value in given.items() if value is not None}
    if not args.apply and not given:
        raise ValueError("There is nothing to change: give --apply, --patch-size or --batch-size.")
    return {**read_override(*args.apply), **given}


def _parts_of_name(args: argparse.Namespace) -> list[str]:
    parts = [Path(file).stem for file in args.apply]
    if args.patch_size:
        parts.append("p" + "x".join(map(str, args.patch_size)))
    if args.batch_size:
        parts.append(f"b{args.batch_size}")
    return parts


def _plan(args: argparse.Namespace) -> str:
    """The command that plans patch and batch for a card."""
    apply = f" --apply {shlex.join(args.apply)}" if args.apply else ""
    return f"nnunet_lgms plan {args.dataset} --vram GB{apply}"
