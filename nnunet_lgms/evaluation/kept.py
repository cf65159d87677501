"""Predictions that an earlier call left, tied to what made them: kept only if all of it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import nnunet_lgms
from nnunet_lgms.files import atomic_write, read_json
from nnunet_lgms.nnunet_files import Reader

RECORD = "made_from.json"
"""Beside the predictions: digests of weights, plans and description, and of the images of each case."""


def made_by(model_folder: Path, fold: int | str, checkpoint: str) -> dict[str, str]:
    """What decides a prediction beside its images: digests of one fold's weights, of the plans and the labels."""
    files = {"weights": f"fold_{fold}/{checkpoint}", "plans": "plans.json", "dataset": "dataset.json"}
    return {name: _digest([model_folder / file]) for name, file in files.items()} | {
        "nnunet_lgms": nnunet_lgms.__version__
    }


def discard_outdated(
    folder: Path, maker: Mapping[str, str], cases: Mapping[str, Sequence[Path]], reader: Reader
) -> list[str]:
    """Removes predictions that something else made, and writes down what makes those that come.

    Args:
        folder: of the predictions, `CASE.nii.gz`.
        maker: of `made_by`.
        cases: of :func:`nnunet_lgms.nnunet_files.image_files`.
        reader: of the predictions.

    Returns:
        The cases that are to be predicted.
    """
    inputs = {case: _digest(files) for case, files in cases.items()}
    record = _read(folder / RECORD)
    known = record["inputs"] if record.get("made_by") == maker else {}
    missing = []
    # what is in neither list is not ours
    for case in sorted({*inputs, *record.get("inputs", ())}):
        path = folder / f"{case}{reader.file_ending}"
        if case not in inputs or known.get(case) != inputs[case] or not _is_whole(path, reader):
            path.unlink(missing_ok=True)
            missing += [case] if case in inputs else []
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps({"made_by": dict(maker), "inputs": inputs}, indent=2))
    return missing


def _read(path: Path) -> dict:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(record, dict) and isinstance(record.get("inputs"), dict)
    return record if is_ours else {}


def _is_whole(path: Path, reader: Reader) -> bool:
    """nnU-Net writes into the file itself, so that one of a call that was killed may be cut."""
    try:
        reader.read_labels(path)
    except ValueError:
        return False
    return True


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
        digest.update(f"{path.name} {path.stat().st_size};".encode())
    return digest.hexdigest()
