""" "lms_kernels": "auto": from the sizes of the objects to kernels per level and axis."""

import numpy as np
import pytest
from PIL import Image
from volumes import write_volume

from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.planning.auto_kernels import (
    LARGEST,
    Components,
    _component_boxes,
    choose_kernels,
    measure_components,
    segmentation_files,
)

DATASET = {"labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".nii.gz"}


def plans(transpose=(0, 1, 2)) -> dict:
    return {
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": list(transpose),
        "configurations": {},
    }


def topology(spacing=(1.0, 1.0, 1.0), kernel_sizes=None, strides=None, patch=(128, 128, 128)) -> Topology:
    dim = len(spacing)
    strides = strides or ((1,) * dim, (2,) * dim, (2,) * dim)
    return Topology(patch, strides, kernel_sizes or ((3,) * dim,) * len(strides), spacing)


def objects(*edges_in_mm) -> Components:
    return Components(np.array(edges_in_mm, dtype=float), 1)


def kernels(components, plan, levels=(1, 2, 3)) -> list:
    return [level.kernels for level in choose_kernels(components, plan, levels)]


def test_large_objects_and_isotropic_voxels_get_the_papers_kernels():
    assert kernels(objects((200, 200, 200)), topology()) == [tuple((k,) * 3 for k in (3, 5, 7, 9))] * 3


def test_small_objects_get_small_kernels_and_coarse_levels_smaller_ones():
    fine, _, coarse = kernels(objects((7, 7, 7)), topology())
    assert fine == ((3, 3, 3), (5, 5, 5), (5, 5, 5), (7, 7, 7))
    assert coarse == ((3, 3, 3),) * 4  # 7 mm is less than two voxels of 4 mm


def test_fine_levels_answer_for_small_objects_and_coarse_levels_for_large():
    sizes = [
        level.size for level in choose_kernels(objects(*[(s, s, s) for s in range(1, 100)]), topology(), (1, 2, 3))
    ]
    assert sizes == pytest.approx([25.5, 50, 74.5])


def test_thick_slices_get_flat_kernels():
    plan = topology((5.0, 1.0, 1.0), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))
    first, second, third = kernels(objects((40, 40, 40)), plan)
    assert first == ((1, 3, 3), (1, 5, 5), (1, 7, 7), (1, 9, 9))
    assert second == ((1, 3, 3), (3, 5, 5), (3, 7, 7), (3, 9, 9))  # 18 mm are 3.6 voxels of 5 mm
    assert third == ((1, 3, 3), (3, 5, 5), (3, 7, 7), (3, 9, 9)) or third[0] == (1, 3, 3)
    mm = [k * s for k, s in zip(second[-1], (5, 2, 2))]
    assert max(mm) - min(mm) <= 5  # the same physical extent to within one thick slice


def test_an_axis_with_planned_kernel_one_keeps_it():
    plan = topology((5.0, 1.0, 1.0), kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3)))
    assert all(k[0] == 1 for level in kernels(objects((300, 300, 300)), plan)[:2] for k in level)


def test_no_kernel_is_larger_than_the_padded_map():
    plan = topology(patch=(128, 128, 4))
    for level, chosen in enumerate(kernels(objects((300, 300, 300)), plan), start=1):
        for kernel in chosen:
            assert all(k % 2 and 1 <= k <= min(LARGEST, most) for k, most in zip(kernel, plan.largest_kernel(level)))


def test_2d_plans_measure_in_plane():
    plan = topology((1.0, 1.0), patch=(64, 64))
    assert kernels(objects((1, 200, 200)), plan)[0] == tuple((k, k) for k in (3, 5, 7, 9))


def test_boxes_of_components_without_specks():
    mask = np.zeros((40, 40, 40), bool)
    mask[2:12, 3:9, 5:8] = True
    mask[20:30, 20:30, 20:30] = True
    mask[35, 35, 35] = True  # 1 of 1000 voxels
    mask[12, 9, 8] = True  # touches the first by a corner: the same object
    assert [tuple(b) for b in _component_boxes(mask)] == [(11, 7, 4), (10, 10, 10)]
    assert _component_boxes(np.zeros((3, 3, 3), bool)) == []


def test_measures_mm_in_the_plans_axis_order(tmp_path):
    segmentation = np.zeros((10, 20, 30), np.uint8)
    segmentation[2:6, 5:10, 10:20] = 1
    segmentation[2:6, 5:10, 20:26] = 2  # another label: another object, though they touch
    write_volume(tmp_path / "a.nii.gz", segmentation, (3.0, 1.0, 0.5))
    found = measure_components(plans(), DATASET, [tmp_path / "a.nii.gz"])
    np.testing.assert_allclose(found.edges, [(12, 5, 5), (12, 5, 3)])
    turned = measure_components(plans((2, 0, 1)), DATASET, [tmp_path / "a.nii.gz"])
    np.testing.assert_allclose(turned.edges, [(5, 12, 5), (3, 12, 5)])


def test_objects_in_flat_images_are_measured_in_pixels(tmp_path):
    """nnU-Net plans them with a spacing of 1, which is a pixel and no mm."""
    segmentation = np.zeros((40, 50), np.uint8)
    segmentation[2:12, 5:25] = 1
    Image.fromarray(segmentation).save(tmp_path / "a.png")
    found = measure_components(plans() | {"image_reader_writer": "NaturalImage2DIO"}, DATASET, [tmp_path / "a.png"])
    assert found.unit == "pixels" and measure_components(plans(), DATASET, []).unit == "mm"
    (level,) = choose_kernels(found, topology((1.0, 1.0), patch=(64, 64)), (1,))
    assert "voxels of 1 x 1 pixels, objects of 14.1 pixels" in str(level) and "mm" not in str(level)


def test_regions_are_measured_as_regions(tmp_path):
    segmentation = np.zeros((10, 10, 10), np.uint8)
    segmentation[:, 2:4, 2:4], segmentation[:, 4:8, 2:4] = 1, 2
    write_volume(tmp_path / "a.nii.gz", segmentation)
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    found = measure_components(plans(), regions, [tmp_path / "a.nii.gz"])
    np.testing.assert_allclose(found.edges, [(10, 6, 2), (10, 4, 2)])


def test_takes_the_same_cases_whatever_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_lgms.planning.auto_kernels.MAX_CASES", 3)
    for i in range(7):
        segmentation = np.zeros((8, 8, 8), np.uint8)
        segmentation[0, 0, : i + 1] = 1
        write_volume(tmp_path / f"{i}.nii.gz", segmentation)
    files = sorted(tmp_path.glob("*.nii.gz"))
    first = measure_components(plans(), DATASET, files)
    again = measure_components(plans(), DATASET, files[::-1])
    np.testing.assert_array_equal(first.edges, again.edges)
    assert first.edges[:, 2].tolist() == [1, 4, 7] and first.n_cases == 3


def test_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no foreground"):
        choose_kernels(Components(np.zeros((0, 3)), 1), topology(), [1])
    with pytest.raises(ValueError, match="run nnUNetv2_preprocess"):
        segmentation_files(tmp_path / "pre", tmp_path / "raw", DATASET)
