"""What is shown of a case: its planes, slices of them, and how much there is of each label."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_lgms.runtime.description import Description
from nnunet_lgms.runtime.images import Case
from nnunet_lgms.runtime.readers import READERS, NibabelReader

#: colours of the first labels (Okabe and Ito's palette, told apart by most eyes); others go round the colour circle
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
GOLDEN_ANGLE = 0.381966  # of the circle: neighbours in the list are far from each other in colour
PLANES = ("axial", "coronal", "sagittal")  # of axes that point to the head, to the back, to the patient's left
MARGIN = 4.0  # windows on either side of the first one that grey values are kept for
LEVELS = 65535


@dataclass(frozen=True)
class Plane:
    """One way to cut a volume, (rows, columns) as they are shown.

    Attributes:
        name: of the plane: the body's where the image says how the patient lies, else of the array's axes.
        slices: how many there are.
        shape: rows and columns of a slice.
        spacing: of rows and columns, in mm, or in pixels.
        edges: what lies on the left and right and at the top and bottom, "" where nobody knows.
    """

    name: str
    slices: int
    shape: tuple[int, int]
    spacing: tuple[float, float]
    edges: tuple[str, str, str, str]


class Picture:
    """A case as it is shown, axes turned so that they point to the head, to the back and to the patient's left.

    Args:
        case: as it was read; its samples are copied.

    Attributes:
        colours: whether it is a picture of three colours; else its first channel is shown.
        low, step: a grey value g of 0 to 65535 is ``low + step * g`` in the image.
        window: the 0.5 and the 99.5 percentile of the image.
    """

    def __init__(self, case: Case):
        samples = case.samples
        self.colours = len(samples) == 3 and samples.min() >= 0 and samples.max() <= 255
        self.low, self.step, self.window = 0.0, 1.0, (0.0, 255.0)
        if self.colours:
            values = samples.astype(np.uint8)
        else:
            values = self._quantised(samples[0])[None]
        self.flat = case.flat
        self._order, self._flips, self.edges = orientation(case)
        self.values = self._turned(values)
        self.spacing = tuple(case.spacing[axis] for axis in self._order)
        self.labels: np.ndarray | None = None

    def _quantised(self, image: np.ndarray) -> np.ndarray:
        low, high = (float(value) for value in np.percentile(image, (0.5, 99.5)))
        if low == high:  # hardly anything but one value: all that there is
            low, high = float(image.min()), float(image.max())
        width = high - low or max(1.0, abs(high) / 1000)
        smallest, largest = (
            max(float(image.min()), low - MARGIN * width),
            min(float(image.max()), high + MARGIN * width),
        )
        self.low, self.step = smallest, (largest - smallest) / LEVELS or 1.0
        self.window = (low, low + width)
        values = np.empty(image.shape, np.uint16)
        for z, plane in enumerate(image):  # slice by slice, a volume is held twice otherwise
            values[z] = np.clip(np.rint((plane - smallest) / self.step), 0, LEVELS)
        return values

    def _turned(self, values: np.ndarray) -> np.ndarray:
        """(C, Z, Y, X) as the file has it -> a view with the axes of this class."""
        turned = values.transpose(0, *(axis + 1 for axis in self._order))
        return turned[(slice(None), *(slice(None, None, -1 if flip else 1) for flip in self._flips))]

    def add_labels(self, labels: np.ndarray) -> None:
        """Labels (Z, Y, X), or (Y, X) of a flat image, to be shown as well."""
        self.labels = self._turned(labels.reshape(1, *labels.shape[-3:]) if labels.ndim == 3 else labels[None, None])[0]

    @property
    def planes(self) -> list[Plane]:
        names = PLANES if any(self.edges) else ("xy", "xz", "yz")
        return [self._plane(axis, names[axis]) for axis in range(1 if self.flat else 3)]

    def _plane(self, axis: int, name: str) -> Plane:
        rows, columns = (other for other in range(3) if other != axis)
        sizes = self.values.shape[1:]
        first, last = self.edges[2 * columns : 2 * columns + 2], self.edges[2 * rows : 2 * rows + 2]
        edges = (*first, *(last if axis == 0 else last[::-1]))
        spacing = (self.spacing[rows], self.spacing[columns])
        return Plane(name, sizes[axis], (sizes[rows], sizes[columns]), spacing, edges)

    def fullest(self) -> list[int]:
        """For each plane the slice with most labelled voxels; the middle one where there are none."""
        if self.labels is None or not (seen := self.labels > 0).any():
            return [plane.slices // 2 for plane in self.planes]
        axes = range(len(self.planes))
        return [int(np.count_nonzero(seen, axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in axes]

    def slice_bytes(self, axis: int, index: int) -> bytes:
        """One slice: three bytes a pixel, or a grey value of two, and then the labels, two bytes each; little-endian.

        Raises:
            IndexError: there is no such slice.
        """
        if not 0 <= axis < len(self.planes) or not 0 <= index < self.values.shape[axis + 1]:
            raise IndexError
        image = np.moveaxis(self.values.take(index, axis=axis + 1), 0, -1)
        labels = np.zeros(0) if self.labels is None else self.labels.take(index, axis=axis)
        if axis != 0:  # the head is at the top
            image, labels = image[::-1], labels[::-1]
        return image.astype("u1" if self.colours else "<u2").tobytes() + labels.astype("<u2").tobytes()


def has_spacing(case: Case) -> bool:
    """Whether the image says how large a voxel is."""
    if case.geometry is None:
        return False
    return READERS[case.reader].affine(case.geometry) is not None or set(case.spacing) != {1.0}  # a TIFF without one


def orientation(case: Case) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[str, ...]]:
    """How a case is turned so that its axes point to the head (H), to the back (P) and to the patient's left (L).

    Returns:
        order of the axes, which of them are reversed then, and the letters of their two ends; "" where the image does
        not say how the patient lies.
    """
    as_it_is = (0, 1, 2), (False,) * 3, ("",) * 6
    affine = None if case.flat or case.geometry is None else READERS[case.reader].affine(case.geometry)
    if affine is None:
        return as_it_is
    towards_lph = affine[:3, :3] * ([[-1], [-1], [1]] if isinstance(READERS[case.reader], NibabelReader) else 1)
    spacing = np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    direction = (towards_lph / spacing)[::-1, ::-1]  # rows H, P, L; columns z, y, x
    order = [int(np.abs(row).argmax()) for row in direction]
    if sorted(order) != [0, 1, 2]:  # turned by 45°, or no rotation at all
        return as_it_is
    flips = tuple(bool(direction[row, axis] < 0) for row, axis in enumerate(order))
    return tuple(order), flips, ("F", "H", "A", "P", "R", "L")


def colour_of(number: int) -> tuple[int, int, int]:
    """Colour of the label that is `number` in the list, from 0."""
    if number < len(COLOURS):
        return COLOURS[number]
    shade = colorsys.hsv_to_rgb(number * GOLDEN_ANGLE % 1, 0.65 + 0.3 * (number % 2), 0.95 - 0.25 * (number % 3) / 2)
    return tuple(round(255 * part) for part in shade)


def values_of(description: Description) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For every label or region of a model: the value that it is drawn as, and the values that it is made of.

    A region is what its definition says: the kidney with its tumour, although the mask has another value there.
    """
    named = {name: value for name, value in description.labels.items() if name not in ("background", "ignore")}
    if description.regions_class_order is None:
        return {name: (int(value), (int(value),)) for name, value in named.items()}
    parts = [tuple(map(int, v)) if isinstance(v, (list, tuple)) else (int(v),) for v in named.values()]
    return {name: (int(value), part) for name, value, part in zip(named, description.regions_class_order, parts)}


def amounts(labels: np.ndarray, case: Case, description: Description) -> list[dict]:
    """How much there is of each label: its volume in mm³, area in mm² of a flat image, or voxels without a spacing."""
    found: Mapping[int, int] = dict(zip(*(array.tolist() for array in np.unique(labels, return_counts=True))))
    known = has_spacing(case)
    sizes: Sequence[float] = case.spacing[1:] if case.flat else case.spacing
    unit = ("mm²" if case.flat else "mm³") if known else ("pixels" if case.flat else "voxels")
    rows = []
    for number, (name, (drawn, values)) in enumerate(values_of(description).items()):
        count = sum(found.get(value, 0) for value in values)
        amount = count * float(np.prod(sizes)) if known else count
        rows.append(
            {"name": name, "value": drawn, "colour": colour_of(number), "count": count, "amount": amount, "unit": unit}
        )
    return rows
