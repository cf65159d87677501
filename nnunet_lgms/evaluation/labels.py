"""Which labels and regions are evaluated, and which values a label file may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nnunet_lgms.dataset_json import MAX_LABEL
from nnunet_lgms.files import shown


@dataclass(frozen=True)
class LabelSet:
    """What is evaluated.

    Args:
        regions: name → label values that make up the foreground. A plain label is a region of one value.
        ignore: value of unannotated voxels in the reference, which count nowhere; None if there are none.
        background: values that count as background.
        is_selection: whether the files may hold more labels than are named here, as where a user asks for one of them.
    """

    regions: Mapping[str, tuple[int, ...]]
    ignore: int | None = None
    background: frozenset[int] = frozenset({0})
    is_selection: bool = False

    @property
    def foreground(self) -> frozenset[int]:
        """All values of all regions."""
        return frozenset(value for region in self.regions.values() for value in region)

    @property
    def values(self) -> frozenset[int]:
        """All label values that are spoken of, background included."""
        return self.foreground | self.background

    def only(self, regions: Mapping[str, tuple[int, ...]]) -> LabelSet:
        """The same files with other regions: values that are in none of them count as background."""
        others = replace(self, regions=regions)
        return replace(others, background=self.values - others.foreground)

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
    def parse(cls, words: Sequence[str], described: LabelSet | None = None) -> LabelSet:
        """Labels from the command line: `1`, `kidney=1`, or the region `masses=2,3`.

        `background=4` says that 4 counts as background, `ignore=255` that 255 is not annotated.

        Args:
            words: of the command line.
            described: labels of the files' dataset.json. Those that are not named count as background; its ignore label
                stays one, unless it is named.

        Raises:
            ValueError: a word is none of these, or a name comes twice, or a value that can be but one thing.
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
            if same := next((other for other in regions if set(regions[other]) == set(region)), None):
                raise ValueError(
                    f"--labels gives {name} and {same} the same value, {values}: each label needs values of its own."
                )
            regions[name] = region
        background = frozenset(regions.pop("background", ())) | {0} - {v for region in regions.values() for v in region}
        ignored = regions.pop("ignore", ())
        labels = cls(regions, ignored[0] if ignored else None, background, is_selection=True)
        if len(set(ignored)) > 1:
            raise ValueError(f"--labels gives ignore {len(set(ignored))} values: nnU-Net's ignore label has one.")
        if twice := sorted((background & labels.foreground) | (labels.values & set(ignored))):
            raise ValueError(
                f"--labels gives the value {twice[0]} to background or ignore and to another label: it can be but one."
            )
        if described is None:
            return labels
        ignore = labels.ignore
        if ignore is None and described.ignore not in labels.values:
            ignore = described.ignore
        others = described.values - labels.foreground - {ignore}
        return replace(labels, ignore=ignore, background=background | others)
