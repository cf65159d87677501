"""`nnunet_lgms runtime MODEL.onnx -i IMAGES -o PREDICTIONS`: prediction without PyTorch and nnU-Net."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from nnunet_lgms.channel_files import IMAGE_ENDINGS, check_channel_files, images_left_out
from nnunet_lgms.files import files_in
from nnunet_lgms.sentences import sentence


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "runtime",
        help="predict with an exported model, without PyTorch and nnU-Net",
        description="Segment whole cases with a model that `nnunet_lgms export` wrote: what nnU-Net's predictor does, "
        "with numpy, ONNX Runtime and the libraries that nnU-Net reads images with.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="its .json lies beside it")
    parser.add_argument(
        "-i",
        dest="images",
        nargs="+",
        type=Path,
        required=True,
        metavar="IMAGES",
        help="a folder with CASE_0000, CASE_0001, … as nnU-Net names channels; or the files of one case, in the order "
        "of the channels",
    )
    parser.add_argument(
        "-o",
        dest="output",
        type=Path,
        required=True,
        metavar="FOLDER|FILE",
        help="a folder: one file a case, and a case that fails does not stop the others; of one case, a file with the "
        "model's file ending as well",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(all cores)")
    parser.add_argument("--no-mirroring", action="store_true", help="2 to 8 times faster, a little less accurate")
    parser.add_argument(
        "--step", type=float, default=0.5, metavar="S", help="of the sliding window, in patches, 0.05 to 1 (0.5)"
    )


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.requirements import needs

    with needs("runtime", ("numpy", "SimpleITK", "nibabel", "imageio", "tifffile", "onnxruntime"), "runtime"):
        from nnunet_lgms.runtime import Predictor

    cores = os.cpu_count() or 1
    if args.threads is not None and not 1 <= args.threads <= cores:
        raise ValueError(f"--threads {args.threads}: this machine has 1 to {cores}.")
    predictor = Predictor(args.model, threads=args.threads, mirroring=not args.no_mirroring, step=args.step)
    ending = predictor.description.file_ending
    cases = find_cases(args.images, ending)
    targets = targets_of(list(cases), args.output, ending)
    resolved = {target.resolve() for target in targets.values()}
    if overwritten := [file for files in cases.values() for file in files if file.resolve() in resolved]:
        raise ValueError(f"The prediction would replace the image {overwritten[0]}: give another place with -o.")
    folder = next(iter(targets.values())).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"-o {folder} is a file, or lies below one: give a folder.") from None
    if args.images[0].is_dir() and (left_out := images_left_out(args.images[0], ending)):
        print(left_out, file=sys.stderr)
    failed = []
    for number, (name, files) in enumerate(cases.items(), start=1):
        begin = time.perf_counter()
        target, title = targets[name], f"[{number}/{len(cases)}] {name}"
        try:
            predictor.predict_file(files, target, progress=_progress(title))
        except (ValueError, OSError, MemoryError) as error:
            if len(cases) == 1:
                raise
            failed.append(name)
            print(f"{title}: {sentence(error)}", file=sys.stderr, flush=True)
        else:
            print(f"\r{title}: {time.perf_counter() - begin:.1f} s -> {target}", flush=True)
    if failed:
        others = f"; the others are in {folder}" if len(failed) < len(cases) else ""
        print(
            f"nnunet_lgms: {len(failed)} of {len(cases)} cases are not predicted, for the reasons above: "
            f"{', '.join(failed)}{others}.",
            file=sys.stderr,
        )
    return int(bool(failed))


def targets_of(cases: list[str], output: Path, ending: str) -> dict[str, Path]:
    """Case → the file that its labels are written to: `output` itself if it ends as the model's files do.

    Raises:
        ValueError: one file is named for several cases, or one of another format.
    """
    if output.is_dir():
        return {case: output / f"{case}{ending}" for case in cases}
    if output.name.endswith(ending):
        if len(cases) > 1:
            raise ValueError(f"-o {output} is one file, and there are {len(cases)} cases: give a folder.")
        return {cases[0]: output}
    if output.name.lower().endswith(IMAGE_ENDINGS):
        raise ValueError(f"-o {output} is no folder, and this model's files end in {ending}: name it so, or a folder.")
    return {case: output / f"{case}{ending}" for case in cases}


def find_cases(images: list[Path], ending: str) -> dict[str, list[Path]]:
    """Name of each case and its files in the order of their channels.

    Raises:
        ValueError: a folder has no such images, a file does not exist, or a channel is missing or given twice.
    """
    if len(images) > 1 or not images[0].is_dir():
        if missing := [file for file in images if not file.is_file()]:
            raise ValueError(f"The image {missing[0]} does not exist.")
        name = images[0].name
        case = re.sub(r"_\d{4}$", "", name[: -len(ending)] if name.lower().endswith(ending.lower()) else name)
        if len(images) > 1:
            check_channel_files(case, images, ending)
        return {case: images}
    cases: dict[str, list[Path]] = {}
    for file in files_in(images[0], ending):
        if match := re.fullmatch(r"(.+)_\d{4}", file.name.removesuffix(ending)):
            cases.setdefault(match[1], []).append(file)
    if not cases:
        raise ValueError(f"{images[0]} has no images named CASE_0000{ending}, as nnU-Net names channels.")
    for case, files in cases.items():
        check_channel_files(case, files, ending)
    return cases


def _progress(title: str):
    """Windows done, on one line of a terminal; nothing where the output is a file."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{title}: {done}/{total} windows", end="", file=sys.stderr, flush=True)

    return show
