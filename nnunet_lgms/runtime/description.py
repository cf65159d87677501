"""The JSON beside an exported model: all that prediction needs beside the network."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nnunet_lgms.files import one_line, shown

FORMAT = 2  # 1: the checksum was of the .onnx alone
READERS = (  # nnU-Net's names
    "SimpleITKIO",
    "SimpleITKIOWithReorient",
    "NibabelIO",
    "NibabelIOWithReorient",
    "NaturalImage2DIO",
    "Tiff3DIO",
)
NORMALIZATIONS = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
CT_PROPERTIES = ("percentile_00_5", "percentile_99_5", "mean", "std")  # what CTNormalization needs of a channel
RESAMPLINGS = ("resample_data_or_seg_to_shape", "no_resampling_hack")
SPLINE_ORDERS = (0, 1, 3)
TURNS = ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # Unicode's marks that reverse what follows


@dataclass(frozen=True)
class Resampling:
    """nnU-Net's resampling: spline order in the plane, order across thick slices, and whether slices are thick."""

    function: str
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = None

    @property
    def known(self) -> bool:
        """Whether the runtime can do it."""
        orders = (self.order, self.order_z)
        return self.function in RESAMPLINGS and all(order in SPLINE_ORDERS for order in orders)


@dataclass(frozen=True)
class Description:
    """What a model is and how its images are to be prepared. Axes are (z, y, x) after `transpose_forward`.

    Attributes:
        spacing: mm per voxel that images are resampled to; two entries for a flat configuration.
        intensity_properties: one dict a channel, nnU-Net's fingerprint of the foreground.
        patch_size: voxels of the sliding window.
        steps: by how much an axis of the network's input may differ from the patch, in multiples; 0 is fixed.
        mirror_axes: axes of the patch along which predictions are mirrored and averaged.
        labels: nnU-Net's names and values; a list of values is a region.
        regions_class_order: label that each region is written as; None without regions.
        quantisation: for int8, what it was calibrated on and what it costs.
        sha256: :func:`checksum` of the pair; empty: it is not checked.
    """

    trainer: str
    dataset: str
    plans: str
    configuration: str
    folds: tuple[str, ...]
    precision: str
    reader: str
    file_ending: str
    channel_names: tuple[str, ...]
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    spacing: tuple[float, ...]
    normalization_schemes: tuple[str, ...]
    use_mask_for_norm: tuple[bool, ...]
    intensity_properties: tuple[dict, ...]
    resampling_data: Resampling
    resampling_probabilities: Resampling
    patch_size: tuple[int, ...]
    steps: tuple[int, ...]
    mirror_axes: tuple[int, ...]
    labels: dict
    regions_class_order: tuple[int, ...] | None = None
    quantisation: dict | None = None
    sha256: str = ""
    format: int = FORMAT
    version: str = field(default="")

    @property
    def heads(self) -> int:
        """Channels of the network's output."""
        return len(self.regions_class_order) if self.regions_class_order else len(self.label_values)

    @property
    def label_values(self) -> tuple[int, ...]:
        """All label values with the background, in ascending order."""
        values = set()
        for name, value in self.labels.items():
            if name != "ignore":
                values.update(map(int, value if isinstance(value, (list, tuple)) else [value]))
        return tuple(sorted(values))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Description:
        """The description in a file.

        Raises:
            ValueError: it is missing, no description, or of a newer format.
        """
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: an exported model is two files, the .onnx and its .json; keep them together."
            )
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] > FORMAT:
                raise ValueError(
                    f"{path} has format {content['format']}, this nnunet_lgms reads up to {FORMAT}: upgrade it."
                )
            for key in ("resampling_data", "resampling_probabilities"):
                content[key] = Resampling(**content[key])
            description = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
            wrong = description._wrong_field()
        except (
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(f"{path} is not what `nnunet_lgms export` writes ({one_line(error)}).") from error
        if wrong:
            raise ValueError(
                f"{path} is not what `nnunet_lgms export` writes: {wrong} is {shown(getattr(description, wrong))}; "
                "export the model again."
            )
        return description

    def _wrong_field(self) -> str:
        """Name of a field that cannot be, "" if there is none."""
        axes, channels = len(self.patch_size), len(self.channel_names)
        values, regions = self.label_values, self.regions_class_order
        forward, back = self.transpose_forward, self.transpose_backward
        fine = {
            "transpose_forward": sorted(forward) == [0, 1, 2],
            "patch_size": axes in (2, 3) and all(isinstance(n, int) and n > 0 for n in self.patch_size),
            "spacing": len(self.spacing) == axes
            and all(isinstance(mm, (int, float)) and 1e-4 < mm < 1e4 for mm in self.spacing),
            "transpose_backward": sorted(back) == [0, 1, 2] and [forward[axis] for axis in back] == [0, 1, 2],
            "mirror_axes": sorted(set(self.mirror_axes) & set(range(axes))) == sorted(self.mirror_axes),
            "channel_names": channels > 0 and all(map(_printable, self.channel_names)),
            "normalization_schemes": len(self.normalization_schemes) == channels,
            "use_mask_for_norm": isinstance(self.use_mask_for_norm, tuple) and len(self.use_mask_for_norm) == channels,
            "intensity_properties": isinstance(self.intensity_properties, tuple)
            and len(self.intensity_properties) == channels
            and all(
                isinstance(properties, dict) and set(CT_PROPERTIES) <= set(properties)
                for properties, scheme in zip(self.intensity_properties, self.normalization_schemes)
                if scheme == "CTNormalization"
            ),
            "resampling_data": self.resampling_data.known,
            "resampling_probabilities": self.resampling_probabilities.known,
            "labels": len(values) > 1 and all(map(_printable, self.labels)),
            "regions_class_order": regions is None
            or (isinstance(regions, tuple) and len(regions) == len(set(regions)) > 0 and set(regions) <= set(values)),
            **{name: _printable(getattr(self, name)) for name in ("trainer", "dataset", "plans", "configuration")},
            "file_ending": _printable(self.file_ending)
            and self.file_ending.startswith(".")
            and not set(self.file_ending) & set("/\\"),
        }
        return next((name for name, is_fine in fine.items() if not is_fine), "")


def _printable(name: object) -> bool:
    """Whether it is text without what acts on a terminal: control characters, ends of lines, turns of the direction."""
    return isinstance(name, str) and not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in TURNS for c in name
    )


def checksum(model: bytes, content: dict) -> str:
    """SHA-256 over the `.onnx` file and what the JSON beside it says, in whatever order and layout."""
    digest = hashlib.sha256(model)
    if content["format"] > 1:
        said = {key: value for key, value in content.items() if key != "sha256"}
        digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


def check_pair(model: Path) -> None:
    """A model is the one that its JSON was written with, and neither was changed since.

    That tells damage and files that were mixed up; who changes a file on purpose can write its checksum as well.

    Raises:
        ValueError: they do not belong together.
    """
    content = json.loads(model.with_suffix(".json").read_text("utf-8"))
    if content.get("sha256") and checksum(model.read_bytes(), content) != content["sha256"]:
        raise ValueError(
            f"{model} and the JSON beside it are not the pair that was exported: one of them was damaged or changed, "
            "or an export was interrupted; export again."
        )
