"""`nnunet_lgms convert NAME SOURCE --id N`: a downloaded dataset of the paper becomes an nnU-Net dataset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

LARGEST_SIZE = 8192  # pixels


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    from nnunet_lgms.data.datasets import DESCRIPTIONS

    width = max(map(len, DESCRIPTIONS))
    layouts = [
        f"  {name if first else '':{width}}  {layout}"
        for name, description in DESCRIPTIONS.items()
        for first, layout in zip((True, False, False), description.layouts)
    ]
    parser = subparsers.add_parser(
        "convert",
        help="a downloaded dataset of the paper becomes an nnU-Net dataset",
        description="Check every image and mask of a downloaded dataset, then write it to nnUNet_raw and verify it "
        "with nnU-Net's own integrity check. SOURCE is the unpacked folder, or any folder above it.",
        epilog="datasets and the files that are expected:\n" + "\n".join(layouts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=DESCRIPTIONS, help="one of the names below")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with the files as published")
    parser.add_argument("--id", type=int, required=True, metavar="N", help="nnU-Net's number of the dataset, 1 to 999")
    parser.add_argument("--splits", choices=["paper"], help="write splits_final.json with the paper's folds")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="resize flat images to a square (the paper: 256)")
    parser.add_argument("--include-normal", action="store_true", help="BUSI: images without a lesion, too")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be converted, and list it")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core, at most 8)")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.data.convert import convert, splits_remark, write_splits
    from nnunet_lgms.data.datasets import DESCRIPTIONS
    from nnunet_lgms.nnunet_folders import nnunet_folder

    description = DESCRIPTIONS[args.name]
    if args.size is not None and not 8 <= args.size <= LARGEST_SIZE:
        raise ValueError(f"--size {args.size} is no size for an image: give 8 to {LARGEST_SIZE}; the paper uses 256.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not possible: give a number of at least 1.")
    raw = nnunet_folder("nnUNet_raw")
    preprocessed = nnunet_folder("nnUNet_preprocessed") if args.splits else None
    conversion = convert(
        description,
        args.source,
        args.id,
        raw=raw,
        groups=("normal",) if args.include_normal else (),
        size=args.size,
        skip_bad=args.skip_bad,
        workers=args.workers,
    )
    if conversion.skipped:
        print(f"Left out, {len({p.identifier for p in conversion.skipped})} case(s):", file=sys.stderr)
        print("\n".join(f"  {problem}" for problem in conversion.skipped), file=sys.stderr)
    for remark in conversion.remarks:
        print(f"Note: {remark}")
    if preprocessed is not None:
        print(f"Splits: {write_splits(description, conversion, preprocessed)}")
        if remark := splits_remark(description, conversion):
            print(f"Note: {remark}")
    print(f"{len(conversion.identifiers)} cases are in {conversion.folder}")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.id}")
    return 0
