"""`nnunet_lgms evaluate PREDICTIONS REFERENCES`: metrics, intervals, tests and a report."""

from __future__ import annotations

import argparse
from pathlib import Path

LEAST_RESAMPLES = 40
"""Below it no sample lies in the 2.5 % beside a 95 % interval."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="Dice, IoU, HD95, NSD, precision and recall, with a report",
        description="Compare predicted label files with references of the same names. Writes cases.csv, summary.json "
        "and report.html. Labels are taken from --labels, from --dataset, or else from the dataset.json that nnU-Net "
        "puts beside its predictions.",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS", type=Path, help="folder with predicted label files")
    parser.add_argument("references", metavar="REFERENCES", type=Path, help="folder with reference label files")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="1, kidney=1, or the region masses=2,3; "
        "background=4 for what counts as background, ignore=255 for what is not annotated",
    )
    labels.add_argument("--dataset", metavar="DATASET", help="number or name in nnUNet_raw, or path of a dataset.json")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: PREDICTIONS/evaluation")
    parser.add_argument("--name", default="model", help="name of the model of PREDICTIONS (default: model)")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another model on the same cases; repeatable",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images for the pictures (default: of --dataset)")
    parser.add_argument("--nsd-tolerance", type=float, default=1.0, metavar="MM", help="default: 1")
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="bootstrap samples (default: 2000)")
    parser.add_argument("--worst", type=int, default=6, metavar="N", help="worst cases shown a model (default: 6)")
    parser.add_argument("--by-size", action="store_true", help="also tell how well objects of each size are found")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core, at most 8)")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.evaluation.output import evaluate_into, terminal_table

    output = _output_folder(args)
    check_bootstrap(args.bootstrap)
    for option, value, least in (("--workers", args.workers, 1), ("--worst", args.worst, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option} {value} is not possible: give a number of at least {least}.")
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images} is no folder: give the folder of the images, or leave it out.")
    labels, reader, images = _what_to_evaluate(args)
    evaluation, files = evaluate_into(
        output,
        _models(args),
        args.references,
        labels,
        reader,
        images=args.images or images,
        n_worst=args.worst,
        tolerance=args.nsd_tolerance,
        n_resamples=args.bootstrap,
        workers=args.workers,
    )
    by_size = ""
    if args.by_size:
        from nnunet_lgms.evaluation.by_size import write_by_size

        more, by_size = write_by_size(evaluation, output, args.workers)
        files += more
    for remark in evaluation.remarks:
        print(f"Note: {remark}")
    print(terminal_table(evaluation))
    if by_size:
        print(f"\n{by_size}\n")
    print("Written:", *files)
    return 0


def check_bootstrap(n_resamples: int) -> None:
    """See that a 95 % interval can be made of so many samples."""
    if n_resamples < LEAST_RESAMPLES:
        raise ValueError(
            f"--bootstrap {n_resamples} is not possible: give a number of at least {LEAST_RESAMPLES}, of which a 95 % "
            "interval leaves out one sample at each end; the default is 2000."
        )


def _output_folder(args: argparse.Namespace) -> Path:
    """Where the tables go; nnU-Net keeps a summary.json of its own beside label files, which must not be lost."""
    output = args.output or args.predictions / "evaluation"
    if output.resolve() in (args.predictions.resolve(), args.references.resolve()):
        raise ValueError(f"-o {output} is a folder of label files: give another one, such as {output / 'evaluation'}.")
    return output


def _models(args: argparse.Namespace) -> dict[str, Path]:
    """Name → folder of each model's predictions; a folder that is compared with itself shows nothing."""
    if args.predictions.resolve() == args.references.resolve():
        raise ValueError(
            f"{args.predictions} and {args.references} are one folder, so that every Dice would be 1: give the "
            "predictions, then their references."
        )
    models = {args.name: args.predictions}
    for word in args.compare:
        name, separator, folder = word.partition("=")
        if not (name and separator and folder) or name in models:
            raise ValueError(f"--compare {word} is not understood: write NAME=FOLDER, with a new NAME for each model.")
        if same := next((other for other in models if models[other].resolve() == Path(folder).resolve()), None):
            raise ValueError(f"--compare {word} is the folder of {same} once more: give the one of another model.")
        models[name] = Path(folder)
    return models


def _what_to_evaluate(args: argparse.Namespace):
    """Labels, reader, and the folder of the images if it is known."""
    from nnunet_lgms.dataset_json import read_dataset_json
    from nnunet_lgms.evaluation.labels import LabelSet
    from nnunet_lgms.nnunet_files import Reader, file_ending_of
    from nnunet_lgms.nnunet_folders import raw_dataset

    if not args.predictions.is_dir():
        raise ValueError(f"The folder {args.predictions} does not exist.")
    images = None
    if args.dataset is not None:
        folder = raw_dataset(args.dataset)
        content, images = read_dataset_json(folder), folder / "imagesTr"
    else:
        # nnU-Net puts dataset.json beside predictions, and in the model's folder, two above fold_0/validation
        above = (args.predictions, args.predictions.parent, args.predictions.resolve().parent.parent)
        beside = [folder for folder in above if (folder / "dataset.json").is_file()]
        content = read_dataset_json(beside[0]) if beside else None
    if content is None and not args.labels:
        raise ValueError(
            f"There is no dataset.json beside the predictions, {args.predictions}: give --labels or --dataset."
        )
    if args.labels:
        of_references = [f for f in (args.references, args.references.parent) if (f / "dataset.json").is_file()]
        description = read_dataset_json(of_references[0]) if of_references else content
        labels = LabelSet.parse(args.labels, LabelSet.from_dataset_json(description) if description else None)
    else:
        labels = LabelSet.from_dataset_json(content)
    reader = Reader.of_dataset(content) if content else Reader(file_ending_of(args.predictions))
    return labels, reader, images
