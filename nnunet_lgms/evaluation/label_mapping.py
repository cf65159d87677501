"""From the labels of a model to those of a dataset that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_lgms.evaluation.labels import LabelSet
from nnunet_lgms.files import read_json, shown


@dataclass(frozen=True)
class LabelMapping:
    """How predictions become comparable.

    Args:
        values: predicted label → label of the dataset (0: background).
        target: labels of the dataset that the model can predict.
        source: the same names, with the model's own label values: for its results on its own dataset.
    """

    values: Mapping[int, int]
    target: LabelSet
    source: LabelSet


def read_mapping_file(path: Path) -> dict[str, dict]:
    """Dataset name or "*" → {MODEL's label: DATASET's label, or null for background}.

    Raises:
        ValueError: it is no such JSON file.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise ValueError("every dataset needs an object of its own")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The mapping file {path} is not understood ({error}): write MODEL's label: DATASET's label, such as "
            f'{{"Dataset102_STU": {{"tumour": "lesion", "cyst": null}}}}, with "*" for all datasets and null for '
            "background."
        ) from None
    return content


def map_labels(model: Mapping, dataset: Mapping, name: str, file_content: Mapping[str, Mapping] | None) -> LabelMapping:
    """Match the labels of two dataset.json, by name where the mapping file does not say otherwise.

    Args:
        model: content of the model's dataset.json.
        dataset: content of the unseen dataset's dataset.json.
        name: of the unseen dataset, `Dataset102_STU`.
        file_content: see `read_mapping_file`; None without a file.

    Raises:
        ValueError: a label of the model has no counterpart, or the file names a label that does not exist.
    """
    ours, theirs = LabelSet.from_dataset_json(model), LabelSet.from_dataset_json(dataset)
    content = file_content or {}
    said = content.get(name, content.get(name.partition("_")[2], content.get("*", {})))
    if not said and ours.regions == theirs.regions:
        return LabelMapping({}, theirs, ours)
    said = {
        _value(key, ours, "the model"): 0 if target is None else _value(target, theirs, name)
        for key, target in said.items()
    }
    by_name = {label.casefold(): values[0] for label, values in theirs.regions.items() if len(values) == 1}
    name_of = {values[0]: label for label, values in ours.regions.items() if len(values) == 1}
    values, homeless = {}, []
    for value in sorted(ours.values - {0}):
        label = name_of.get(value, str(value))  # inside a region values may have no name of their own
        if value in said:
            values[value] = said[value]
        elif label.casefold() in by_name:
            values[value] = by_name[label.casefold()]
        else:
            homeless.append(label)
    if homeless:
        raise ValueError(
            f"Label(s) {', '.join(homeless)} of the model have no counterpart in {name}, which has "
            f"{', '.join(theirs.regions)}: say in a mapping file (--mapping) what they become."
        )
    reached = set(values.values())
    target = theirs.only({label: region for label, region in theirs.regions.items() if set(region) & reached})
    source = ours.only(
        {label: tuple(v for v in values if values[v] in region) for label, region in target.regions.items()}
    )
    if not target.regions:
        raise ValueError(f"No label of the model becomes a label of {name}: there is nothing to evaluate.")
    return LabelMapping(values, target, source)


def _value(label: str | int, labels: LabelSet, owner: str) -> int:
    """A label's value, given as name or number."""
    if isinstance(label, str) and len(labels.regions.get(label, ())) == 1:
        return labels.regions[label][0]
    if isinstance(label, str | int) and str(label).isdecimal() and int(label) in labels.values:
        return int(label)
    raise ValueError(
        f"The mapping file names label {shown(label)}, which {owner} lacks; it has {', '.join(labels.regions)}. "
        "The direction is MODEL's label: DATASET's label."
    )
