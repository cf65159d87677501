"""The data sets of the evidence, as a table: where their files lie, what their labels are, how they are split.

A new set is a row of `SETS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_lgms.data.convert import convert, write_splits
from nnunet_lgms.data.folder import describe, find_pairs
from nnunet_lgms.data.splits import Split, busi_splits, patient_splits

Rule = Callable[[Path, Sequence[str]], list[Split]]  # (folder of the set, its cases) -> nnU-Net's splits_final.json

GREY, RGB, MRI = ("ultrasound",), ("rgb_to_0_1",) * 3, ("MRI",)
FLAT, VOLUMES = "2d", "3d_fullres"
PIXELS = 256  # of a side of all images, as in the paper's 2D experiments


# ---- how cases are split ---------------------------------------------------------------------------------------------


def listed(train: str, validation: str) -> Rule:
    """The one split whose two lists of names lie beside the images."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        lists = {"train": (folder / train).read_text().split(), "val": (folder / validation).read_text().split()}
        if wrong := {*lists["train"], *lists["val"]} - set(cases) or set(lists["train"]) & set(lists["val"]):
            raise ValueError(f"{min(wrong)!r} has no image, or is in both {train} and {validation} of {folder}.")
        return [lists]

    return rule


def seeded(share: float, n: int) -> Rule:
    """``n`` random splits with this share of training cases, fold k by seed k."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        orders = [np.random.RandomState(seed).permutation(sorted(cases)).tolist() for seed in range(n)]
        size = round(share * len(cases))
        return [{"train": sorted(order[:size]), "val": sorted(order[size:])} for order in orders]

    return rule


def five_folds(patient: str | None = None) -> Rule:
    """nnU-Net's five folds, of patients where this pattern of a case's name tells them."""
    return lambda folder, cases: patient_splits(cases, n_splits=5, patient=patient and re.compile(patient))


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Args:
        number: nnU-Net's.
        title: nnU-Net's name of it, behind the number.
        source: its folder in the folder of all data.
        configuration: of nnU-Net; flat images are resized to 256 × 256.
        channels: names of the channels, by which nnU-Net chooses the normalisation.
        labels: names of labels 1, 2, ….
        rule: how it is split; None for a set that models are only tested on.
        about: what the tables say of it.
        folds: how many splits the rule gives.
        unseen: sets that its models are tested on without further training.
        images: folder of the images in ``source``.
        masks: folder of the masks.
        names: templates of the images' and masks' names, where they differ by more than nnU-Net's channel.
        same: two cases with one image, as published; any others are refused.
    """

    number: int
    title: str
    source: str
    configuration: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    rule: Rule | None
    about: str
    folds: int = 1
    unseen: tuple[str, ...] = ()
    images: str = "images"
    masks: str = "masks"
    names: tuple[str | None, str | None] = (None, None)
    same: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder in nnU-Net's folders."""
        return f"Dataset{self.number:03d}_{self.title}"


SETS = {
    "kvasir": DataSet(
        103, "Kvasir", "kvasir", FLAT, RGB, ("polyp",), seeded(0.8, 3),
        "Kvasir-SEG, polyps; 900 images, seeded 80/20", folds=3
    ),
    "acdc": DataSet(
        104, "ACDC", "acdc", VOLUMES, MRI, ("RV", "myocardium", "LV"), five_folds(r"(?P<patient>patient\d+)_.*"),
        "ACDC, cardiac MRI; 80 volumes of 40 patients, five folds of patients", folds=5
    ),
    "isic": DataSet(
        105, "ISIC2017", "isic2017", FLAT, RGB, ("lesion",), listed("train.txt", "val.txt"),
        "ISIC 2017, dermoscopy; the official 2000 and 150 images", unseen=("ph2",),
        same=("ISIC_0012127", "ISIC_0012970")
    ),
    "busi": DataSet(
        101, "BUSI", "busi_256", FLAT, GREY, ("lesion",), lambda folder, cases: busi_splits(cases),
        "BUSI, breast ultrasound; the paper's splits", folds=3, unseen=("stu",), same=("benign_433", "malignant_145")
    ),
    "hippocampus": DataSet(
        4, "Hippocampus", "hippocampus", VOLUMES, MRI, ("anterior", "posterior"), five_folds(),
        "hippocampus, MRI; Medical Segmentation Decathlon, 230 volumes, five folds", folds=5,
        images="imagesTr", masks="labelsTr"
    ),
    "chaos": DataSet(
        106, "CHAOST2", "chaos_t2", VOLUMES, MRI, ("liver", "right_kidney", "left_kidney", "spleen"), five_folds(),
        "CHAOS, abdominal T2-SPIR MRI; 20 volumes, five folds", folds=5
    ),
    "la2018": DataSet(
        107, "LA2018", "la2018", VOLUMES, MRI, ("atrium",), listed("train.list", "test.list"),
        "left atrium, LGE MRI; 2018 challenge, 80 and 20 volumes"
    ),
    "stu": DataSet(
        102, "STU", "stu_hospital", FLAT, GREY, ("lesion",), None, "STU, breast ultrasound of another hospital",
        images=".", masks=".", names=("Test_Image_{case}.png", "mask_{case}.png")
    ),
    "ph2": DataSet(108, "PH2", "ph2", FLAT, RGB, ("lesion",), None, "PH2, dermoscopy of another hospital"),
}  # fmt: skip


def with_unseen(names: Sequence[str]) -> list[DataSet]:
    """These sets, and those that their models are tested on."""
    return [SETS[name] for name in dict.fromkeys([*names, *(other for n in names for other in SETS[n].unseen)])]


# ---- into nnU-Net's folders ------------------------------------------------------------------------------------------


def gather(row: DataSet, data: Path, raw: Path, preprocessed: Path) -> None:
    """Writes ``raw/DATASET``, checked, and its splits to ``preprocessed``, as ``nnunet_lgms convert folder`` does.

    Volumes are read with nibabel: SimpleITK's 52 MB are more than may travel to some machines.

    Raises:
        ValueError: see `convert`; or a list names a case that is not there, or one case for both sides.
    """
    folder, is_flat = data / row.source, row.configuration == FLAT
    images, masks = folder / row.images, folder / row.masks
    labels = {name: value for value, name in enumerate(row.labels, start=1)}
    description = describe(
        images,
        title=row.title,
        labels=[] if is_flat else [f"{name}={value}" for name, value in labels.items()],
        channels=row.channels,
        reader="NaturalImage2DIO" if is_flat else "NibabelIO",
    )
    description = replace(
        description,
        labels={"background": 0} | labels,
        known_duplicates=(frozenset(row.same),),
        image_follows_mask=True,
    )
    conversion = convert(
        description,
        folder,
        row.number,
        raw=raw,
        size=PIXELS if is_flat else None,
        find=lambda: find_pairs(description, images, masks, *row.names),
    )
    if row.rule:
        write_splits(replace(description, paper_splits=partial(row.rule, folder)), conversion, preprocessed)
