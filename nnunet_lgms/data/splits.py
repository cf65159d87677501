"""The folds of the paper, in the form of nnU-Net's `splits_final.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TypedDict

import numpy as np


class Split(TypedDict):
    """One fold: identifiers of its training and of its validation cases."""

    train: list[str]
    val: list[str]


def random_splits(identifiers: Sequence[str], n_splits: int = 3, train_fraction: float = 0.7) -> list[Split]:
    """Three seeded 70/30 splits, of the same kind as those that the paper's authors released for BUSI.

    Fold k is drawn with seed k + 1 from the sorted identifiers. `RandomState` is used because NumPy promises that its
    numbers never change.
    """
    ordered = sorted(identifiers)
    n_train = int(train_fraction * len(ordered))
    folds: list[Split] = []
    for fold in range(n_splits):
        order = np.random.RandomState(fold + 1).permutation(len(ordered))
        train, val = order[:n_train], order[n_train:]
        folds.append({"train": sorted(ordered[i] for i in train), "val": sorted(ordered[i] for i in val)})
    return folds


def busi_splits(identifiers: Sequence[str]) -> list[Split]:
    """The three 452/195 splits of BUSI that the paper's authors released, by image name ("benign (1)" → "benign_1").

    Names that are not in the converted dataset are dropped (a sample, or cases left out for a fault), and cases without
    a place in the splits (class normal) stay unused.
    """
    text = resources.files("nnunet_lgms.data").joinpath("busi_paper_splits.json").read_text("utf-8")
    present = set(identifiers)
    folds: list[Split] = []
    for fold in json.loads(text).values():
        names = {part: [re.sub(r"\W+", "_", name).strip("_") for name in fold[part]] for part in ("train", "val")}
        folds.append(
            {
                "train": [name for name in names["train"] if name in present],
                "val": [name for name in names["val"] if name in present],
            }
        )
    return folds


def isic2018_splits(identifiers: Sequence[str]) -> list[Split]:
    """The three 1815/779 splits of ISIC 2018 that the paper's authors released."""
    return _released("isic18", lambda name: name, identifiers)


def tnscui_splits(identifiers: Sequence[str]) -> list[Split]:
    """The three 2550/1094 splits of TN-SCUI that the paper's authors released, by number ("12" → "tnscui_12")."""
    return _released("tuscui", lambda name: f"tnscui_{name}", identifiers)


def _released(dataset: str, identifier_of: Callable[[str], str], identifiers: Sequence[str]) -> list[Split]:
    """Released names as identifiers, without those that are not in the converted dataset."""
    text = resources.files("nnunet_lgms.data").joinpath("isic2018_tnscui_paper_splits.json").read_text("utf-8")
    present = set(identifiers)
    return [
        {part: [name for name in map(identifier_of, fold[part]) if name in present] for part in ("train", "val")}
        for fold in json.loads(text)[dataset]
    ]


def patient_splits(identifiers: Sequence[str], *, n_splits: int, patient: re.Pattern[str] | None = None) -> list[Split]:
    """Cross-validation as nnU-Net makes it, with the same seed, but of patients: each is in one part of a fold.

    Args:
        identifiers: the cases.
        n_splits: folds.
        patient: pattern of an identifier with a group `patient`; None: every case is a patient of its own.

    Raises:
        ValueError: the pattern does not fit a case, or there are fewer patients than folds.
    """
    from sklearn.model_selection import KFold

    cases: dict[str, list[str]] = {}
    for identifier in sorted(identifiers):
        match = patient.fullmatch(identifier) if patient else None
        if patient and not match:
            raise ValueError(f"--patient does not fit the case {identifier}: it must fit the names of all cases.")
        cases.setdefault(match["patient"] if match else identifier, []).append(identifier)
    patients = np.array(sorted(cases))
    if len(patients) < n_splits:
        raise ValueError(f"--splits {n_splits} needs as many patients, there are {len(patients)}.")
    folds = KFold(n_splits, shuffle=True, random_state=12345).split(patients)
    return [
        {"train": [c for p in patients[t] for c in cases[p]], "val": [c for p in patients[v] for c in cases[p]]}
        for t, v in folds
    ]


_BTCV_VALIDATION = ("01", "02", "03", "04", "08", "22", "25", "29", "32", "35", "36", "38")


def btcv_split(identifiers: Sequence[str]) -> list[Split]:
    """The usual 18/12 split of BTCV's 30 training cases (Chen et al., TransUNet, arXiv 2102.04306, `lists_Synapse`)."""
    val = {f"btcv_00{number}" for number in _BTCV_VALIDATION}
    ordered = sorted(identifiers)
    return [{"train": [i for i in ordered if i not in val], "val": [i for i in ordered if i in val]}]


def check_splits(splits: Sequence[Split], identifiers: Sequence[str]) -> None:
    """Raise ValueError if a fold has nothing to train on or nothing to validate on."""
    for fold, split in enumerate(splits):
        for part in ("train", "val"):
            if not split[part]:
                raise ValueError(
                    f"Fold {fold} of the splits has no {part} case among the {len(identifiers)} converted "
                    f"cases: convert the whole dataset, or leave --splits out and let nnU-Net make its own five folds."
                )
