"""The paper's augmentation (arXiv 2508.15476, section 4.1): random rotation by 90 degrees and flips, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

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

ROTATION_PROBABILITY = 0.5
#: spacings whose ratio is below this count as equal: a rotation between them distorts less than anatomy varies
SPACING_TOLERANCE = 1.1


def rotation_axes(patch_size: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """Axes among which a patch may be rotated by 90 degrees: the largest set of equal length and equal spacing.

    A plane of unequal lengths would change the shape of the patch, one of unequal spacing (thick slices) the shape of
    the anatomy. Rotation by 180 degrees needs neither, but is nothing new beside the flips.

    Args:
        patch_size: voxels per axis.
        spacing: mm per voxel and axis.

    Returns:
        two or three axes, or an empty tuple if no plane allows it.
    """
    spacing = list(spacing)[-len(patch_size) :]
    for n in range(len(patch_size), 1, -1):
        for axes in combinations(range(len(patch_size)), n):
            lengths, spacings = [patch_size[a] for a in axes], [spacing[a] for a in axes]
            if min(lengths) == max(lengths) and max(spacings) < SPACING_TOLERANCE * min(spacings):
                return axes
    return ()


def rotations_and_flips(
    rotation_axes: Sequence[int],
    mirror_axes: Sequence[int] | None,
    deep_supervision_scales: Sequence | None,
    is_cascaded: bool = False,
    foreground_labels: Sequence[int] | None = None,
    regions: Sequence | None = None,
    ignore_label: int | None = None,
) -> BasicTransform:
    """Transforms of a training sample ``{"image": (C, *spatial), "segmentation": (1 or 2, *spatial)}``.

    With probability 1/2 the sample turns by 90, 180 or 270 degrees in a random plane of ``rotation_axes``, and each
    axis of ``mirror_axes`` flips with probability 1/2. What follows is no augmentation of the image but what nnU-Net
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
    """
    transforms: list[BasicTransform] = []
    if rotation_axes:
        rotation = Rot90Transform(
            num_axis_combinations=1, num_rot_per_combination=(1, 2, 3), allowed_axes=set(rotation_axes)
        )
        transforms.append(RandomTransform(rotation, apply_probability=ROTATION_PROBABILITY))
    if mirror_axes:
        transforms.append(MirrorTransform(allowed_axes=tuple(mirror_axes)))

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
