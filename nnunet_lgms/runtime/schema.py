"""What may stand in the JSON beside an exported model: one table of rules, for who writes it and for who reads it.

Without pydantic, which the runtime does not need otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from nnunet_lgms.names import FILE_ENDING, FILE_NAME_ALLOWED, MAX_LABEL, is_file_name, is_text

FORMAT = 2  # 1: the checksum was of the .onnx alone
PRECISIONS = ("fp32", "fp16", "int8")
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
LONGEST_AXIS, LARGEST_PATCH = 2**13, 2**27  # voxels; no network of nnU-Net's comes near them
LARGEST_NUMBER = 1e38

Rule = tuple[Callable[[Any], bool], str]


def is_int(value: Any, low: int, high: int) -> bool:
    """Whether it is a whole number, not a truth value, from ``low`` to ``high``."""
    return type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 can hold."""
    return type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def list_of(is_one: Callable[[Any], bool], least: int = 0, most: int = 10**6) -> Callable[[Any], bool]:
    """The rule of a list of ``least`` to ``most`` such values."""
    return lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(is_one, value))


def _is_spacing(value: Any) -> bool:
    return is_number(value) and 1e-4 < value < 1e4


def _is_label(value: Any) -> bool:
    return is_int(value, 0, MAX_LABEL) or (isinstance(value, list) and _label_list(value))


_label_list = list_of(lambda value: is_int(value, 0, MAX_LABEL), least=1)


def _is_resampling(value: Any) -> bool:
    known = {"function", "order", "order_z", "force_separate_z"}
    if not isinstance(value, dict) or value.keys() - known or value.get("function") not in RESAMPLINGS:
        return False
    orders = (value.get("order", 3), value.get("order_z", 0))
    separate = value.get("force_separate_z")
    return all(type(order) is int and order in SPLINE_ORDERS for order in orders) and separate in (None, True, False)


_NAME: Rule = (is_file_name, FILE_NAME_ALLOWED)
_AXES: Rule = (lambda value: isinstance(value, list) and sorted(map(str, value)) == ["0", "1", "2"], "0, 1 and 2")
_RESAMPLING: Rule = (_is_resampling, f"a table with function {' or '.join(RESAMPLINGS)} and orders 0, 1 or 3")

#: field -> rule, and what the message calls it
RULES: dict[str, Rule] = {
    "trainer": _NAME,
    "dataset": _NAME,
    "plans": _NAME,
    "configuration": _NAME,
    "folds": (
        list_of(lambda fold: isinstance(fold, str) and re.fullmatch(r"[0-9]{1,4}|all", fold) is not None, least=1),
        'a list such as ["0", "1"]',
    ),
    "precision": (lambda value: value in PRECISIONS, ", ".join(PRECISIONS)),
    "reader": _NAME,
    "file_ending": (
        lambda value: isinstance(value, str) and len(value) <= 20 and FILE_ENDING.fullmatch(value) is not None,
        'an ending such as ".nii.gz"',
    ),
    "channel_names": (list_of(is_text, 1), "a list of texts without control characters"),
    "transpose_forward": _AXES,
    "transpose_backward": _AXES,
    "spacing": (list_of(_is_spacing, 2, 3), "two or three numbers of mm"),
    "normalization_schemes": (list_of(is_file_name, 1), "a list of names, one for each channel"),
    "use_mask_for_norm": (list_of(lambda value: type(value) is bool, 1), "a list of true and false"),
    "intensity_properties": (list_of(lambda value: isinstance(value, dict), 1), "a list of tables"),
    "resampling_data": _RESAMPLING,
    "resampling_probabilities": _RESAMPLING,
    "patch_size": (
        lambda value: list_of(lambda n: is_int(n, 1, LONGEST_AXIS), 2, 3)(value) and prod(value) <= LARGEST_PATCH,
        f"two or three numbers of voxels, 1 to {LONGEST_AXIS} and together at most {LARGEST_PATCH}",
    ),
    "steps": (list_of(lambda n: is_int(n, 0, LONGEST_AXIS), 2, 3), f"two or three numbers, 0 to {LONGEST_AXIS}"),
    "mirror_axes": (list_of(lambda axis: is_int(axis, 0, 2), 0, 3), "axes of the patch"),
    "labels": (
        lambda value: (
            isinstance(value, dict)
            and len(value) > 1
            and all(is_text(name) and _is_label(label) for name, label in value.items())
        ),
        f"a table of names with whole numbers from 0 to {MAX_LABEL}, or lists of them",
    ),
    "regions_class_order": (
        lambda value: value is None or list_of(lambda label: is_int(label, 1, MAX_LABEL), 1)(value),
        f"null or a list of labels, 1 to {MAX_LABEL}",
    ),
    "quantisation": (lambda value: value is None or isinstance(value, dict), "null or a table"),
    "sha256": (
        lambda value: isinstance(value, str) and re.fullmatch(r"([0-9a-f]{64})?", value) is not None,
        "64 hexadecimal digits",
    ),
    "format": (lambda value: is_int(value, 1, FORMAT), f"1 to {FORMAT}"),
    "version": (lambda value: value == "" or is_text(value), "a text"),
}


def first_fault(content: Mapping[str, Any], optional: set[str]) -> tuple[str, str] | None:
    """The first field that cannot be, and what is allowed; None if all can.

    Args:
        content: of the JSON.
        optional: fields that may be left out.
    """
    for field, (fits, allowed) in RULES.items():
        if (field not in content and field not in optional) or (field in content and not fits(content[field])):
            return field, allowed
    if unknown := sorted(content.keys() - RULES.keys()):
        return unknown[0], "nothing of that name"
    axes, channels = len(content["patch_size"]), len(content["channel_names"])
    forward, back, mirrored = (content[k] for k in ("transpose_forward", "transpose_backward", "mirror_axes"))
    together: dict[str, Rule] = {
        "spacing": (lambda value: len(value) == axes, f"{axes} numbers, one for each axis of the patch"),
        "steps": (lambda value: len(value) == axes, f"{axes} numbers, one for each axis of the patch"),
        "mirror_axes": (
            lambda value: len(set(value)) == len(value) and all(axis < axes for axis in mirrored),
            f"axes from 0 to {axes - 1}, each once",
        ),
        "transpose_backward": (
            lambda value: [forward[axis] for axis in back] == [0, 1, 2],
            "the way back of transpose_forward",
        ),
        **{
            field: (lambda value: len(value) == channels, f"{channels} entries, one for each channel")
            for field in ("normalization_schemes", "use_mask_for_norm", "intensity_properties")
        },
        "labels": (lambda value: _labels_fit(value, content.get("regions_class_order")), _LABELS_ALLOWED),
        "regions_class_order": (lambda value: _regions_fit(content["labels"], value), "a label for each region, once"),
    }
    for field, (fits, allowed) in together.items():
        if not fits(content.get(field)):
            return field, allowed
    for properties, scheme in zip(content["intensity_properties"], content["normalization_schemes"]):
        if scheme == "CTNormalization" and not _ct_fits(properties):
            return "intensity_properties", f"for CTNormalization numbers for {', '.join(CT_PROPERTIES)}, in their order"
    return None


_LABELS_ALLOWED = "background 0 and, where there are no regions, every number up to the last, with ignore behind it"


def _labels_fit(labels: dict[str, Any], regions_class_order: list[int] | None) -> bool:
    """Without regions the network's channels are the labels, so that none may be left out."""
    if labels.get("background") not in (0, [0]):
        return False
    foreground = [value for name, value in labels.items() if name not in ("background", "ignore")]
    values = [value for entry in foreground for value in (entry if isinstance(entry, list) else [entry])]
    ignored = labels.get("ignore")
    if not values or not (ignored is None or (type(ignored) is int and ignored > max(values))):
        return False
    if regions_class_order is not None:
        return True
    return all(type(value) is int for value in foreground) and sorted(foreground) == [*range(1, len(foreground) + 1)]


def _regions_fit(labels: dict[str, Any], regions_class_order: list[int] | None) -> bool:
    if regions_class_order is None:
        return True
    regions = [value for name, value in labels.items() if name not in ("background", "ignore")]
    values = {value for entry in regions for value in (entry if isinstance(entry, list) else [entry])}
    order = regions_class_order
    return len(order) == len(set(order)) == len(regions) and set(order) <= values


def _ct_fits(properties: dict[str, Any]) -> bool:
    if not all(is_number(properties.get(name)) for name in CT_PROPERTIES):
        return False
    return properties["percentile_00_5"] <= properties["percentile_99_5"] and properties["std"] >= 0
