"""`nnunet_lgms export MODEL_FOLDER --to onnx`: one file for runtimes without PyTorch, and a JSON beside it."""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
import time
from pathlib import Path

STEPS = {"fp32": 4, "fp16": 5, "int8": 6}
"""How many an export tells."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="a trained model as one ONNX file",
        description="Write a trained model as one ONNX file of plain operators, several folds averaged in it, with a "
        "JSON beside it that says how images are prepared. `nnunet_lgms runtime` predicts with the two, without "
        "PyTorch and nnU-Net.",
    )
    parser.add_argument(
        "model_folder",
        type=Path,
        metavar="MODEL_FOLDER",
        help="what nnU-Net trained, or the name of a shipped model: hippocampus, isic",
    )
    parser.add_argument("--to", choices=["onnx"], default="onnx", help="format (onnx)")
    parser.add_argument("--folds", nargs="+", metavar="FOLD", help="models to average (all that are trained)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision: half the size")
    precision.add_argument("--int8", action="store_true", help="8 bits, calibrated on training cases")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FOLDER",
        help="for --int8: the dataset with imagesTr and labelsTr (default: the model's in nnUNet_raw)",
    )
    parser.add_argument(
        "--cases", type=int, default=8, metavar="N", help="for --int8: cases to calibrate on, and to measure on (8)"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="of CASE_0000, … to compare the file with PyTorch on (default: training images in nnUNet_raw, or noise)",
    )
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", metavar="NAME", help="weights in each fold")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="default: DATASET_CONFIGURATION_fp32.onnx")


def run(args: argparse.Namespace) -> int:
    from nnunet_lgms.requirements import needs, require_nnunetv2

    require_nnunetv2()
    with needs("export", ("onnx", "onnxruntime", "onnxscript"), "export"):
        from nnunet_lgms.export.export import export

    precision = "int8" if args.int8 else "fp16" if args.fp16 else "fp32"
    with Progress(STEPS[precision]) as progress:
        path, description, verdict = export(
            args.model_folder,
            args.output,
            folds=args.folds,
            precision=precision,
            calibration=_calibration(args) if args.int8 else None,
            images=args.images,
            checkpoint=args.checkpoint,
            say=progress,
        )
    if description.quantisation:
        dice = description.quantisation
        print(
            f"Dice {dice['dice_fp32']:.4f} in fp32, {dice['dice_int8']:.4f} in int8: loss {dice['dice_loss']:.4f} on "
            f"{len(dice['evaluation_cases'])} cases"
        )
    sizes = ", ".join(f"{p} + {s} n" if s else f"{p}" for p, s in zip(description.patch_size, description.steps))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB) and {path.with_suffix('.json')}; sizes: {sizes}; any batch")
    print(f"Verdict: {verdict}")
    print(f"Predict with: nnunet_lgms runtime {shlex.quote(str(path))} -i IMAGES -o PREDICTIONS")
    return 0


class Progress:
    """Numbers the steps of an export, each with its seconds, which a terminal sees running."""

    def __init__(self, n_steps: int):
        self.n_steps, self.step, self.title = n_steps, 0, ""
        self.begin, self.ended = time.perf_counter(), threading.Event()
        self.clock = threading.Thread(target=self._run, daemon=True)

    def __call__(self, title: str) -> None:
        self._end_step()
        self.step, self.title, self.begin = self.step + 1, title, time.perf_counter()

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            self.clock.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.ended.set()
        if self.clock.is_alive():
            self.clock.join()
        if kind is None:
            self._end_step()
        elif sys.stdout.isatty():
            print(flush=True)  # what went wrong gets a line of its own

    def _line(self) -> str:
        return f"[{self.step}/{self.n_steps}] {self.title}: {time.perf_counter() - self.begin:.0f} s"

    def _end_step(self) -> None:
        if self.title:
            print(("\r" if sys.stdout.isatty() else "") + self._line(), flush=True)

    def _run(self) -> None:
        while not self.ended.wait(1):
            if self.title:
                print("\r" + self._line(), end="", flush=True)


def _calibration(args: argparse.Namespace):
    from nnunet_lgms.export.model import load_model
    from nnunet_lgms.export.precision import CalibrationSet
    from nnunet_lgms.nnunet_folders import nnunet_folder

    if args.cases < 1:
        raise ValueError(f"--cases {args.cases}: at least 1 is needed.")
    _, description = load_model(args.model_folder, args.folds, args.checkpoint)
    folder = args.calibration
    if folder is None:
        try:
            folder = nnunet_folder("nnUNet_raw") / description.dataset
        except ValueError as error:
            raise ValueError(
                f"int8 is calibrated on training cases, or those of --calibration FOLDER; {error}"
            ) from None
    return CalibrationSet.from_raw(folder, description, args.cases)
