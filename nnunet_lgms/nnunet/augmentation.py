"""The paper's augmentation (arXiv 2508.15476, section 4.1): random rotation by 90 degrees and flips, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

#: spacings whose ratio is below this count as equal: a rotation between them distorts less than anatomy varies
SPACING_TOLERANCE = 1.1


#: lengths whose ratio is at most this may change places; of a patch that is as wide as the image, a longer one would be
#: mostly empty after a turn
MOST_UNEQUAL = 2


def rotation_axes(patch_size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """Axes among which a patch may be rotated by 90 degrees: the largest set of equal spacing.

    A plane of unequal spacing (thick slices) would change the shape of the anatomy. One of unequal lengths needs a
    larger patch to be cut from (:func:`patch_to_turn`), at most twice as long. Rotation by 180 degrees needs neither,
    but is nothing new beside the flips.

    Args:
        patch_size: voxels per axis.
        spacing: mm per voxel and axis.

    Returns:
        two or three axes, or an empty tuple if no plane allows it.
    """
    spacing = list(spacing)[-len(patch_size) :]
    for n in range(len(patch_size), 1, -1):
        unequal = {}
        for axes in combinations(range(len(patch_size)), n):
            lengths, spacings = [patch_size[a] for a in axes], [spacing[a] for a in axes]
            if max(lengths) <= MOST_UNEQUAL * min(lengths) and max(spacings) < SPACING_TOLERANCE * min(spacings):
                unequal[axes] = max(lengths) / min(lengths)
        if unequal:
            return min(unequal, key=unequal.get)
    return ()


def patch_to_turn(patch_size: Sequence[int], axes: Sequence[int]) -> list[int]:
    """The smallest patch from whose middle ``patch_size`` can be cut after a rotation in any plane of ``axes``."""
    longest = max((patch_size[a] for a in axes), default=0)
    return [max(n, longest) if a in axes else n for a, n in enumerate(patch_size)]


def said_of_rotations(patch_size: Sequence[int], spacing: Sequence[float], axes: Sequence[int]) -> str:
    """A line for the log of a training: which planes rotate, and from what."""
    if not axes:
        sizes = " x ".join(f"{s:g}" for s in list(spacing)[-len(patch_size) :])
        return (
            f"No plane rotates by 90 degrees: none has equal spacing ({sizes} mm) and lengths "
            f"({_x(patch_size)} voxels) within a factor of {MOST_UNEQUAL}. Axes flip."
        )
    planes = ", ".join(f"{a}-{b}" for a, b in combinations(axes, 2))
    larger = patch_to_turn(patch_size, axes)
    cut = f", cut from patches of {_x(larger)} voxels" if larger != list(patch_size) else ""
    return f"Planes of axes {planes} rotate by 90 degrees{cut}, and all axes flip."


def _x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


class CentreCrop(BasicTransform):
    """Cuts a patch from the middle of image and segmentation.

    Args:
        patch_size: voxels per axis, none more than what comes has.
    """

    def __init__(self, patch_size: Sequence[int]):
        super().__init__()
        self.patch_size = [int(n) for n in patch_size]

    def _middle(self, x: Tensor) -> Tensor:
        begin = [(n - p) // 2 for n, p in zip(x.shape[1:], self.patch_size, strict=True)]
        return x[(slice(None), *(slice(b, b + p) for b, p in zip(begin, self.patch_size, strict=True)))]

    def _apply_to_image(self, img: Tensor, **params) -> Tensor:
        return self._middle(img)

    def _apply_to_segmentation(self, segmentation: Tensor, **params) -> Tensor:
        return self._middle(segmentation)


def training_transforms(rotation_probability: float, flip_probability: float) -> Callable[..., BasicTransform]:
    """nnU-Net's ``get_training_transforms`` with nothing but rotations by 90 degrees and flips.

    Neither changes an intensity or brings in voxels from outside, so an image that was normalised inside its mask
    needs no second masking. What nnU-Net calls ``rotation_for_DA`` is axes here, not an angle.

    Args:
        rotation_probability: of a turn.
        flip_probability: of each flip, at most 1/2.
    """

    def get_training_transforms(
        patch_size: np.ndarray | tuple[int],
        rotation_for_DA: tuple[int, ...],
        deep_supervision_scales: list | tuple | None,
        mirror_axes: tuple[int, ...],
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm: list[bool] | None = None,
        is_cascaded: bool = False,
        foreground_labels: tuple[int, ...] | list[int] | None = None,
        regions: list[list[int] | tuple[int, ...] | int] | None = None,
        ignore_label: int | None = None,
    ) -> BasicTransform:
        return rotations_and_flips(
            rotation_for_DA,
            mirror_axes,
            deep_supervision_scales,
            is_cascaded,
            foreground_labels,
            regions,
            ignore_label,
            patch_size,
            rotation_probability,
            flip_probability,
        )

    return get_training_transforms


def rotations_and_flips(
    rotation_axes: Sequence[int],
    mirror_axes: Sequence[int] | None,
    deep_supervision_scales: Sequence | None,
    is_cascaded: bool = False,
    foreground_labels: Sequence[int] | None = None,
    regions: Sequence | None = None,
    ignore_label: int | None = None,
    patch_size: Sequence[int] | None = None,
    rotation_probability: float = 0.5,
    flip_probability: float = 0.5,
) -> BasicTransform:
    """Transforms of a training sample ``{"image": (C, *spatial), "segmentation": (1 or 2, *spatial)}``.

    The sample may turn by 90, 180 or 270 degrees in a random plane of ``rotation_axes``, the patch is cut from its
    middle, and each axis of ``mirror_axes`` may flip. What follows is no augmentation of the image but what nnU-Net
    does to every segmentation. In a cascade that includes its distortions of the previous stage's segmentation, without
    which the second stage learns to copy the first; the paper has no cascade.

    Args:
        rotation_axes: from :func:`rotation_axes`.
        mirror_axes: axes that may flip; none if None.
        deep_supervision_scales: sizes of the network's outputs relative to the patch; None without deep supervision.
        is_cascaded: whether the segmentation's second channel is the previous stage's.
        foreground_labels: labels of a cascade's previous stage.
        regions: regions to convert the labels to; None for labels.
        ignore_label: label without annotation; becomes the last channel where there are regions.
        patch_size: what is cut from the middle of the sample, as large as :func:`patch_to_turn`; None if that is as it
            should be.
        rotation_probability: of a turn.
        flip_probability: of each flip, at most 1/2.
    """
    transforms: list[BasicTransform] = []
    if rotation_axes:
        rotation = Rot90Transform(
            num_axis_combinations=1, num_rot_per_combination=(1, 2, 3), allowed_axes=set(rotation_axes)
        )
        transforms.append(RandomTransform(rotation, apply_probability=rotation_probability))
        if patch_size is not None and patch_to_turn(patch_size, rotation_axes) != list(patch_size):
            transforms.append(CentreCrop(patch_size))
    if mirror_axes and flip_probability == 0.5:
        transforms.append(MirrorTransform(allowed_axes=tuple(mirror_axes)))
    else:  # the transform itself flips one time in two
        transforms += [
            RandomTransform(MirrorTransform(allowed_axes=(axis,)), apply_probability=2 * flip_probability)
            for axis in mirror_axes or ()
        ]

    transforms.append(RemoveLabelTansform(-1, 0))
    if is_cascaded:
        channels = list(range(-len(foreground_labels), 0))
        transforms += [
            MoveSegAsOneHotToDataTransform(
                source_channel_idx=1, all_labels=foreground_labels, remove_channel_from_source=True
            ),
            RandomTransform(
                ApplyRandomBinaryOperatorTransform(channel_idx=channels, strel_size=(1, 8), p_per_label=0.5),
                apply_probability=0.4,
            ),
            RandomTransform(
                RemoveRandomConnectedComponentFromOneHotEncodingTransform(
                    channel_idx=channels,
                    fill_with_other_class_p=0,
                    dont_do_if_covers_more_than_x_percent=0.15,
                    p_per_label=0.5,
                ),
                apply_probability=0.2,
            ),
        ]
    if regions is not None:
        with_ignore = [*regions, ignore_label] if ignore_label is not None else list(regions)
        transforms.append(ConvertSegmentationToRegionsTransform(regions=with_ignore, channel_in_seg=0))
    if deep_supervision_scales is not None:
        transforms.append(DownsampleSegForDSTransform(ds_scales=deep_supervision_scales))
    return ComposeTransforms(transforms)
