"""Overrides of what nnU-Net planned: levels, patch, batch and the kind of Dice."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import configuration
from tiny_plans import dataset_json, plans

from nnunet_lgms.cli import main
from nnunet_lgms.config.planned import Planned, planned_table, replanned
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.planning.override import override_plans
from nnunet_lgms.planning.plans_files import read_override

ROOT = Path(__file__).resolve().parents[1]
BUSI = configuration((512, 640), 8)  # as nnU-Net plans breast ultrasound, more or less
CT = configuration((64, 160, 160), 6, spacing=(3.0, 1.0, 1.0))
MEDIAN = {"2d": [500.0, 600.0], "3d_fullres": [128.0, 256.0, 256.0]}


def two_plans() -> dict:
    named = {"2d": deepcopy(BUSI), "3d_fullres": deepcopy(CT)}
    return plans(**{k: {**v, "batch_dice": True, "median_image_size_in_voxels": MEDIAN[k]} for k, v in named.items()})


def overridden(override: dict) -> PlansManager:
    return PlansManager(override_plans(two_plans(), override, "New", None, pytest.fail, lambda line: None))


def test_published_is_the_published_network():
    manager = overridden(read_override("published"))
    flat, deep = manager.get_configuration("2d"), manager.get_configuration("3d_fullres")
    assert (flat.patch_size, flat.batch_size, flat.batch_dice) == ([256, 256], 16, False)
    assert (deep.patch_size, deep.batch_size, deep.batch_dice) == ([96, 96, 96], 2, False)
    assert flat.data_identifier == BUSI["data_identifier"]
    with torch.device("meta"):
        network = build_network(flat, 3, 1, enable_deep_supervision=False)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 2_321_393


def test_published_in_3d_where_spacing_is_nearly_isotropic():
    """The paper's CT: 1.5 x 1.5 x 2 mm."""
    changes = replanned(
        configuration((128,) * 3, 6, spacing=(2.0, 1.5, 1.5)), Planned(**_without_settings("published"))
    )
    manager = PlansManager(plans(**{"3d_fullres": {**CT, "spacing": [2.0, 1.5, 1.5], **changes}}))
    with torch.device("meta"):
        network = build_network(manager.get_configuration("3d_fullres"), 1, 14, enable_deep_supervision=False)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 6_193_742


def _without_settings(name: str) -> dict:
    return {key: value for key, value in read_override(name).items() if key != "lgmsnet"}


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    "override",
    [
        {"levels": 3},
        {"patch_size": {"2d": [64, 128], "3d": [32, 64, 64]}},
        {"levels": 4, "patch_size": {"3d": [16, 64, 96]}},
    ],
    ids=str,
)
def test_stock_nnunet_builds_its_own_network_of_the_new_plans(override, name):
    new = overridden(override).get_configuration(name)
    with torch.device("meta"):
        network = get_network_from_plans(
            new.network_arch_class_name,
            new.network_arch_init_kwargs,
            new.network_arch_init_kwargs_req_import,
            1,
            2,
            allow_init=False,
            deep_supervision=False,
        )
        assert network(torch.zeros(2, 1, *new.patch_size)).shape == (2, 2, *new.patch_size)


def test_more_levels_than_planned_go_on_as_nnunet_would():
    changes = replanned(configuration((64, 64), 3), Planned(levels=5))
    arguments = changes["architecture"]["arch_kwargs"]
    assert arguments["strides"] == [[1, 1], *[[2, 2]] * 4] and arguments["kernel_sizes"] == [[3, 3]] * 5
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 512]
    assert (arguments["n_conv_per_stage"], arguments["n_conv_per_stage_decoder"]) == ([2] * 5, [2] * 4)


@pytest.mark.parametrize(
    "override, said",
    [
        ({"levels": 1}, "levels is 1: allowed is a whole number from 2 to 32, or a table"),
        ({"levels": 9}, "levels is 9, but a patch of 512x640 voxels leaves room for 2 to 8 levels"),
        ({"levels": 7, "patch_size": [64, 64]}, "levels is 7, but a patch of 64x64 voxels leaves room for 2 to 5"),
        ({"patch_size": [6, 6]}, "leaves room for no levels"),
        (
            {"patch_size": [250, 250]},
            "patch_size is [250, 250], which 7 levels cannot halve without rest: give multiples",
        ),
        ({"patch_size": [64, 64, 64]}, "but the configuration has 2 axes"),
        ({"patch_size": [64, True]}, "patch_size is [64, True]: allowed is a list"),
        ({"batch_size": 0}, "batch_size is 0: allowed is a whole number from 1 to 4096"),
        ({"batch_dice": "no"}, "batch_dice is 'no': allowed is true or false"),
        ({"patchsize": [64, 64]}, "no key 'patchsize'; did you mean 'patch_size'"),
        ({"levels": {"4d": 3}}, "levels is {'4d': 3}"),
    ],
)
def test_what_does_not_fit_is_one_sentence(override, said):
    with pytest.raises(ValueError) as error:
        override_plans(two_plans(), override, "New", ["2d"], pytest.fail, lambda line: None)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset999_Tiny"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(dataset_json()))
    (folder / "nnUNetPlans.json").write_text(json.dumps(two_plans()))
    assert main(["override", "999", "--apply", "published", "kernels_3", "--batch-size", "4", "-c", "2d"]) == 0
    said = capsys.readouterr().out
    new = json.loads((folder / "nnUNetPlans_published_kernels_3_b4.json").read_text())["configurations"]["2d"]
    assert new["lgmsnet"]["lms_kernels"] == [3] and new["lgmsnet"]["heads"] == 4
    assert (new["patch_size"], new["batch_size"]) == ([256, 256], 4)
    assert "2d: a training step needs about" in said and "--patch-size N ... --batch-size N" not in said
    assert main(["override", "999", "--patch-size", "1024", "1024", "-c", "2d"]) == 0
    said = capsys.readouterr().out
    assert "the patch of 1024x1024 is larger than the median image, 500x600" in said
    assert "--patch-size N ... --batch-size N" in said
    new = json.loads((folder / "nnUNetPlans_p1024x1024.json").read_text())["configurations"]["2d"]
    assert "lgmsnet" not in new and new["architecture"]["arch_kwargs"]["n_stages"] == 8
    assert main(["override", "999"]) == 2
    assert "There is nothing to change: give --apply, --patch-size or --batch-size." in capsys.readouterr().err
    assert main(["plan", "999", "--apply", "published"]) == 2
    assert (
        "sets levels, patch_size, batch_size, batch_dice, which this command is to find out" in capsys.readouterr().err
    )


def test_documentation_has_the_keys():
    assert planned_table() in (ROOT / "docs" / "reference" / "plans.md").read_text("utf-8")
