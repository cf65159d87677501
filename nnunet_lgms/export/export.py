"""`nnunet_lgms export`: a model folder becomes an ONNX file and a JSON beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from nnunet_lgms.export.model import load_model, size_steps
from nnunet_lgms.export.onnx_file import INPUT, to_onnx
from nnunet_lgms.export.precision import CalibrationSet, as_float16, as_int8, windows_of
from nnunet_lgms.files import atomic_write, one_line
from nnunet_lgms.locks import locked
from nnunet_lgms.nnunet_files import image_files
from nnunet_lgms.runtime.description import Description, checksum

WINDOWS = 4  # of real images
TOLERANCE = 1e-3  # of the largest logit: what rounding can do; anything above is a fault of the translation


def export(
    model_folder: Path,
    output: Path | None = None,
    *,
    folds: Sequence[str] | None = None,
    precision: str = "fp32",
    calibration: CalibrationSet | None = None,
    images: Path | None = None,
    checkpoint: str = "checkpoint_final.pth",
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Description, Verdict]:
    """Write `output` and its JSON; several folds become one file that averages their logits.

    Args:
        model_folder: nnU-Net's `nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION`, or the name of a shipped
            model, such as "hippocampus".
        output: the .onnx file; default: DATASET_CONFIGURATION_PRECISION.onnx here.
        folds: default: all that are trained.
        precision: "fp32", "fp16" (half the size, computed as the runtime likes) or "int8" (static quantisation).
        calibration: training cases, for int8.
        images: folder of images in nnU-Net's names that the file is compared with PyTorch on; default: the training
            images in nnUNet_raw, and noise where there are none.
        checkpoint: name of the weights in each fold's folder.
        say: called with a line for each step.

    Returns:
        the path of the model, its description, and how it compares with PyTorch.

    Raises:
        ValueError: the model cannot be exported, or int8 has no cases to calibrate on.
        RuntimeError: the exported network is another one than PyTorch's.
    """
    if precision == "int8" and calibration is None:
        raise ValueError("int8 needs training cases to calibrate on.")
    if output:
        _check_place(Path(output))
    say("reading the model")
    network, description = load_model(Path(model_folder), folds, checkpoint)
    try:  # what the runtime would refuse is not written, and nothing is computed for it
        Description.from_content(json.loads(description.to_json()))
    except ValueError as error:
        raise ValueError(f"{model_folder} cannot be exported: in its plans or dataset.json {error}.") from None
    path = Path(output) if output else Path(f"{description.dataset}_{description.configuration}_{precision}.onnx")
    _check_place(path)
    sample = Sample.of(description, images)
    with locked(path.with_name(f".{path.name}.lock"), f"export to {path}"):
        check_replaceable(path)
        return path, *_export(model_folder, network, description, path, precision, calibration, sample, say)


def _check_place(path: Path) -> None:
    if path.suffix != ".onnx":
        raise ValueError(f"The output {path} must end in .onnx; the JSON beside it takes its name.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist: make it first.")


def _export(
    model_folder: Path,
    network: nn.Module,
    description: Description,
    path: Path,
    precision: str,
    calibration: CalibrationSet | None,
    sample: Sample,
    say: Callable[[str], None],
) -> tuple[Description, Verdict]:
    patch = "x".join(map(str, description.patch_size))
    say(f"translating the network, patch {patch}, {len(description.folds)} fold(s): a minute or more")
    exported = to_onnx(network, len(description.channel_names), description.patch_size, size_steps(network))
    description = replace(description, steps=exported.steps)
    say(f"comparing with PyTorch on {sample.name}")
    logits = [_logits(network, window) for window in sample.windows]
    scale = max(float(np.abs(one).max()) for one in logits)
    if not np.isfinite(scale):
        raise ValueError(f"The network of {model_folder} gives NaN or infinity: its weights are of a failed training.")
    verdict = compare(exported.model, sample, logits, description)
    if not verdict.difference <= TOLERANCE * max(scale, 1):
        raise RuntimeError(
            f"The exported network differs from PyTorch's by {verdict.difference:.1e}: please report this."
        )

    model = exported.model
    if precision == "fp16":
        say("to half precision")
        model = as_float16(model)
        description = replace(description, precision="fp16")
    elif precision == "int8":
        with TemporaryDirectory() as folder:
            reference = Path(folder, "fp32.onnx")
            write(model, description, reference)
            model, quantisation = as_int8(reference, calibration, say)
        description = replace(description, precision="int8", quantisation=quantisation)
    if precision != "fp32":
        verdict = compare(model, sample, logits, description)
    say(f"writing {path}")
    write(model, description, path)
    return description, verdict


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
    with atomic_write(path) as file, atomic_write(path.with_suffix(".json")) as beside:
        onnx.save(model, file)
        description = replace(description, sha256=checksum(file.read_bytes(), content))
        beside.write_text(description.to_json(), "utf-8")


@dataclass(frozen=True)
class Sample:
    """What a network is compared on.

    Attributes:
        name: for messages.
        windows: (1, C, *patch) each.
    """

    name: str
    windows: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, description: Description, images: Path | None) -> Sample:
        """Windows of the images of a folder; without one of the training images, or else noise.

        Raises:
            ValueError: `images` has no image of the model's, or one that cannot be read.
        """
        folder, reason = images, "no training images"
        if folder is None and (raw := os.environ.get("nnUNet_raw")):
            folder = Path(raw, description.dataset, "imagesTr")
        try:
            if images is not None or folder is not None and folder.is_dir():
                return cls._real(description, folder)
        except (ValueError, OSError) as error:
            if images is not None:
                raise
            reason = f"training images cannot be taken: {one_line(error).rstrip('.')}"
        generator = np.random.default_rng(0)
        shape = (1, len(description.channel_names), *description.patch_size)
        name = f"one patch of noise ({reason}; --images names others)"
        return cls(name, (generator.standard_normal(shape, np.float32),))

    @classmethod
    def _real(cls, description: Description, folder: Path) -> Sample:
        ending, channels = description.file_ending, len(description.channel_names)
        cases = image_files(folder, ending) if folder.is_dir() else {}
        several = {case: files for case, files in cases.items() if len(files) in (1, channels)}
        if not several:
            raise ValueError(f"{folder} has no image of {channels} channel(s) named CASE_0000{ending}: name a folder.")
        names = list(several)
        chosen = list(dict.fromkeys((names[0], names[len(names) // 2])))
        found: list[np.ndarray] = []
        for case in chosen:
            found += list(windows_of(several[case], description))[: WINDOWS // len(chosen)]
        return cls(f"{len(found)} windows of {' and '.join(chosen)}", tuple(found))


@dataclass(frozen=True)
class Verdict:
    """How far an exported model is from PyTorch's.

    Attributes:
        sample: what both were compared on.
        difference: largest between two logits.
        same_labels: share of voxels with the same label.
    """

    sample: str
    difference: float
    same_labels: float

    def __str__(self) -> str:
        bound = "1e-4" if self.difference <= 1e-4 else f"{self.difference:.1g}"
        same = "all labels are the same" if self.same_labels == 1 else f"{self.same_labels:.3%} of labels are the same"
        return f"within {bound} of PyTorch on {self.sample}; {same}"


def compare(model: onnx.ModelProto, sample: Sample, logits: Sequence[np.ndarray], description: Description) -> Verdict:
    """ONNX Runtime's logits of a sample beside PyTorch's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    differences, same = [], []
    for window, expected in zip(sample.windows, logits, strict=True):
        (found,) = session.run(None, {INPUT: window})
        differences.append(float(np.abs(found - expected).max()))
        same.append(float((_labels(found, description) == _labels(expected, description)).mean()))
    return Verdict(sample.name, float(np.max(differences)), float(np.mean(same)))


def _labels(logits: np.ndarray, description: Description) -> np.ndarray:
    """(B, heads, *spatial) -> labels, or for each region whether a voxel is in it."""
    return logits > 0 if description.regions_class_order else logits.argmax(1)


def _logits(network: nn.Module, window: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(window)).numpy()
