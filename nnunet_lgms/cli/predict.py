"""`nnunet_lgms predict -i IMAGES -o PREDICTIONS -m MODEL`: `nnUNetv2_predict` in less time and memory."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

START = time.perf_counter()


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="nnUNetv2_predict in less time and memory, for any model of nnU-Net v2",
        description="Predict with any model of nnU-Net v2, also with nnU-Net's own U-Net. Options and output files are "
        "those of nnUNetv2_predict and nnUNetv2_predict_from_modelfolder, and labels are the same. A case that fails "
        "is named and the others go on; the exit code is then 1.",
    )
    parser.add_argument(
        "-i", dest="images", type=Path, required=True, metavar="FOLDER", help="with CASE_0000, CASE_0001, …"
    )
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="is made if need be")
    model = parser.add_argument_group("the model: -m, or -d and -c")
    model.add_argument(
        "-m",
        dest="model_folder",
        type=Path,
        metavar="FOLDER",
        help="…/DatasetXXX_Name/TRAINER__PLANS__CONFIG, or the name of a shipped model: hippocampus, isic",
    )
    model.add_argument("-d", dest="dataset", metavar="DATASET", help="number or name, below $nnUNet_results")
    model.add_argument("-c", dest="configuration", metavar="CONFIG", help="2d, 3d_fullres, …")
    model.add_argument("-p", dest="plans", metavar="PLANS", help="with -d (nnUNetPlans)")
    model.add_argument("-tr", dest="trainer", metavar="TRAINER", help="with -d (nnUNetTrainer)")
    model.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        metavar="FOLD",
        help="to be averaged (0 to 4, or those that are trained)",
    )
    model.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="NAME", help="(%(default)s)")
    parser.add_argument("-step_size", type=float, default=0.5, metavar="S", help="of the window, in patches (0.5)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: 2 to 8 times faster, less accurate")
    parser.add_argument("--save_probabilities", action="store_true", help="to average several configurations")
    parser.add_argument("--continue_prediction", "--c", action="store_true", help="leave out what is predicted")
    parser.add_argument("-prev_stage_predictions", type=Path, metavar="FOLDER", help="for a cascade")
    parser.add_argument("-num_parts", type=int, default=1, metavar="N", help="this call predicts one of N parts")
    parser.add_argument("-part_id", type=int, default=0, metavar="I", help="which, from 0")
    parser.add_argument("-device", metavar="DEVICE", help="cpu, cuda or mps (the GPU if there is one)")
    parser.add_argument("-npp", type=int, default=None, metavar="N", help="threads that read and prepare images (3)")
    parser.add_argument("-nps", type=int, default=None, metavar="N", help="threads that write predictions (3)")
    parser.add_argument("--not_on_device", action="store_true", help="add logits up in the host's memory")
    parser.add_argument("--verbose", action="store_true", help="say more")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for batch jobs")
    parser.add_argument("--json-times", type=Path, metavar="FILE", help="write the seconds of each stage to a file")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.inference import load_predictor, trained_folds

    folder = _model_folder(args)
    _check(args)
    folds = args.folds or _default_folds(trained_folds(folder, args.checkpoint))
    args.output.mkdir(parents=True, exist_ok=True)
    predictor = load_predictor(
        folder,
        folds=folds,
        checkpoint=args.checkpoint,
        device=args.device,
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=not args.not_on_device,
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
        talk=_say,
    )
    from nnunet_lgms.prediction.cases import CasesFailed

    if predictor.device.type == "cpu":
        keep_freed_memory()
    where = "" if predictor.device.type == "cpu" else f" on {predictor.device}"
    _say(f"{folder}, fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}{where}")
    stage_before = predictor.configuration_manager.previous_stage_name
    if stage_before is not None and args.prev_stage_predictions is None:
        raise ValueError(
            f"{folder} is the second stage of a cascade: give the predictions of {stage_before} with "
            "-prev_stage_predictions."
        )
    predictor.stages.add("start", time.perf_counter() - START)
    begin, code = time.perf_counter(), 0
    try:
        predictor.predict_from_files(
            str(args.images),
            str(args.output),
            save_probabilities=args.save_probabilities,
            overwrite=not args.continue_prediction,
            num_processes_preprocessing=_threads(args.npp, "nnUNet_npp"),
            num_processes_segmentation_export=_threads(args.nps, "nnUNet_nps"),
            folder_with_segs_from_prev_stage=None if stage_before is None else str(args.prev_stage_predictions),
            num_parts=args.num_parts,
            part_id=args.part_id,
        )
    except CasesFailed as failed:
        others = f" The others are in {args.output}." if len(failed.errors) < failed.n_cases else ""
        print(f"nnunet_lgms: {failed}{others}", file=sys.stderr)
        code = 1
    if args.json_times is not None:
        from nnunet_lgms.files import atomic_write

        times = {**predictor.stages.seconds, "total": predictor.stages.seconds["start"] + time.perf_counter() - begin}
        with atomic_write(args.json_times) as temporary:
            temporary.write_text(json.dumps({"seconds": times, "cases": predictor.stages.cases}, indent=2) + "\n")
    return code


def _model_folder(args: argparse.Namespace) -> Path:
    from nnunet_lgms.nnunet_folders import model_path, nnunet_folder

    if args.model_folder is not None:
        by_name = {"-d": args.dataset, "-c": args.configuration, "-p": args.plans, "-tr": args.trainer}
        if said := [f"{option} {value}" for option, value in by_name.items() if value is not None]:
            raise ValueError(
                f"Give the model either by its folder, -m, or by -d, -c, -p and -tr: leave out -m or {' '.join(said)}."
            )
        return model_path(args.model_folder)
    if not (args.dataset and args.configuration):
        raise ValueError("Which model? Give its folder with -m, or the data set with -d and the configuration with -c.")
    from nnunetv2.utilities.file_path_utilities import get_output_folder

    nnunet_folder("nnUNet_results")
    trainer, plans = args.trainer or "nnUNetTrainer", args.plans or "nnUNetPlans"
    try:
        return Path(get_output_folder(args.dataset, trainer, plans, args.configuration))
    except RuntimeError as error:  # no data set of that number, or several
        raise ValueError(str(error)) from error


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.step_size <= 1:
        raise ValueError(f"-step_size {args.step_size:g}: give more than 0 and at most 1; nnU-Net's is 0.5.")
    if args.num_parts < 1 or not 0 <= args.part_id < args.num_parts:
        raise ValueError(f"-part_id {args.part_id} of -num_parts {args.num_parts}: parts are counted from 0.")
    for name, n in (("-npp", args.npp), ("-nps", args.nps)):
        if n is not None and n < 0:
            raise ValueError(f"{name} {n}: give a number of threads, or 0 for one thing after the other.")
    if not args.images.is_dir():
        raise ValueError(f"-i {args.images} is no folder: give the one with the images.")
    if args.output.resolve() == args.images.resolve():
        raise ValueError("-o is the folder of the images: give another one.")


def keep_freed_memory() -> None:
    """Has glibc use again what tensors free, where the C library is glibc.

    It gives large pieces back to the system, which clears them page by page when they are asked for again: a quarter of
    a prediction of large windows on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: pieces of any size come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which stays as large as it was


def _default_folds(trained: list[str]) -> list[str]:
    five = [str(fold) for fold in range(5)]
    return five if set(five) <= set(trained) else trained


def _threads(given: int | None, variable: str) -> int:
    """As nnU-Net's commands take them."""
    if given is not None:
        return given
    try:
        return int(os.environ.get(variable) or 3)
    except ValueError:
        return 3


def _say(line: str) -> None:
    from nnunet_lgms.prediction.predictor import to_stderr

    to_stderr(line)
