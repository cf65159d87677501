"""Every override in plans/: built, stepped forward and backward, loaded again, in 2D and 3D."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_plans
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned import configuration, manager
from volumes import write_volume

from nnunet_lgms.blocks import FusionBlock, GMSBlock, LMSBlock, PlainConvBlock
from nnunet_lgms.config import LGMSSettings, settings_of
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.planning.auto_kernels import measure_components
from nnunet_lgms.planning.override import override_plans

ROOT = Path(__file__).resolve().parents[1]
PLANS = sorted((ROOT / "plans").glob("*.json"))
TOPOLOGIES = {2: ((32, 32), 5), 3: ((24, 20, 20), 5)}
# In the tests of all overrides; test_auto_of_a_dataset_builds_steps_and_loads_again has what a dataset makes of "auto".
RESOLVED_AUTO = [3, 5, 5, 7]


def read(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert "lgmsnet" in content and set(content) <= {"lgmsnet", "levels", "patch_size", "batch_size", "batch_dice"}
    if content["lgmsnet"].get("lms_kernels") == "auto":
        content["lgmsnet"]["lms_kernels"] = RESOLVED_AUTO
    return content["lgmsnet"]


def build(path_or_name, dim: int, deep_supervision: bool = False):
    path = path_or_name if isinstance(path_or_name, Path) else ROOT / "plans" / f"{path_or_name}.json"
    return build_network(manager(*TOPOLOGIES[dim], read(path)), 1, 2, enable_deep_supervision=deep_supervision)


def blocks(network, kind) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_builds_steps_and_loads_again(path, dim):
    assert_steps_and_loads_again(lambda deep_supervision: build(path, dim, deep_supervision), TOPOLOGIES[dim][0])


def assert_steps_and_loads_again(build_one, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = build_one(False)
    x = torch.randn(2, 1, *size)
    out = network(x)
    assert out.shape == (2, 2, *x.shape[2:])
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())

    again = build_one(True)
    again.load_state_dict(network.state_dict(), strict=True)
    again.decoder.deep_supervision = False
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), network.eval()(x))


def test_auto_of_a_dataset_builds_steps_and_loads_again(tmp_path):
    """The shipped override, as `nnunet_lgms override` resolves it on the objects of two label files."""
    small, large = np.zeros((2, 12, 40, 40), np.uint8)
    small[4:6, 10:15, 10:15] = 1
    large[2:10, 5:35, 5:35] = 1
    for name, segmentation in (("a", small), ("b", large)):
        write_volume(tmp_path / f"{name}.nii.gz", segmentation, (4.0, 1.0, 1.0))
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    plans = tiny_plans.plans(
        **{
            "2d": configuration((32, 32), 4),
            "3d_fullres": configuration((12, 32, 32), 4, spacing=(4.0, 1.0, 1.0), strides=strides),
        }
    )
    override = json.loads((ROOT / "plans" / "kernels_auto.json").read_text())
    assert override == {"lgmsnet": {"lms_kernels": "auto"}}
    said = []
    new = override_plans(
        plans,
        override,
        "Auto",
        None,
        measure=lambda: measure_components(plans, description, sorted(tmp_path.glob("*.nii.gz"))),
        say=said.append,
    )
    assert "2d: kernels from 2 objects in 2 cases" in said
    for name in ("2d", "3d_fullres"):
        resolved = PlansManager(new).get_configuration(name)
        by_level = settings_of(resolved).lms_kernels
        assert sorted(by_level) == ["1", "2", "3"]
        network = build_network(resolved, 1, 2, enable_deep_supervision=False)
        built = [[list(conv.kernel_size) for conv in lms.depthwise] for lms in blocks(network, LMSBlock)]
        assert built == list(by_level.values())
        assert built[0] != built[2]  # by the voxels of the level, and the small object at the finest
        assert_steps_and_loads_again(partial(build_network, resolved, 1, 2), tuple(resolved.patch_size))


def test_each_override_is_a_difference_and_documented():
    documentation = (ROOT / "docs" / "reference" / "plans.md").read_text("utf-8")
    for path in PLANS:
        assert f"`{path.stem}`" in documentation
        if path.stem not in ("paper", "published"):  # these two hold everything that the paper says
            assert len(read(path)) == 1, f"{path.name} must hold only what it shows"
    assert len(PLANS) >= 21


@pytest.mark.parametrize("dim", [2, 3])
def test_the_explicit_paper_plan_is_the_default(dim):
    explicit, default = read(ROOT / "plans" / "paper.json"), build_network(manager(*TOPOLOGIES[dim]), 1, 2, False)
    assert set(explicit) == set(LGMSSettings.model_fields) - {"requires"}
    assert set(explicit["block_by_level"]) == {"encoder", "decoder"}
    assert repr(build("paper", dim)) == repr(default)
    assert not settings_of(manager(*TOPOLOGIES[dim], explicit)).deep_supervision


@pytest.mark.parametrize("name, kernels", [("kernels_3", [3]), ("kernels_3_5_7", [3, 5, 7]), ("kernels_9", [9])])
def test_kernels_are_what_the_name_says(name, kernels):
    for lms in blocks(build(name, 3), LMSBlock):
        assert [conv.kernel_size for conv in lms.depthwise] == [(k,) * 3 for k in kernels]
        channels = [conv.out_channels for conv in lms.depthwise]
        assert max(channels) - min(channels) <= 1


@pytest.mark.parametrize(
    "name, share", [("ratio_1_0", 1), ("ratio_1_1", 1 / 2), ("ratio_1_3", 1 / 4), ("ratio_0_1", 0)]
)
def test_ratios_are_what_the_name_says(name, share):
    for gms in blocks(build(name, 2), GMSBlock):
        transformer, conv = gms.split
        assert transformer == share * (transformer + conv)


def test_ratio_by_level():
    network = build("ratio_by_level", 2)
    shares = [gms.split[0] / sum(gms.split) for gms in blocks(network, GMSBlock)]
    assert shares == [1 / 2, 3 / 4, 1 / 2, 1 / 4]  # encoder levels 4 and 5, decoder levels 4 and 3


@pytest.mark.parametrize(
    "name, absent",
    [("lms_only", [GMSBlock]), ("gms_only", [LMSBlock]), ("plain_unet", [LMSBlock, GMSBlock, FusionBlock])],
)
def test_blocks_are_what_the_name_says(name, absent):
    network = build(name, 2)
    assert not any(blocks(network, kind) for kind in absent)
    if name == "plain_unet":
        assert len(blocks(network, PlainConvBlock)) == 5 + 4
        assert network.encoder.output_channels == build("paper", 2).encoder.output_channels


def test_widths():
    paper = build("paper", 2).encoder.output_channels
    assert build("small", 2).encoder.output_channels == [w // 2 for w in paper]
    assert build("large", 2).encoder.output_channels == [w * 2 for w in paper]


@pytest.mark.parametrize("n_stages", [2, 3, 4, 7])
@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_fits_plans_of_any_depth(path, n_stages):
    size = 6 * 2 ** (n_stages - 1)
    with torch.device("meta"):
        network = build_network(manager((size, size), n_stages, read(path)), 1, 2, enable_deep_supervision=False)
    assert len(network.encoder.output_channels) == n_stages
