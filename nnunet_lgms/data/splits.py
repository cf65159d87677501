"""The folds of the paper, in the form of nnU-Net's `splits_final.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
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
    text = resources.files("nnunet_lgms.data").joinpath("busi_paper_splits.json").read_text()
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
                    f"Fold {fold} of the paper's splits has no {part} case among the {len(identifiers)} converted "
                    f"cases: convert the whole dataset, or leave --splits out and let nnU-Net make its own five folds."
                )
