"""The data sets of the evidence, as a table: where their files lie, what their labels are, how they are split.

`gather` makes of a row what nnU-Net wants to find in ``nnUNet_raw``; `splits_of` makes its ``splits_final.json``. A new
set is a row of `SETS`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from nnunet_lgms.data.natural_images import read_mask
from nnunet_lgms.files import atomic_write, read_json

Split = dict[str, list[str]]
Rule = Callable[[Path, Sequence[str]], list[Split]]

GREY, RGB, MRI = ("ultrasound",), ("rgb_to_0_1",) * 3, ("MRI",)
PIXELS = 256  # of a side of all images, as in the paper's 2D experiments


# ---- how cases are split: (folder of the set, its cases) -> folds of nnU-Net's splits_final.json --------------------


def listed(train: str, validation: str) -> Rule:
    """The one split whose two lists of names lie beside the images."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        return [{"train": (folder / train).read_text().split(), "val": (folder / validation).read_text().split()}]

    return rule


def papers(file: str) -> Rule:
    """The splits that the paper's authors released, by image name."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        return [
            {part: [case_of(name) for name in fold[part]] for part in fold}
            for fold in read_json(folder / file).values()
        ]

    return rule


def seeded(share: float, n: int) -> Rule:
    """``n`` random splits with this share of training cases, fold k by seed k."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        orders = [np.random.RandomState(seed).permutation(sorted(cases)).tolist() for seed in range(n)]
        size = round(share * len(cases))
        return [{"train": sorted(order[:size]), "val": sorted(order[size:])} for order in orders]

    return rule


def five_folds(of: Callable[[str], str] = str) -> Rule:
    """nnU-Net's five folds over what ``of`` makes of a case's name: its patient, where one has several cases."""

    def rule(folder: Path, cases: Sequence[str]) -> list[Split]:
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        folds = generate_crossval_split(sorted({of(case) for case in cases}), seed=12345, n_splits=5)
        return [{part: sorted(c for c in cases if of(c) in set(fold[part])) for part in fold} for fold in folds]

    return rule


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Args:
        number: nnU-Net's.
        title: nnU-Net's name of it, behind the number.
        source: its folder in the folder of all data.
        channels: names of the channels, by which nnU-Net chooses the normalisation.
        labels: names of labels 1, 2, ….
        rule: how it is split; None for a set that models are only tested on.
        images: pattern of the image files in ``source``, with the case's name as its group.
        masks: the mask of a case, with ``{}`` for what the group holds.
        about: what the tables say of it.
        folds: how many splits the rule gives.
        unseen: sets that its models are tested on without further training.
    """

    number: int
    title: str
    source: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    rule: Rule | None
    about: str
    images: str = r"images/(.+)\.nii\.gz"
    masks: str = "masks/{}.nii.gz"
    folds: int = 1
    unseen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder in nnU-Net's folders."""
        return f"Dataset{self.number:03d}_{self.title}"

    @property
    def is_flat(self) -> bool:
        return not self.masks.endswith(".nii.gz")

    @property
    def configuration(self) -> str:
        return "2d" if self.is_flat else "3d_fullres"

    @property
    def unit(self) -> str:
        return "pixels" if self.is_flat else "mm"

    def files(self, data: Path) -> dict[str, tuple[Path, Path]]:
        """Case → its image and its mask.

        Raises:
            ValueError: there are no images, or one of them has no mask.
        """
        folder, found = data / self.source, {}
        for path in sorted(folder.rglob("*")):
            if match := re.fullmatch(self.images, path.relative_to(folder).as_posix()):
                mask = folder / self.masks.format(match[1])
                if not mask.is_file():
                    raise ValueError(f"{path} has no mask {mask}: is {folder} complete?")
                found[case_of(match[1])] = path, mask
        if not found:
            raise ValueError(f"{folder} holds no image {self.images}: give the folder that {self.source} lies in.")
        return found


def case_of(name: str) -> str:
    """A name without blanks and brackets: "benign (1)" → "benign_1"."""
    return re.sub(r"\W+", "_", name).strip("_")


JPEG, PNG = (
    {"images": r"images/(.+)\.jpg", "masks": "masks/{}.png"},
    {"images": r"images/(.+)\.png", "masks": "masks/{}.png"},
)
HOSPITAL = {"images": r"Test_Image_(\d+)\.png", "masks": "mask_{}.png"}
MSD = {"images": r"imagesTr/(.+)_0000\.nii\.gz", "masks": "labelsTr/{}.nii.gz"}

SETS = {
    "kvasir": DataSet(
        103, "Kvasir", "kvasir", RGB, ("polyp",), seeded(0.8, 3), "Kvasir-SEG, polyps; 900 images, seeded 80/20",
        folds=3, **JPEG
    ),
    "acdc": DataSet(
        104, "ACDC", "acdc", MRI, ("RV", "myocardium", "LV"), five_folds(lambda case: case.split("_")[0]),
        "ACDC, cine MRI of the heart; 80 volumes of 40 patients, five folds of patients", folds=5
    ),
    "isic": DataSet(
        105, "ISIC2017", "isic2017", RGB, ("lesion",), listed("train.txt", "val.txt"),
        "ISIC 2017, dermoscopy; the official 2000 and 150 images", unseen=("ph2",), **JPEG
    ),
    "busi": DataSet(
        101, "BUSI", "busi_256", GREY, ("lesion",), papers("paper_splits.json"),
        "BUSI, breast ultrasound; the paper's splits", folds=3, unseen=("stu",), **PNG
    ),
    "hippocampus": DataSet(
        4, "Hippocampus", "hippocampus", MRI, ("anterior", "posterior"), five_folds(),
        "hippocampus, MRI, Medical Segmentation Decathlon; 230 volumes, five folds", folds=5, **MSD
    ),
    "chaos": DataSet(
        106, "CHAOST2", "chaos_t2", MRI, ("liver", "right_kidney", "left_kidney", "spleen"), five_folds(),
        "CHAOS, abdominal T2-SPIR MRI; 20 volumes, five folds", folds=5
    ),
    "la2018": DataSet(
        107, "LA2018", "la2018", MRI, ("atrium",), listed("train.list", "test.list"),
        "left atrium, LGE MRI, 2018 challenge; 80 and 20 volumes"
    ),
    "stu": DataSet(
        102, "STU", "stu_hospital", GREY, ("lesion",), None, "STU, breast ultrasound of another hospital", **HOSPITAL
    ),
    "ph2": DataSet(108, "PH2", "ph2", RGB, ("lesion",), None, "PH2, dermoscopy of another hospital", **JPEG),
}  # fmt: skip


# ---- into nnU-Net's folders ------------------------------------------------------------------------------------------


def pixels(file: Path | BinaryIO, channels: int) -> np.ndarray:
    """An image file as the networks get it: 8 bits, (H, W) or (H, W, 3), 256 × 256."""
    with Image.open(file) as image:
        image = image.convert("L" if channels == 1 else "RGB")
        return np.asarray(
            image if image.size == (PIXELS, PIXELS) else image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
        )


def gather(dataset: DataSet, data: Path, raw: Path) -> None:
    """Writes ``raw/DATASET`` as nnU-Net wants it."""
    folder, files = raw / dataset.name, dataset.files(data)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    ending = ".png" if dataset.is_flat else ".nii.gz"
    for case, (image, mask) in files.items():
        to_image, to_mask = folder / "imagesTr" / f"{case}_0000{ending}", folder / "labelsTr" / f"{case}{ending}"
        if dataset.is_flat:
            Image.fromarray(pixels(image, len(dataset.channels))).save(to_image)
            label = Image.fromarray(read_mask(mask).astype(np.uint8))
            label.resize((PIXELS, PIXELS), Image.Resampling.NEAREST).save(to_mask)
        else:
            shutil.copyfile(image, to_image)
            shutil.copyfile(mask, to_mask)
    description = {
        "channel_names": {str(i): name for i, name in enumerate(dataset.channels)},
        "labels": {"background": 0} | {name: i + 1 for i, name in enumerate(dataset.labels)},
        "numTraining": len(files),
        "file_ending": ending,
    }
    with atomic_write(folder / "dataset.json") as temporary:
        temporary.write_text(json.dumps(description, indent=1) + "\n")


def splits_of(dataset: DataSet, data: Path) -> list[Split]:
    """The folds of ``splits_final.json``.

    Raises:
        ValueError: a list names a case that is not there, or one case for both sides.
    """
    cases = list(dataset.files(data))
    folds = dataset.rule(data / dataset.source, cases)
    for fold in folds:
        if unknown := {*fold["train"], *fold["val"]} - set(cases):
            raise ValueError(
                f"The splits of {dataset.title} name {sorted(unknown)[0]!r}, which is not in {dataset.source}."
            )
        if both := set(fold["train"]) & set(fold["val"]):
            raise ValueError(f"The splits of {dataset.title} put {sorted(both)[0]!r} on both sides.")
    return folds
