"""What a model folder says of its weights is compared with what they would be trained on with."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import tiny_plans

from nnunet_lgms.nnunet.same_training import check_same_training


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict, dict]:
    """A model folder, and the plans and the description that it was trained with."""
    configuration = tiny_plans.configuration([16, 16, 16], lgmsnet={"lms_kernels": [3, 5]})
    configuration |= {"normalization_schemes": ["CTNormalization"]}
    plans = tiny_plans.plans(**{"3d_fullres": configuration, "3d_small": {"inherits_from": "3d_fullres"}})
    plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 1.25, "std": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 9.0}
    }
    description = tiny_plans.dataset_json()
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return tmp_path, plans, description


def changed(content: dict, path: str, value: object) -> dict:
    content = deepcopy(content)
    *folders, name = path.split("/")
    place = content
    for folder in folders:
        place = place[folder]
    place[name] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "configurations/3d_fullres/spacing",
            [2.0, 1.0, 1.0],
            r"spacing \[1.0, 1.0, 1.0\], and it is \[2.0, 1.0, 1.0\]",
        ),
        ("configurations/3d_fullres/patch_size", [16, 16, 32], r"patch_size \[16, 16, 16\], and it is \[16, 16, 32\]"),
        ("configurations/3d_fullres/normalization_schemes", ["ZScoreNormalization"], "normalization_schemes"),
        ("configurations/3d_fullres/use_mask_for_norm", [True], "use_mask_for_norm"),
        (
            "configurations/3d_fullres/lgmsnet",
            {"lms_kernels": [3, 7]},
            r"lgmsnet.lms_kernels \[3, 5\], and it is \[3, 7\]",
        ),
        ("transpose_forward", [1, 0, 2], "transpose_forward"),
        ("image_reader_writer", "NibabelIO", "image_reader_writer 'SimpleITKIO', and it is 'NibabelIO'"),
        ("foreground_intensity_properties_per_channel/0/mean", 1.3, "mean of channel 0 1.25, and it is 1.3"),
    ],
)
@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_small"])
def test_other_plans_are_refused(model, path: str, value: object, said: str, configuration: str):
    folder, plans, description = model
    with pytest.raises(ValueError, match=f"was trained with {said}.* now: put back what it was trained with"):
        check_same_training(folder, changed(plans, path, value), description, configuration)


def test_other_labels_are_refused(model):
    folder, plans, description = model
    swapped = {**description, "labels": {"background": 0, "lesion": 1, "organ": 2}}
    with pytest.raises(ValueError, match="was trained with labels "):
        check_same_training(folder, plans, swapped, "3d_fullres")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("configurations/3d_fullres/batch_size", 7),
        ("configurations/3d_fullres/spacing", [1, 1, 1]),
        ("configurations/3d_fullres/lgmsnet", {"lms_kernels": [3, 5], "requires": "0.1.0"}),
        ("configurations/2d", tiny_plans.configuration([8, 8])),
        ("plans_name", "other"),
        ("continue_training", True),
    ],
)
def test_what_weights_do_not_depend_on_may_change(model, path: str, value: object):
    folder, plans, description = model
    check_same_training(folder, changed(plans, path, value), description, "3d_fullres")


def test_damaged_plans_of_a_model_are_not_taken_for_the_same(model):
    folder, plans, description = model
    (folder / "plans.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be compared with the plans of this training"):
        check_same_training(folder, plans, description, "3d_fullres")


def test_a_new_folder_has_nothing_to_compare(model, tmp_path_factory):
    _, plans, description = model
    check_same_training(tmp_path_factory.mktemp("new"), plans, description, "3d_fullres")
