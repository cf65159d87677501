"""Half precision and 8 bits, through ONNX Runtime's own converters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from nnunet_lgms.export.onnx_file import INPUT, quiet
from nnunet_lgms.files import files_in
from nnunet_lgms.runtime.description import Description
from nnunet_lgms.runtime.images import read_case
from nnunet_lgms.runtime.predictor import Predictor
from nnunet_lgms.runtime.preprocessing import preprocess
from nnunet_lgms.runtime.sliding_window import window_starts

#: statistics over many voxels, which float16 cannot hold; Scan is the attention with its softmax
FLOAT32_OPS = ("InstanceNormalization", "LayerNormalization", "Scan", "Softmax", "Resize")
#: what is computed in 8 bits; norms, activations and attention products stay as they are
INT8_OPS = ("Conv", "MatMul")
WINDOWS_PER_CASE = 4


@dataclass(frozen=True)
class CalibrationSet:
    """Training cases in nnU-Net's raw layout: what int8 is calibrated on, and what its loss is measured on.

    Attributes:
        calibration: files of the image (one a channel) of each case.
        evaluation: name, files of the image and file of the labels of each case.
    """

    calibration: tuple[tuple[Path, ...], ...]
    evaluation: tuple[tuple[str, tuple[Path, ...], Path], ...]

    @classmethod
    def from_raw(cls, dataset: Path, description: Description, n: int) -> CalibrationSet:
        """`n` cases to calibrate on and `n` others to measure on, evenly spread over `imagesTr` by name.

        Raises:
            ValueError: the folder has fewer than two cases with labels and all channels.
        """
        ending, channels = description.file_ending, len(description.channel_names)
        cases = []
        labels = dataset / "labelsTr"
        for label in files_in(labels, ending) if labels.is_dir() else ():
            name = label.name.removesuffix(ending)
            files = tuple(dataset / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(channels))
            if all(file.is_file() for file in files):
                cases.append((name, files, label))
        if len(cases) < 2:
            raise ValueError(
                f"int8 is calibrated on training cases, and {dataset} has {len(cases)} in imagesTr and labelsTr with "
                f"{channels} channel(s) and ending {ending}: name the raw dataset with --calibration FOLDER."
            )
        n = min(n, len(cases) // 2)
        chosen = [cases[i] for i in np.linspace(0, len(cases) - 1, 2 * n).round().astype(int)]
        return cls(tuple(files for _, files, _ in chosen[::2]), tuple(chosen[1::2]))


def as_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and most operators in float16; input, output and norms stay float32."""
    return convert_float_to_float16(model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS])


def as_int8(
    reference: Path, cases: CalibrationSet, say: Callable[[str], None]
) -> tuple[onnx.ModelProto, dict[str, object]]:
    """The model in `reference`, quantised, and what it was calibrated on and costs."""
    predictor = Predictor(reference)
    say(f"calibrating on {len(cases.calibration)} training cases")
    target = reference.with_name("int8.onnx")
    windows = (window for files in cases.calibration for window in windows_of(files, predictor.description))
    quantise(reference, target, windows)
    target.with_suffix(".json").write_text(replace(predictor.description, sha256="").to_json(), "utf-8")
    say(f"measuring the Dice on {len(cases.evaluation)} others, in fp32 and int8")
    quantised = Predictor(target)
    dice = {"fp32": [], "int8": []}
    for _, files, label in cases.evaluation:
        truth = read_case([label], _label_reader(predictor.description)).samples[0]
        for name, model in (("fp32", predictor), ("int8", quantised)):
            dice[name].append(mean_dice(model.predict(files).reshape(truth.shape), truth, predictor.description))
    means = {name: float(np.nanmean(values)) for name, values in dice.items()}
    report = {
        "calibration_cases": [_case_name(files[0], predictor.description) for files in cases.calibration],
        "evaluation_cases": [name for name, _, _ in cases.evaluation],
        "dice_fp32": means["fp32"],
        "dice_int8": means["int8"],
        "dice_loss": means["fp32"] - means["int8"],
    }
    return onnx.load(target), report


def quantise(reference: Path, target: Path, windows: Iterator[np.ndarray]) -> None:
    """Write the model in `reference` to `target` with its convolutions and linear layers in 8 bits.

    Weights get one scale a channel, activations one a tensor: the range seen on `windows`, each (1, C, *patch).
    """
    with quiet("root"):  # which advises a preprocessing that the exporter has done
        quantize_static(
            reference,
            target,
            _Windows(windows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INT8_OPS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # the attention's products are of activations, and a softmax follows
            extra_options={"MatMulConstBOnly": True},
        )


def mean_dice(labels: np.ndarray, truth: np.ndarray, description: Description) -> float:
    """Dice averaged over the foreground's labels or regions; those that are in neither do not count."""
    scores = []
    for name, value in description.labels.items():
        if name in ("background", "ignore"):
            continue
        a, b = (np.isin(x, value if isinstance(value, (list, tuple)) else [value]) for x in (labels, truth))
        if total := int(a.sum()) + int(b.sum()):
            scores.append(2 * int((a & b).sum()) / total)
    return float(np.mean(scores)) if scores else float("nan")


class _Windows(CalibrationDataReader):
    def __init__(self, windows: Iterator[np.ndarray]):
        self._windows = windows

    def get_next(self) -> dict[str, np.ndarray] | None:
        window = next(self._windows, None)
        return None if window is None else {INPUT: window}


def windows_of(files: Sequence[Path], description: Description) -> Iterator[np.ndarray]:
    """Windows (1, C, *patch) of a prepared case, spread from corner to corner through the middle."""
    patch = description.patch_size if len(description.patch_size) == 3 else (1, *description.patch_size)
    data = preprocess(read_case(files, description), description).data
    pad = [max(0, p - s) for p, s in zip(patch, data.shape[1:])]
    data = np.pad(data, [(0, 0), *((n // 2, n - n // 2) for n in pad)])
    starts = [window_starts(s, p, 0.5) for s, p in zip(data.shape[1:], patch)]
    corners = {tuple(axis[round(t * (len(axis) - 1))] for axis in starts) for t in np.linspace(0, 1, WINDOWS_PER_CASE)}
    for corner in sorted(corners):
        area = tuple(slice(c, c + p) for c, p in zip(corner, patch))
        window = np.ascontiguousarray(data[(slice(None), *area)])
        yield window.reshape(1, len(data), *description.patch_size)


def _label_reader(description: Description) -> Description:
    return replace(description, channel_names=("labels",))


def _case_name(file: Path, description: Description) -> str:
    return file.name.removesuffix(description.file_ending)[: -len("_0000")]
