"""Every override in plans/: built, stepped forward and backward, loaded again, in 2D and 3D."""

import json
from pathlib import Path

import pytest
import torch
from planned import manager

from nnunet_lgms.blocks import FusionBlock, GMSBlock, LMSBlock, PlainConvBlock
from nnunet_lgms.config import LGMSSettings, settings_of
from nnunet_lgms.nnunet.builder import build_network

ROOT = Path(__file__).resolve().parents[1]
PLANS = sorted((ROOT / "plans").glob("*.json"))
TOPOLOGIES = {2: ((32, 32), 5), 3: ((24, 20, 20), 5)}
RESOLVED_AUTO = [3, 5, 5, 7]  # what "auto" becomes is tests/test_auto_kernels.py's matter


def read(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert list(content) == ["lgmsnet"]
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
    torch.manual_seed(0)
    network = build(path, dim)
    x = torch.randn(2, 1, *TOPOLOGIES[dim][0])
    out = network(x)
    assert out.shape == (2, 2, *x.shape[2:])
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())

    again = build(path, dim, deep_supervision=True)
    again.load_state_dict(network.state_dict(), strict=True)
    again.decoder.deep_supervision = False
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), network.eval()(x))


def test_each_override_is_a_difference_and_documented():
    documentation = (ROOT / "docs" / "plans.md").read_text("utf-8")
    for path in PLANS:
        assert f"`{path.stem}`" in documentation
        if path.stem != "paper":
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
    network = build_network(manager((size, size), n_stages, read(path)), 1, 2, enable_deep_supervision=False)
    assert len(network.encoder.output_channels) == n_stages
