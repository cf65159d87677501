"""`nnunet_lgms export`: a model folder becomes an ONNX file and a JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from nnunet_lgms.export.model import load_model, size_steps
from nnunet_lgms.export.onnx_file import INPUT, to_onnx
from nnunet_lgms.export.precision import CalibrationSet, as_float16, as_int8
from nnunet_lgms.files import atomic_write
from nnunet_lgms.locks import locked
from nnunet_lgms.runtime.description import Description, checksum

TOLERANCE = 1e-3  # of the largest logit: what rounding can do; anything above is a fault of the translation


def export(
    model_folder: Path,
    output: Path | None = None,
    *,
    folds: Sequence[str] | None = None,
    precision: str = "fp32",
    calibration: CalibrationSet | None = None,
    checkpoint: str = "checkpoint_final.pth",
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Description]:
    """Write `output` and its JSON; several folds become one file that averages their logits.

    Args:
        model_folder: nnU-Net's `nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION`.
        output: the .onnx file; default: DATASET_CONFIGURATION_PRECISION.onnx here.
        folds: default: all that are trained.
        precision: "fp32", "fp16" (half the size, computed as the runtime likes) or "int8" (static quantisation).
        calibration: training cases, for int8.
        checkpoint: name of the weights in each fold's folder.
        say: called with a line for each step.

    Returns:
        the path of the model and its description.

    Raises:
        ValueError: the model cannot be exported, or int8 has no cases to calibrate on.
    """
    if precision == "int8" and calibration is None:
        raise ValueError("int8 needs training cases to calibrate on.")
    network, description = load_model(Path(model_folder), folds, checkpoint)
    path = Path(output) if output else Path(f"{description.dataset}_{description.configuration}_{precision}.onnx")
    if path.suffix != ".onnx":
        raise ValueError(f"The output {path} must end in .onnx; the JSON beside it takes its name.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist: make it first.")
    with locked(path.with_name(f".{path.name}.lock"), f"export to {path}"):
        check_replaceable(path)
        return path, _export(model_folder, network, description, path, precision, calibration, say)


def _export(
    model_folder: Path,
    network: nn.Module,
    description: Description,
    path: Path,
    precision: str,
    calibration: CalibrationSet | None,
    say: Callable[[str], None],
) -> Description:
    say(f"{len(description.folds)} fold(s) of {description.trainer}, patch {list(description.patch_size)}")
    say("recording and translating the network (a minute or more)")
    exported = to_onnx(network, len(description.channel_names), description.patch_size, size_steps(network))
    description = replace(description, steps=exported.steps)
    error, scale = largest_difference(network, exported.model, description)
    say(f"against PyTorch on one patch of noise: {error:.1e}, logits up to {scale:.1f}")
    if not np.isfinite(scale):
        raise ValueError(f"The network of {model_folder} gives NaN or infinity: its weights are of a failed training.")
    if not error <= TOLERANCE * max(scale, 1):
        raise RuntimeError(f"The exported network differs from PyTorch's by {error:.1e}: please report this.")

    model = exported.model
    if precision == "fp16":
        model = as_float16(model)
        description = replace(description, precision="fp16")
    elif precision == "int8":
        with TemporaryDirectory() as folder:
            reference = Path(folder, "fp32.onnx")
            write(model, description, reference)
            model, quantisation = as_int8(reference, calibration, say)
        description = replace(description, precision="int8", quantisation=quantisation)
    write(model, description, path)
    return description


def check_replaceable(path: Path) -> None:
    """Raises ValueError if one of the two files is there and is no export's: `plans.onnx` would take `plans.json`."""
    beside = path.with_suffix(".json")
    if path.is_dir() or beside.is_dir():
        raise ValueError(f"{path if path.is_dir() else beside} is a folder: give another name with -o.")
    if beside.exists():
        try:
            Description.read(beside)
        except ValueError as error:
            raise ValueError(
                f"The export would replace {beside}, which is no export's: give another name with -o."
            ) from error


def write(model: onnx.ModelProto, description: Description, path: Path) -> None:
    """Both files, each whole or not at all; the checksum tells a pair that was torn apart, by a kill in between say."""
    content = json.loads(description.to_json())
    Description.from_content(content)  # what the runtime would refuse is not written
    with atomic_write(path) as file, atomic_write(path.with_suffix(".json")) as beside:
        onnx.save(model, file)
        description = replace(description, sha256=checksum(file.read_bytes(), content))
        beside.write_text(description.to_json(), "utf-8")


def largest_difference(network: nn.Module, model: onnx.ModelProto, description: Description) -> tuple[float, float]:
    """Largest difference between ONNX Runtime's and PyTorch's logits of one patch, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    patch = torch.randn(1, len(description.channel_names), *description.patch_size, generator=generator)
    with torch.inference_mode():
        expected = network(patch).numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT: patch.numpy()})
    return float(np.abs(found - expected).max()), float(np.abs(expected).max())
