"""`nnunet_lgms convert NAME SOURCE --id N`: a dataset of the paper, or any folder, becomes an nnU-Net dataset."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

LARGEST_SIZE = 8192  # pixels
FOLDER = "folder"


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
        help="a downloaded dataset of the paper, or any folder, becomes an nnU-Net dataset",
        description="Check every image and mask, then write them to nnUNet_raw and verify the dataset with nnU-Net's "
        "own integrity check. SOURCE is the unpacked download of a dataset of the paper, or any folder above it. For "
        "data of your own: convert folder IMAGES MASKS --id N.",
        epilog="datasets and the files that are expected:\n" + "\n".join(layouts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", metavar="NAME", type=str.lower, choices=[*DESCRIPTIONS, FOLDER], help="folder, or one of those below"
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with the files as published, or of images")
    parser.add_argument("masks", metavar="MASKS", type=Path, nargs="?", help="folder: the masks or label maps")
    parser.add_argument("--id", type=int, required=True, metavar="N", help="nnU-Net's number of the dataset, 1 to 999")
    parser.add_argument(
        "--splits", metavar="paper|N", help="write splits_final.json: the paper's folds; folder: N folds of patients"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="resize flat images to a square (the paper: 256)")
    parser.add_argument("--include-normal", action="store_true", help="BUSI: images without a lesion, too")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be converted, and list it")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core, at most 8)")
    own = parser.add_argument_group("only for folder")
    own.add_argument("--name", dest="title", metavar="NAME", help="of the dataset (default: the folder's)")
    own.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what a label file holds: liver=1 tumour=2, cup=128, lesion=#ff0000; they become 1, 2, … in this order "
        "(default, flat images only: masks, one thing on black)",
    )
    own.add_argument(
        "--channels",
        nargs="+",
        default=[],
        metavar="NAME",
        help="nnU-Net's channel names, which choose the normalisation, such as CT (default, flat images only: "
        "three of rgb_to_0_1 in colour, one otherwise)",
    )
    own.add_argument("--image-names", metavar="TEMPLATE", help="such as '{case}_{channel}.nii.gz'; * is anything")
    own.add_argument("--mask-names", metavar="TEMPLATE", help="such as '{case}_seg.nii.gz'")
    own.add_argument("--reader", metavar="CLASS", help="of nnunetv2.imageio (default: by the ending of the files)")
    own.add_argument(
        "--patient", metavar="TEMPLATE", help="for --splits N: which part of a case's name is the patient's"
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.data.convert import convert, splits_remark, write_splits
    from nnunet_lgms.data.datasets import DESCRIPTIONS
    from nnunet_lgms.nnunet_folders import nnunet_folder

    if args.size is not None and not 8 <= args.size <= LARGEST_SIZE:
        raise ValueError(f"--size {args.size} is no size for an image: give 8 to {LARGEST_SIZE}; the paper uses 256.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not possible: give a number of at least 1.")
    if args.name == FOLDER:
        description, more = _own_folder(args)
    else:
        _refuse_options_of_folder(args)
        description, more = DESCRIPTIONS[args.name], {}
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
        splits_in=preprocessed,
        **more,
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


def _own_folder(args: argparse.Namespace):
    """Description of `convert folder`, and how its pairs are found."""
    from nnunet_lgms.data.folder import common_title, describe, find_pairs

    if args.masks is None:
        raise ValueError("convert folder needs two folders: nnunet_lgms convert folder IMAGES MASKS --id N.")
    if args.include_normal:
        raise ValueError("--include-normal is for BUSI.")
    if args.splits and not (args.splits.isdecimal() and 2 <= int(args.splits) <= 100):
        raise ValueError(f"--splits {args.splits} is not understood: for a folder give a number of folds, such as 5.")
    if args.patient and not args.splits:
        raise ValueError("--patient is for --splits N, which makes folds of whole patients.")
    description = describe(
        args.source,
        title=args.title or common_title(args.source),
        labels=args.labels,
        channels=args.channels,
        reader=args.reader,
        n_splits=int(args.splits) if args.splits else None,
        patient=args.patient,
    )
    said = (*args.labels, *args.channels, args.image_names, args.mask_names, args.reader)
    return description, {
        "find": lambda: find_pairs(description, args.source, args.masks, args.image_names, args.mask_names),
        "options": [str(args.masks.resolve()), *filter(None, said)],
    }


def _refuse_options_of_folder(args: argparse.Namespace) -> None:
    if args.masks is not None:
        raise ValueError(
            f"convert {args.name} takes one folder, the download; two are for convert folder IMAGES MASKS."
        )
    if args.splits not in (None, "paper"):
        raise ValueError(f"--splits {args.splits} is not understood: {args.name} has the folds of the paper.")
    for option in ("title", "labels", "channels", "image_names", "mask_names", "reader", "patient"):
        if getattr(args, option):
            name = "name" if option == "title" else option.replace("_", "-")
            raise ValueError(f"--{name} is for convert folder: {args.name} has its own.")
