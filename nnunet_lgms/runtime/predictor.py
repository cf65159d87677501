"""One exported model, ready to predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from nnunet_lgms.arrays import checked_image
from nnunet_lgms.files import one_line
from nnunet_lgms.parallel import cores
from nnunet_lgms.runtime.description import Description, check_pair
from nnunet_lgms.runtime.images import Case, check_channels, read_case, write_labels
from nnunet_lgms.runtime.preprocessing import preprocess
from nnunet_lgms.runtime.schema import NORMALIZATIONS, READERS
from nnunet_lgms.runtime.sliding_window import resampled_rows, sliding_window
from nnunet_lgms.sentences import out_of_memory

INPUT = "image"  # what the exporter names the network's input
MOST_THREADS = 1024  # ONNX Runtime starts as many as it is told, until the machine stands still
SMALLEST_STEP = 0.05  # 8000 windows for each patch of a volume; nothing smaller is meant


class Predictor:
    """Predicts whole cases with an exported model on the CPU.

    Args:
        model: the `.onnx` file; its `.json` lies beside it.
        threads: of ONNX Runtime; default: all cores that this process may use.
        mirroring: average over mirrored copies along the axes that the training mirrored, as nnU-Net does; without,
            prediction is 2 to 8 times faster.
        step: of the sliding window, in patches, ``SMALLEST_STEP`` to 1.

    Raises:
        ValueError: the model cannot be loaded, `threads` is not 1 to ``MOST_THREADS``, or `step` is too small or above
            1.
    """

    def __init__(self, model: str | Path, *, threads: int | None = None, mirroring: bool = True, step: float = 0.5):
        if not SMALLEST_STEP <= step <= 1:
            raise ValueError(
                f"The step of the sliding window is {step:g} patches: give {SMALLEST_STEP} to 1; nnU-Net's is 0.5."
            )
        if threads is not None and threads not in range(1, MOST_THREADS + 1):
            raise ValueError(f"{threads} threads are not possible: give 1 to {MOST_THREADS}, or None for all cores.")
        path = Path(model)
        if not path.is_file():
            raise ValueError(f"The model {path} does not exist: give the .onnx file that `nnunet_lgms export` wrote.")
        path.open("rb").close()  # the system says itself why it refuses
        self.description = Description.read(path.with_suffix(".json"))
        unknown = [s for s in self.description.normalization_schemes if s not in NORMALIZATIONS]
        unknown += [self.description.reader] if self.description.reader not in READERS else []
        if unknown:
            raise ValueError(f"{path} needs {unknown[0]!r}, which this nnunet_lgms does not know: upgrade it.")
        self.mirror_axes = self.description.mirror_axes if mirroring else ()
        self.step = step
        check_pair(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.log_severity_level = 3  # warnings about constants that could be folded are for the exporter
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has classes of its own for this
            raise ValueError(f"{path} is no ONNX model ({one_line(error)}).") from error
        (image,), (logits,) = self._session.get_inputs(), self._session.get_outputs()
        channels, heads = len(self.description.channel_names), self.description.heads
        described = [channels, *self.description.patch_size], [heads, *self.description.patch_size]
        if not all(_agree(found.shape[1:], sizes) for found, sizes in zip((image, logits), described)):
            raise ValueError(
                f"{path} takes {image.shape} and gives {logits.shape}, but the JSON beside it describes {channels} "
                f"channel(s), {heads} labels or regions and a patch of {list(self.description.patch_size)}: they are "
                "of two models; export again."
            )

    def network(self, window: np.ndarray) -> np.ndarray:
        """(B, C, *patch) float32 -> logits (B, heads, *patch).

        Raises:
            MemoryError: there is too little for the network's maps.
        """
        try:
            return self._session.run(None, {INPUT: window})[0]
        except Exception as error:  # ONNX Runtime has classes of its own
            if out_of_memory(RuntimeError(str(error))):
                raise MemoryError(str(error)) from error
            raise

    def predict(
        self,
        image: str | Path | Sequence[str | Path] | np.ndarray,
        *,
        spacing: Sequence[float] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> np.ndarray:
        """Segment one image.

        Args:
            image: file, or one file a channel, or samples of shape (C, Y, X) or (C, Z, Y, X).
            spacing: of the axes of an array, (y, x) or (z, y, x) in mm; files bring their own. Default in 2D: 1.
            progress: called with windows done and in all.

        Returns:
            Labels, (Y, X) for flat images, (Z, Y, X) for volumes, on the grid of the image.

        Raises:
            ValueError: the image is not what the model expects.
        """
        case = (
            _from_array(image, spacing, self.description)
            if isinstance(image, np.ndarray)
            else read_case(_as_list(image), self.description)
        )
        return self.predict_case(case, progress)

    def predict_file(
        self,
        image: str | Path | Sequence[str | Path],
        output: str | Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Segment one image, a file or one file a channel, and write the labels on its grid to `output`.

        Raises:
            ValueError: the image is not what the model expects.
        """
        case = read_case(_as_list(image), self.description)
        write_labels(self.predict_case(case, progress), case, Path(output))

    def predict_case(self, case: Case, progress: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """Labels of a case that was read, whose samples are used up: (Y, X) if it is flat, else (Z, Y, X)."""
        description, flat = self.description, case.flat
        prepared = preprocess(case, description)
        many = max(description.regions_class_order or description.label_values) >= 255
        labels = np.zeros(prepared.shape, np.uint16 if many else np.uint8)
        inside = labels[prepared.box]
        rows = sliding_window(
            self.network,
            prepared.data,
            description.heads,
            description.patch_size,
            self.mirror_axes,
            self.step,
            progress,
        )
        start = 0
        for logits in resampled_rows(rows, prepared.back):
            if not np.isfinite(logits).all():
                raise ValueError("The network gave NaN or infinity for this image: its values are not what it learned.")
            inside[start : start + logits.shape[1]] = _to_labels(logits, description.regions_class_order)
            start += logits.shape[1]
        labels = labels.transpose(description.transpose_backward)
        return labels[0] if flat else labels


def _to_labels(logits: np.ndarray, regions_class_order: Sequence[int] | None) -> np.ndarray:
    """(heads, n, Y, X) -> (n, Y, X): the largest logit, or each region's label where its probability is above half."""
    if regions_class_order is None:
        return logits.argmax(0)
    labels = np.zeros(logits.shape[1:], np.uint16)
    for region, label in zip(logits, regions_class_order):
        labels[region > 0] = label
    return labels


def _agree(found: Sequence[int | str | None], described: Sequence[int]) -> bool:
    """Whether sizes of the file, a name where they are free, can be those that the JSON describes."""
    return len(found) == len(described) and all(a == b for a, b in zip(found, described) if isinstance(a, int))


def _as_list(image: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(image)] if isinstance(image, (str, Path)) else [Path(file) for file in image]


def _from_array(samples: np.ndarray, spacing: Sequence[float] | None, description: Description) -> Case:
    samples, spacing, flat = checked_image(samples, spacing)
    check_channels(len(samples), description, "The array")
    return Case(samples, spacing, flat)
