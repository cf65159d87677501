"""What checking one case brings to light. Both kinds of file, flat images and volumes, report in this form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Inspection:
    """The result of reading one case completely.

    Args:
        problems: one sentence for each reason not to convert the case.
        digest: fingerprint of the image's samples and shape; equal digests are equal images. None if unreadable.
        empty: whether the mask is empty.
        full: whether a mask marks the whole picture.
        turned: whether image or mask had to be turned, as their files say.
        labels: nnU-Net's label values that the masks hold.
    """

    problems: tuple[str, ...]
    digest: str | None = None
    empty: bool = False
    full: bool = False
    turned: bool = False
    labels: frozenset[int] = frozenset()
