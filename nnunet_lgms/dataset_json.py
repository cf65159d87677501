"""nnU-Net's ``dataset.json``, checked before anything is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError

from nnunet_lgms.complaints import described, first_complaint
from nnunet_lgms.files import read_json, shown
from nnunet_lgms.names import FILE_ENDING, MAX_LABEL, is_text


def _line_of_text(value: str) -> str:
    if not is_text(value):
        raise ValueError("no line of text")
    return value


Text = Annotated[str, AfterValidator(_line_of_text)]
LabelValue = Annotated[int, Field(ge=0, le=MAX_LABEL)]
Region = Annotated[list[LabelValue], Field(min_length=1)]
CHANNELS_ALLOWED = 'a table {"0": "CT", …}'
Channels = Annotated[dict[Text, Any], Field(min_length=1)]


def _has_background(labels: dict[str, Any]) -> dict[str, Any]:
    if labels.get("background") not in (0, [0]):
        raise ValueError("no background")
    return labels


class DatasetJson(BaseModel):
    """What this package reads of it; the rest is nnU-Net's matter."""

    labels: Annotated[dict[Text, LabelValue | Region], Field(min_length=2), AfterValidator(_has_background)] = (
        described(
            ...,
            'a table {"background": 0, "lesion": 1, …} with whole numbers, or lists of them for regions',
            "value of each label",
        )
    )
    file_ending: Annotated[str, StringConstraints(pattern=f"^{FILE_ENDING.pattern}$")] = described(
        ..., 'an ending such as ".nii.gz" or ".png"', "of image and label files"
    )
    channel_names: Channels | None = described(None, CHANNELS_ALLOWED, "of an image, in their order")
    modality: Channels | None = described(None, CHANNELS_ALLOWED, "what nnU-Net once called channel_names")


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Content of a ``dataset.json``.

    Args:
        path: of the file, or of its folder.

    Raises:
        ValueError: there is none, or it is not as nnU-Net describes it; the message names file, entry and value.
    """
    file = path / "dataset.json" if path.is_dir() else path
    try:
        content = read_json(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): it must be a dataset.json of nnU-Net.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no dataset.json of nnU-Net: it holds {shown(content)} instead of a table.")
    try:
        checked = DatasetJson.model_validate(content)
    except ValidationError as error:
        complaint = first_complaint(error, DatasetJson, content)
        key = complaint.path[0]
        given = f"has no {key}" if complaint.kind == "missing" else f"has {key} {shown(content[key])}"
        raise ValueError(f"{file} {given}: a dataset.json of nnU-Net needs {complaint.allowed}.") from None
    return {**content, "labels": checked.labels}


def channel_names(dataset_json: dict[str, Any]) -> tuple[str, ...]:
    """Names of the channels of an image, in their order; "modality" is what nnU-Net once called them.

    Raises:
        ValueError: the description names none.
    """
    channels = dataset_json.get("channel_names") or dataset_json.get("modality")
    if not channels:
        raise ValueError(f"The dataset.json names no channels: it needs channel_names, {CHANNELS_ALLOWED}.")
    ordered = sorted(channels, key=lambda key: int(key) if str(key).isdecimal() else len(channels))
    return tuple(str(channels[key]) for key in ordered)


def n_channels(dataset_json: dict[str, Any]) -> int:
    """Channels of an image; see :func:`channel_names`."""
    return len(channel_names(dataset_json))
