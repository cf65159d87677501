"""The JSON beside an exported model: all that prediction needs beside the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunet_lgms.files import read_json, shown
from nnunet_lgms.runtime.schema import FORMAT, first_fault


@dataclass(frozen=True)
class Resampling:
    """nnU-Net's resampling: spline order in the plane, order across thick slices, and whether slices are thick."""

    function: str
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None = None


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
        values: set[int] = set()
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
            ValueError: it is missing, no description, or of a newer format; one sentence.
        """
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: an exported model is two files, the .onnx and its .json; keep them together."
            )
        content = read_json(path, keys_once=True)
        version = content.get("format") if isinstance(content, dict) else None
        if type(version) is int and version > FORMAT:
            raise ValueError(f"{path} has format {version}, this nnunet_lgms reads up to {FORMAT}: upgrade it.")
        try:
            return cls.from_content(content)
        except ValueError as error:
            raise ValueError(
                f"{path} is not what `nnunet_lgms export` writes: {error}; export the model again."
            ) from None

    @classmethod
    def from_content(cls, content: Any) -> Description:
        """The description that a JSON holds.

        Raises:
            ValueError: a field is missing or cannot be; the message names it and what is allowed.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds {shown(content)} instead of a table")
        optional = {f.name for f in fields(cls) if f.default is not MISSING}
        if fault := first_fault(content, optional):
            name, allowed = fault
            given = f"{name} is {shown(content[name])}" if name in content else f"{name} is missing"
            raise ValueError(f"{given}, allowed is {allowed}")
        content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        for key in ("resampling_data", "resampling_probabilities"):
            content[key] = Resampling(**content[key])
        return cls(**content)


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
