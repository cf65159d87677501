"""`nnunet_lgms zeroshot MODEL_FOLDER DATASET…`: what a model does on datasets that it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "zeroshot",
        help="test a trained model on datasets that it has not seen",
        description="Predict unseen datasets with every fold of a model, evaluate, and write a table of the results "
        "on the model's own validation cases, on the unseen datasets, and the drop.",
        epilog="A mapping file is JSON and has one direction, MODEL's label: DATASET's label. "
        'For a model of tumours and cysts on a data set of lesions: {"Dataset102_STU": {"tumour": "lesion", '
        '"cyst": null}}; "*" stands for all data sets, null for background. Labels of the same name need no mapping.',
    )
    parser.add_argument(
        "model_folder", metavar="MODEL_FOLDER", type=Path, help="nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIG"
    )
    parser.add_argument("datasets", metavar="DATASET", nargs="+", help="number, name or path of a raw dataset")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: MODEL_FOLDER/zeroshot")
    parser.add_argument("-f", "--folds", nargs="+", metavar="FOLD", help="default: all that are trained")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--mapping", type=Path, metavar="FILE", help="MODEL's label: DATASET's label, see below")
    parser.add_argument("--nsd-tolerance", type=float, default=1.0, metavar="MM", help="default: 1")
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="bootstrap samples (default: 2000)")
    parser.add_argument("--device", help="cuda, cpu or mps (default: the GPU if there is one)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read, write and evaluate (default: 3, 3 and one per core, at most 8)",
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.cli.evaluate import check_bootstrap
    from nnunet_lgms.evaluation.label_mapping import read_mapping_file
    from nnunet_lgms.evaluation.zeroshot import table, zero_shot
    from nnunet_lgms.inference import trained_folds
    from nnunet_lgms.nnunet_folders import raw_dataset

    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers {args.workers} is not possible: give a number of at least 1.")
    check_bootstrap(args.bootstrap)
    trained_folds(args.model_folder, args.checkpoint)
    output = args.output or args.model_folder / "zeroshot"
    result = zero_shot(
        args.model_folder,
        [raw_dataset(dataset) for dataset in args.datasets],
        output,
        folds=args.folds,
        checkpoint=args.checkpoint,
        mapping=read_mapping_file(args.mapping) if args.mapping else None,
        tolerance=args.nsd_tolerance,
        n_resamples=args.bootstrap,
        device=args.device,
        workers=args.workers,
    )
    for remark in result.remarks:
        print(f"Note: {remark}")
    print(table(result))
    print("Written:", *(output / name for name in ("report.html", "zeroshot.csv", "zeroshot.json")))
    return 0
