"""Which labels and regions are evaluated, and which values a label file may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_lgms.dataset_json import MAX_LABEL
from nnunet_lgms.files import shown


@dataclass(frozen=True)
class LabelSet:
    """What is evaluated.

    Args:
        regions: name → label values that make up the foreground. A plain label is a region of one value.
        ignore: value of unannotated voxels in the reference, which count nowhere; None if there are none.
    """

    regions: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @property
    def values(self) -> frozenset[int]:
        """All label values that are spoken of, background included."""
        return frozenset(value for region in self.regions.values() for value in region) | {0}

    @classmethod
    def from_dataset_json(cls, content: Mapping) -> LabelSet:
        """nnU-Net's labels or regions; its background is no foreground, its label "ignore" is left out."""
        regions, ignore = {}, None
        for name, value in content["labels"].items():
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if name == "ignore":
                ignore = values[0]
            elif values != (0,):
                regions[name] = tuple(int(v) for v in values)
        return cls(regions, ignore)

    @classmethod
    def parse(cls, words: Sequence[str]) -> LabelSet:
        """Labels from the command line: `1`, `kidney=1`, or the region `masses=2,3`.

        Raises:
            ValueError: a word is none of these, or a name comes twice.
        """
        regions: dict[str, tuple[int, ...]] = {}
        for word in words:
            name, _, values = word.rpartition("=")
            try:
                region = tuple(int(v) for v in values.split(","))
            except ValueError:
                region = (-1,)
            if not all(0 <= value <= MAX_LABEL for value in region):
                raise ValueError(
                    f"--labels {shown(word)} is not understood: write 1, or kidney=1, or masses=2,3, with values up to "
                    f"{MAX_LABEL}."
                )
            name = name or "+".join(str(v) for v in region)
            if name in regions:
                raise ValueError(f"--labels names {name} twice.")
            regions[name] = region
        return cls(regions)
