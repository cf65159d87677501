"""What the page shows of a case: planes as the patient lies, and amounts under their own unit."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path

import numpy as np
import onnx_stub
import pytest
import SimpleITK as sitk

pytest.importorskip("onnxruntime", reason="needs the extra [view]")

from nnunet_lgms.runtime.description import Description  # noqa: E402
from nnunet_lgms.runtime.images import Case, read_case  # noqa: E402
from nnunet_lgms.view.picture import LEVELS, Picture, amounts, colour_of  # noqa: E402


def described(tmp_path: Path, **more) -> Description:
    return Description.read(onnx_stub.threshold_model(tmp_path / "m.onnx", **more).with_suffix(".json"))


def volume(tmp_path: Path, samples: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=None, name="case.nii.gz") -> Path:
    image = sitk.GetImageFromArray(samples)
    image.SetSpacing(spacing)
    if direction is not None:
        image.SetDirection(np.ravel(direction).tolist())
    sitk.WriteImage(image, str(tmp_path / name))
    return tmp_path / name


def cut(picture: Picture, axis: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey values of the image, and labels."""
    shape = picture.planes[axis].shape
    content = picture.slice_bytes(axis, index)
    n = shape[0] * shape[1] * (3 if picture.colours else 2)
    kind = "u1" if picture.colours else "<u2"
    image = np.frombuffer(content[:n], kind).reshape(*shape, *([3] if picture.colours else []))
    return image, np.frombuffer(content[n:], "<u2").reshape(shape if len(content) > n else 0)


@pytest.mark.parametrize("reader, ending", [("SimpleITKIO", "nrrd"), ("NibabelIO", "nii")])
def test_planes_are_the_body_s_however_the_axes_lie(tmp_path, reader, ending):
    """One scene, stored with its axes in every order and direction, is shown the same."""
    scene = np.random.default_rng(0).integers(0, 200, (4, 5, 6)).astype(np.float32)  # towards head, back, left
    spacing = (2.0, 1.0, 0.5)
    shown, model = [], described(tmp_path, reader=reader)
    for number, (order, flips) in enumerate(product(permutations(range(3)), product((False, True), repeat=3))):
        stored = scene.transpose(order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        direction = np.zeros((3, 3))
        for stored_axis, (axis, flip) in enumerate(zip(order, flips)):
            direction[2 - axis, 2 - stored_axis] = -1 if flip else 1
        file = volume(tmp_path, stored, [spacing[axis] for axis in order][::-1], direction, f"{number}.{ending}")
        picture = Picture(read_case([file], model))
        assert [plane.name for plane in picture.planes] == ["axial", "coronal", "sagittal"]
        assert picture.planes[1].shape == (4, 6) and picture.planes[1].spacing == (2.0, 0.5)
        shown.append([cut(picture, axis, 1)[0] for axis in range(3)])
    assert len(shown) == 48
    for other in shown[1:]:
        for one, another in zip(shown[0], other):
            np.testing.assert_array_equal(one, another)
    axial, coronal, sagittal = (picture.low + picture.step * image for image in shown[0])
    np.testing.assert_allclose(axial, scene[1], atol=0.01)  # the front at the top, the patient's right on the left
    np.testing.assert_allclose(coronal, scene[::-1, 1], atol=0.01)  # the head at the top
    np.testing.assert_allclose(sagittal, scene[::-1, :, 1], atol=0.01)
    assert picture.planes[0].edges == ("R", "L", "A", "P")
    assert picture.planes[1].edges == ("R", "L", "H", "F")
    assert picture.planes[2].edges == ("A", "P", "H", "F")


def test_labels_lie_where_the_image_does(tmp_path):
    direction = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]
    samples = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    case = read_case([volume(tmp_path, samples, direction=direction)], described(tmp_path))
    picture = Picture(case)
    assert picture.fullest() == [plane.slices // 2 for plane in picture.planes]
    picture.add_labels((samples > 1).astype(np.uint8))
    for axis, plane in enumerate(picture.planes):
        counts = []
        for index in range(plane.slices):
            image, labels = cut(picture, axis, index)
            np.testing.assert_array_equal(labels, picture.low + picture.step * image > 1)
            counts.append(labels.sum())
        assert counts[picture.fullest()[axis]] == max(counts) > 0


@pytest.mark.parametrize("index, axis", [(4, 0), (-1, 0), (0, 3), (0, -1)])
def test_there_is_no_such_slice(tmp_path, index, axis):
    picture = Picture(read_case([volume(tmp_path, np.zeros((4, 5, 6), np.float32))], described(tmp_path)))
    with pytest.raises(IndexError):
        picture.slice_bytes(axis, index)


@pytest.mark.parametrize(
    "image", [np.zeros((3, 4, 5)), np.full((3, 4, 5), 1e15), np.arange(60.0).reshape(3, 4, 5) * 1e9]
)
def test_every_range_of_values_is_shown(tmp_path, image):
    picture = Picture(read_case([volume(tmp_path, image.astype(np.float32))], described(tmp_path)))
    values, _ = cut(picture, 0, 1)
    assert picture.window[0] < picture.window[1] and np.isfinite([picture.low, picture.step]).all()
    np.testing.assert_allclose(picture.low + picture.step * values, image[1], rtol=1e-3, atol=1e-6)


def test_one_bright_voxel_does_not_hide_the_others(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 30, 30)).astype(np.float32)
    image[0, 0, 0] = 1e9
    picture = Picture(read_case([volume(tmp_path, image)], described(tmp_path)))
    assert -4 < picture.window[0] < picture.window[1] < 4 and picture.step * LEVELS < 100


REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3},
    "regions_class_order": (1, 2, 3),
}


def test_a_region_is_what_its_definition_says(tmp_path):
    """The mask has the core's value inside the whole; the whole is there all the same."""
    case = read_case([volume(tmp_path, np.zeros((4, 5, 6), np.float32), (0.5, 1.0, 2.0))], described(tmp_path))
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1:3, 1:4, 1:5] = 1
    labels[1:3, 1:4, 1:3] = 2
    labels[1, 1, 1] = 3
    rows = amounts(labels, case, described(tmp_path, **REGIONS))
    assert [(row["name"], row["amount"], row["unit"], row["value"]) for row in rows] == [
        ("whole", 24, "mm³", 1),
        ("core", 12, "mm³", 2),
        ("inner", 1, "mm³", 3),
    ]


def test_units_are_the_image_s_own(tmp_path):
    labels = np.zeros((6, 8), np.uint8)
    labels[2:4, 1:5] = 1
    flat = {"patch_size": (8, 8), "spacing": (1.0, 1.0), "configuration": "2d"}
    natural = described(tmp_path, **flat, reader="NaturalImage2DIO", file_ending=".png", channel_names=("grey",))
    picture = volume(tmp_path, (labels * 200).astype(np.uint8), name="a.png")
    (row,) = amounts(labels, read_case([picture], natural), natural)
    assert (row["amount"], row["unit"]) == (8, "pixels")  # a PNG says nothing of its size
    tiff = described(tmp_path, reader="Tiff3DIO", file_ending=".tif")
    stack = volume(tmp_path, np.stack([labels] * 3), name="c_0000.tif")
    for content, amount, unit in (("", 24, "voxels"), ('{"spacing": [2, 1, 0.5]}', 24, "mm³")):
        if content:
            (tmp_path / "c.json").write_text(content)
        (row,) = amounts(np.stack([labels] * 3), read_case([stack], tiff), tiff)
        assert (row["amount"], row["unit"]) == (amount, unit)
    slice_ = described(tmp_path, **flat)
    case = read_case([volume(tmp_path, labels.astype(np.float32), (0.5, 0.5), name="b.nii.gz")], slice_)
    (row,) = amounts(labels, case, slice_)
    assert (row["amount"], row["unit"]) == (2.0, "mm²")
    (plane,) = Picture(case).planes
    assert plane.name == "xy" and plane.edges == ("",) * 4 and plane.spacing == (0.5, 0.5)


def test_colours_are_shown_as_colours(tmp_path):
    samples = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 5)).astype(np.float32)
    picture = Picture(Case(samples, (999.0, 1.0, 1.0), True))
    image, labels = cut(picture, 0, 0)[0], picture.labels
    assert picture.colours and labels is None
    np.testing.assert_array_equal(image, np.moveaxis(samples[:, 0], 0, -1))


def test_three_hundred_labels_have_colours_of_their_own():
    colours = [colour_of(number) for number in range(300)]
    assert len(set(colours)) == 300 and all(0 <= part <= 255 for colour in colours for part in colour)
    assert json.loads(json.dumps(colours[0])) == [230, 159, 0]
