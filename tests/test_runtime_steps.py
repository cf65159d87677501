"""Every step of the runtime against nnU-Net's own, number by number."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape
from torch import nn

from nnunet_lgms.runtime.description import Resampling
from nnunet_lgms.runtime.preprocessing import bounding_box, fill_holes, normalise
from nnunet_lgms.runtime.resampling import axis_matrices, resample
from nnunet_lgms.runtime.schema import NORMALIZATIONS
from nnunet_lgms.runtime.sliding_window import gaussian, resampled_rows, sliding_window, window_starts
from nnunet_lgms.splines import new_shape, thick_axis

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (0.8, 4.0, 0.8), (0.7, 0.7, 3.0), (3.0, 3.0, 0.5), (1.5, 0.9, 1.2)]


@settings(max_examples=60, deadline=None)
@given(
    old=st.tuples(*[st.integers(2, 14)] * 3),
    current=st.sampled_from(SPACINGS),
    target=st.sampled_from(SPACINGS),
    order=st.sampled_from([0, 1, 3]),
    order_z=st.sampled_from([0, 1]),
    separate=st.sampled_from([None, False, True]),
    seed=st.integers(0, 99),
)
def test_resampling_is_nnunets(old, current, target, order, order_z, separate, seed):
    volume = np.random.default_rng(seed).normal(size=(1, *old)).astype(np.float32)
    size = tuple(compute_new_shape(old, current, target))
    if 0 in size:
        with pytest.raises(ValueError, match="correct the spacing"):
            new_shape(old, current, target)
        return
    assert new_shape(old, current, target) == size
    if max(size) > 60:
        return
    kwargs = {"order": order, "order_z": order_z, "force_separate_z": separate}
    expected = resample_data_or_seg_to_shape(volume.copy(), size, current, target, is_seg=False, **kwargs)
    rule = Resampling("resample_data_or_seg_to_shape", **kwargs)
    thick = thick_axis(rule.force_separate_z, current, target)
    found = resample(volume[0], axis_matrices(rule, old, size, current, target), thick)
    np.testing.assert_allclose(found, expected[0], atol=2e-5)


@pytest.mark.parametrize(
    "mm", [(1e4, 1, 1), (1e-4, 1, 1), (70, 70, 70), (0, 1, 1), (-1, 1, 1), (float("inf"), 1, 1), (float("nan"), 1, 1)]
)
def test_sizes_that_nobody_means_are_refused(mm):
    with pytest.raises(ValueError, match="20 x 20 x 20 voxels has a spacing of .* allowed are 1 to 8192 an axis"):
        new_shape((20, 20, 20), mm, (1, 1, 1))
    assert new_shape((1, 20000, 20000), (1, 1, 1), (1, 1, 1)) == (1, 20000, 20000)  # as large as it came


@pytest.mark.parametrize("spacing, target", [((1, 1, 1), (0.7, 1.3, 0.9)), ((5, 1, 1), (3, 0.8, 0.8))])
def test_logits_are_resampled_row_by_row(spacing, target):
    logits = np.random.default_rng(0).normal(size=(3, 11, 9, 8)).astype(np.float32)
    rule = Resampling("resample_data_or_seg_to_shape", order=1, order_z=0)
    size = new_shape(logits.shape[1:], spacing, target)
    expected = resample_data_or_seg_to_shape(logits.copy(), size, spacing, target, order=1, force_separate_z=None)
    matrices = axis_matrices(rule, logits.shape[1:], size, spacing, target)
    rows = (logits[:, a:b] for a, b in [(0, 4), (4, 5), (5, 11)])
    found = np.concatenate(list(resampled_rows(rows, matrices)), 1)
    assert found.dtype == np.float16  # as nnU-Net's logits
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("patch", [(16, 20), (8, 12, 20), (40, 56, 40)])
def test_weights_of_a_window_are_nnunets(patch):
    expected = compute_gaussian(patch, value_scaling_factor=10, device=torch.device("cpu")).numpy()
    np.testing.assert_allclose(gaussian(patch), expected, rtol=1e-3)
    assert gaussian(patch).min() > 0


@given(size=st.integers(8, 400), patch=st.integers(4, 128), step=st.sampled_from([0.3, 0.5, 0.75, 1.0]))
def test_windows_are_nnunets(size, patch, step):
    size = max(size, patch)
    assert window_starts(size, patch, step) == compute_steps_for_sliding_window((size,), (patch,), step)[0]


@pytest.mark.parametrize("patch", [(8, 8), (8, 8, 8), (24, 8, 8)])
@pytest.mark.parametrize("mirror_axes", [None, (0, 1)])
def test_sliding_window_is_nnunets(patch, mirror_axes):
    """Also in the corners, where weights are tiny and nnU-Net's float16 sums are coarse."""
    torch.manual_seed(0)
    network = (nn.Conv2d if len(patch) == 2 else nn.Conv3d)(2, 3, 3, padding=1)
    data = np.random.default_rng(0).normal(size=(2, 19, 13, 7)).astype(np.float32)

    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.network, theirs.allowed_mirroring_axes = network, mirror_axes
    theirs.configuration_manager = SimpleNamespace(patch_size=list(patch))
    theirs.label_manager = SimpleNamespace(num_segmentation_heads=3)
    expected = theirs.predict_sliding_window_return_logits(torch.from_numpy(data)).numpy()

    @torch.inference_mode()
    def run(window: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(window)).numpy()

    calls = []
    rows = sliding_window(run, data, 3, patch, mirror_axes or (), 0.5, lambda *done: calls.append(done))
    np.testing.assert_allclose(np.concatenate(list(rows), 1), expected, atol=2e-3)
    assert calls[-1][0] == calls[-1][1] == len(calls)


@pytest.mark.parametrize("scheme", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_normalisation_is_nnunets(scheme, masked):
    rng = np.random.default_rng(1)
    image = rng.uniform(0, 255, (6, 7, 8)).astype(np.float32)
    outside = rng.random(image.shape) < 0.4
    image[outside] = 0
    properties = {"mean": 90.0, "std": 31.0, "percentile_00_5": 12.0, "percentile_99_5": 240.0}
    theirs = getattr(schemes, scheme)(use_mask_for_norm=masked, intensityproperties=properties)
    expected = theirs.run(image.copy(), np.where(outside, -1, 0))
    uses_mask = masked and scheme == "ZScoreNormalization"
    normalise(image, scheme, properties, ~outside if uses_mask else None)
    np.testing.assert_allclose(image, expected, atol=2e-5)


def test_colours_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="-1 to 3.*0 to 255"):
        normalise(np.array([[[-1.0, 3.0]]], np.float32), "RGBTo01Normalization", {}, None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), depth=st.sampled_from([1, 4, 7]), share=st.sampled_from([0.0, 0.3, 0.6, 0.8]))
def test_nonzero_mask_is_nnunets(seed, depth, share):
    mask = np.random.default_rng(seed).random((depth, 9, 8)) < share
    np.testing.assert_array_equal(fill_holes(mask), create_nonzero_mask(mask[None].astype(np.float32)))
    box = bounding_box(mask)
    assert mask[box].sum() == mask.sum()
    if mask.any():
        assert all(mask[box].any(axis=tuple(b for b in range(3) if b != a))[[0, -1]].all() for a in range(3))
