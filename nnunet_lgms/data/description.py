"""What a dataset converter has to know: where the files lie, what they mean, how nnU-Net should see them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nnunet_lgms.data.splits import Split, random_splits

GRAY = ("ultrasound",)
"""One grey channel. Any name that nnU-Net does not know is normalised per image to mean 0, standard deviation 1."""

RGB = ("rgb_to_0_1", "rgb_to_0_1", "rgb_to_0_1")
"""Three colour channels of one file. nnU-Net divides channels of this name by 255, which keeps the colour: with its
default (each channel of each image to mean 0) pale and dark skin, or reddened and healthy mucosa, would look alike."""

CT = ("CT",)
"""Hounsfield units: nnU-Net clips and scales with the foreground statistics of the whole training set."""


@dataclass(frozen=True)
class Layout:
    """One arrangement of image and mask files in a download.

    Args:
        image: regular expression of an image's path below (and including) the source folder, with `/` between folders.
            It is matched at the end of the path, regardless of case; its group `case` names the case.
        mask: the same for masks. Several masks may name one case: they are merged.
        example_image: path that `image` matches, for messages.
        example_mask: path that `mask` matches, for messages.
    """

    image: str
    mask: str
    example_image: str
    example_mask: str

    @cached_property
    def image_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:.*/)?{self.image}", re.IGNORECASE)

    @cached_property
    def mask_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:.*/)?{self.mask}", re.IGNORECASE)

    def __str__(self) -> str:
        return f"{self.example_image} with {self.example_mask}"


@dataclass(frozen=True)
class DatasetDescription:
    """Everything that tells one dataset from another.

    Args:
        name: what users type, `nnunet_lgms convert NAME`.
        title: what stands in nnU-Net's folder name, `Dataset101_TITLE`.
        layouts: known arrangements of the download, the publisher's own first.
        channel_names: nnU-Net's channel names. They choose the normalisation.
        labels: nnU-Net's labels. A tuple of values is a region (then give `regions_class_order`).
        published_cases: number of pairs per layout that the publisher ships. Another number is worth a remark.
        reference: publication and address.
        licence: terms of use as far as they are stated.
        identifier: nnU-Net's name of a case, made from the layout's group `case`.
        kind: "image" (PNG, JPEG, BMP, TIFF; written as PNG) or "volume" (copied as it is).
        volume_ending: of volumes, their images and labels.
        label_of: what a label file holds, a number or a colour → nnU-Net's label. None: flat masks, one thing on black;
            volumes, nnU-Net's labels themselves.
        deep: flat images of 16 bits keep them.
        regions_class_order: see nnU-Net's documentation on region-based training.
        left_out: groups of cases that are left out unless asked for: option name → regular expression of `case`.
        image_follows_mask: the publisher's masks are larger than its images. The image is brought to the mask's size
            (bicubic) instead of calling it a mismatch, as long as both have the same aspect ratio.
        known_duplicates: sets of identifiers whose images are the same in the publisher's own release. They are kept.
        reader: name of the reader in `nnunetv2.imageio`.
        paper_splits: identifiers → folds of `--splits paper`.
        note: one remark that is printed after the conversion.
    """

    name: str
    title: str
    layouts: tuple[Layout, ...]
    channel_names: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    published_cases: tuple[int, ...]
    reference: str
    licence: str
    identifier: str = "{case}"
    kind: Literal["image", "volume"] = "image"
    volume_ending: str = ".nii.gz"
    label_of: Mapping[int | tuple[int, int, int], int] | None = None
    deep: bool = False
    regions_class_order: tuple[int, ...] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    image_follows_mask: bool = False
    known_duplicates: tuple[frozenset[str], ...] = ()
    reader: str = "NaturalImage2DIO"
    paper_splits: Callable[[Sequence[str]], list[Split]] = random_splits
    note: str = ""

    @property
    def file_ending(self) -> str:
        return ".png" if self.kind == "image" else self.volume_ending

    @property
    def label_values(self) -> frozenset[int]:
        """All values that may stand in a label file."""
        values = (v if isinstance(v, tuple) else (v,) for v in self.labels.values())
        return frozenset(value for group in values for value in group)

    def identify(self, case: str) -> str:
        """nnU-Net identifier of a case: letters, digits and single underscores, e.g. "benign (1)" → "benign_1"."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.identifier.format(case=case)).strip("_")
