"""``"lms_kernels": "auto"``: kernels from the sizes of the objects in a dataset.

The paper leaves open how kernels should follow the data; this is our answer. A depthwise kernel is there to see an
object and its border at once, so its physical extent should follow the objects' size, and a level should look after
the objects that still span some voxels there. We take every connected component of every foreground label, measure
its bounding box in mm, and call the geometric mean of the box's edges its size. With n LMS levels, level i answers
for the quantile i / (n + 1) of these sizes: the finest level for the small objects, the coarsest for the large. The
four groups of the level get extents that grow evenly from 3 voxels, the smallest neighbourhood, to that size; voxels
are measured along the level's finest axis. The size is first capped at 9 voxels, the largest kernel of the paper's
optimum, so a dataset of large objects and isotropic voxels gets the paper's kernels 3, 5, 7, 9, and one of small
objects gets smaller ones. Each extent then becomes, axis by axis, the nearest odd number of voxels of that axis's
spacing at that level (spacing times cumulative stride): a kernel of 9 mm is 3x9x9 voxels of 3x1x1 mm. Nothing is
random: of more than 50 cases, 50 are taken at even distances in the order of their names, and specks below 1 % of the
largest component of their label and case are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.files import files_in, one_line
from nnunet_lgms.nnunet_files import Reader
from nnunet_lgms.nnunet_folders import nnunet_folder
from nnunet_lgms.planning.plans_files import read_dataset_json

N_GROUPS = 4
SMALLEST, LARGEST = 3, 9
MAX_CASES = 50
SPECK = 0.01


@dataclass(frozen=True)
class Components:
    """Bounding boxes of the foreground components of a dataset.

    Attributes:
        edges: (N, 3) per axis, in the plan's order of axes.
        n_cases: cases that were looked at.
        unit: of the edges; "pixels" for formats without a spacing.
    """

    edges: np.ndarray
    n_cases: int
    unit: str = "mm"


@dataclass(frozen=True)
class LevelKernels:
    """What "auto" chose for one level.

    Attributes:
        level: its number, 1 at full resolution.
        spacing: per axis at that level, in `unit`.
        size: the objects' size that it answers for, in `unit`.
        kernels: odd voxels per axis, one kernel per channel group.
    """

    level: int
    spacing: tuple[float, ...]
    size: float
    kernels: tuple[tuple[int, ...], ...]
    unit: str = "mm"

    def __str__(self) -> str:
        voxels = " x ".join(f"{s:.3g}" for s in self.spacing)
        kernels = ", ".join("x".join(map(str, k)) for k in self.kernels)
        objects = f"objects of {self.size:.3g} {self.unit}"
        return f"level {self.level}: voxels of {voxels} {self.unit}, {objects} -> kernels {kernels}"


def choose_kernels(components: Components, topology: Topology, levels: Sequence[int]) -> list[LevelKernels]:
    """Kernels of the LMS groups at each of ``levels`` (module docstring).

    Raises:
        ValueError: there is no component to measure, or the plan has no spacing.
    """
    if not len(components.edges):
        raise ValueError(
            '"lms_kernels": "auto" found no foreground in the segmentations: give kernels as numbers, such as '
            "[3, 5, 7, 9]."
        )
    if topology.spacing is None:
        raise ValueError('"lms_kernels": "auto" needs the spacing, which the plan does not have: plan again.')
    in_plane = components.edges[:, -topology.dim :]
    sizes = np.exp(np.log(in_plane).mean(1))
    chosen = []
    for i, level in enumerate(levels, start=1):
        spacing = np.array(topology.spacing) * topology.downsampling(level)
        thick = np.array(topology.kernel_sizes[level - 1]) == 1
        finest = spacing[~thick].min() if not thick.all() else spacing.min()
        size = float(np.quantile(sizes, i / (len(levels) + 1)))
        reach = np.clip(size, SMALLEST * finest, LARGEST * finest)
        extents = np.linspace(SMALLEST * finest, reach, N_GROUPS)
        largest = np.minimum(LARGEST, topology.largest_kernel(level))
        kernels = tuple(
            tuple(1 if t else k for t, k in zip(thick.tolist(), _nearest_odd(extent / spacing, largest)))
            for extent in extents
        )
        chosen.append(LevelKernels(level, tuple(spacing.tolist()), size, kernels, components.unit))
    return chosen


def _nearest_odd(voxels: np.ndarray, largest: np.ndarray) -> list[int]:
    # the small number takes 2.9999999 for 3, so that a kernel does not hang on rounding
    return np.clip(2 * np.floor((voxels - 1) / 2 + 0.5 + 1e-6).astype(int) + 1, 1, largest).tolist()


def components_of(dataset: str, plans: dict[str, Any]) -> Components:
    """Components of a dataset of nnU-Net, by its full name; ``plans`` as in :func:`measure_components`."""
    preprocessed = nnunet_folder("nnUNet_preprocessed") / dataset
    raw = nnunet_folder("nnUNet_raw") / dataset
    dataset_json = read_dataset_json(dataset)
    return measure_components(plans, dataset_json, segmentation_files(preprocessed, raw, dataset_json))


def measure_components(plans: dict[str, Any], dataset_json: dict[str, Any], files: Sequence[Path]) -> Components:
    """Bounding boxes of all foreground components in ``files``, which nnU-Net's reader of the plan can read.

    Args:
        plans: nnU-Net's plans, for reader, labels and order of axes.
        dataset_json: the dataset's description.
        files: segmentations; at most ``MAX_CASES`` of them are read.

    Raises:
        ValueError: a file cannot be read, or has no usable spacing; the message names it.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    try:
        labels = manager.get_label_manager(dataset_json)
        regions = labels.foreground_regions if labels.has_regions else labels.foreground_labels
        reader = manager.image_reader_writer_class()
        axes = [int(axis) for axis in manager.transpose_forward]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f'"lms_kernels": "auto" reads the segmentations as the plans say, and these do not ({reason}): plan again.'
        ) from None
    files = _sample(sorted(files), MAX_CASES)
    edges = []
    for path in tqdm(files, desc="measuring objects"):
        try:
            segmentation, properties = reader.read_seg(str(path))
            segmentation = segmentation[0].transpose(axes)
            spacing = np.array(properties["spacing"], dtype=float)[axes]
        except Exception as error:  # readers raise whatever their libraries raise
            raise ValueError(
                f"{path} cannot be read ({one_line(error)}): preprocess again, or give kernels as numbers."
            ) from error
        if not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise ValueError(f"{path} has the spacing {spacing.tolist()} mm: correct its header.")
        for region in regions:
            edges += [voxels * spacing for voxels in _component_boxes(np.isin(segmentation, region))]
    unit = Reader(files[0].suffix, type(reader).__name__).unit(files[0]) if files else "mm"
    return Components(np.array(edges).reshape(-1, 3), len(files), unit)


def segmentation_files(preprocessed: Path, raw: Path, dataset_json: dict[str, Any]) -> list[Path]:
    """The reference segmentations of a dataset: nnU-Net's copy beside the preprocessed data, or else the raw ones.

    Raises:
        ValueError: there are none.
    """
    for folder in (preprocessed / "gt_segmentations", raw / "labelsTr"):
        if folder.is_dir() and (files := files_in(folder, dataset_json["file_ending"])):
            return files
    raise ValueError(
        f'"lms_kernels": "auto" measures the segmentations of {preprocessed.name}, but neither gt_segmentations nor '
        f"labelsTr has any: run nnUNetv2_preprocess first."
    )


def _component_boxes(mask: np.ndarray) -> list[np.ndarray]:
    """Edges in voxels of the bounding box of each component of a mask, specks left out."""
    whole = ndimage.find_objects(mask.astype(np.uint8))
    if not whole:
        return []
    components, _ = ndimage.label(mask[whole[0]], structure=np.ones((3,) * mask.ndim))
    voxels = np.bincount(components.ravel())[1:]
    boxes = ndimage.find_objects(components)
    return [
        np.array([axis.stop - axis.start for axis in box])
        for box, n in zip(boxes, voxels, strict=True)
        if n >= SPECK * voxels.max()
    ]


def _sample(files: Sequence[Path], n: int) -> list[Path]:
    if len(files) <= n:
        return list(files)
    return [files[i] for i in np.linspace(0, len(files) - 1, n).round().astype(int)]
