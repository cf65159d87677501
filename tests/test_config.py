"""The schema of the "lgmsnet" key and how it meets a plan."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import manager

import nnunet_lgms
from nnunet_lgms import LGMSNet
from nnunet_lgms.config import LGMSSettings, settings_of
from nnunet_lgms.config.resolve import Topology, network_kwargs, without_effect
from nnunet_lgms.config.settings import settings_table
from nnunet_lgms.nnunet.builder import build_network

DOCS = Path(__file__).resolve().parents[1] / "docs" / "plans.md"
ANISOTROPIC = Topology(
    (20, 32, 24),
    ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
    ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
    (4.0, 1.0, 1.0),
)


def resolve(values: dict, topology: Topology = ANISOTROPIC) -> dict:
    return network_kwargs(LGMSSettings.from_plan(values), topology)


@pytest.mark.parametrize("dim, size", [(2, 32), (3, 32)])
def test_no_settings_is_the_papers_network(dim, size):
    network = build_network(manager((size,) * dim, 5), 1, 2, enable_deep_supervision=False)
    paper = LGMSNet.paper(1, 2, dim=dim)
    weights = {k: v.shape for k, v in network.state_dict().items() if not k.startswith("decoder.seg_layers")}
    assert weights == {k: v.shape for k, v in paper.state_dict().items() if not k.startswith("decoder.seg_layers")}


@pytest.mark.parametrize(
    "values, said",
    [
        ({"lms_kernel": [3]}, ["lms_kernel'", "did you mean 'lms_kernels'"]),
        ({"ms_ratio": "1:1"}, ["did you mean 'gms_ratio'"]),
        ({"qqqq": 1}, ["'qqqq'", "known are requires, widths"]),
        ({"dropout": 0.1}, ["'dropout'; known are requires, widths"]),
        ({"features": [8]}, ["'features'; known are requires, widths"]),
        ({"ratio": "1:1"}, ["did you mean 'gms_ratio' or 'mlp_ratio'?"]),
        ({"LMS_KERNELS": [3]}, ["'LMS_KERNELS'; did you mean 'lms_kernels'?"]),
        ({"gms": 1}, ["did you mean 'gms_ratio' or 'gms_patch'?"]),
        ({"block_by_level": {"encodr": "LMS"}}, ["block_by_level.encodr", "did you mean 'encoder'"]),
        ({"lms_kernels": [3, 4]}, ["[3, 4]", "odd whole numbers"]),
        ({"lms_kernels": []}, ["[]", "1 to 8"]),
        ({"lms_kernels": [3] * 9}, ["1 to 8"]),
        ({"lms_kernels": "automatic"}, ["'automatic'", '"auto"']),
        ({"gms_ratio": "0:0"}, ["'0:0'", "not both 0"]),
        ({"gms_ratio": [3, -1]}, ["[3, -1]", "whole numbers"]),
        ({"heads": 2.5}, ["2.5", "whole number"]),
        ({"heads": True}, ["True", "whole number"]),
        ({"norm": "layer"}, ["'layer'", '"instance"']),
        ({"mlp_ratio": 0}, ["is 0", "positive"]),
        ({"deep_supervision": "yes"}, ["'yes'", "true or false"]),
        ({"widths": {}}, ["{}", "per level"]),
        ({"widths": {"0": 8}}, ["{'0': 8}", "per level"]),
        ({"block_by_level": {"encoder": "Fusion"}}, ["'Fusion'", '"LMS", "GMS", "Conv"']),
        ({"requires": "latest"}, ["'latest'", "version"]),
        ([], ["[]", "table of settings"]),
    ],
)
def test_what_the_schema_refuses(values, said):
    with pytest.raises(ValueError) as refusal:
        LGMSSettings.from_plan(values)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    for part in said:
        assert part in sentence


@pytest.mark.parametrize(
    "values, said",
    [
        # level 4 is a map of 5x4x3 voxels
        ({"lms_kernels": [13], "block_by_level": {"encoder": "LMS"}}, ["13 at level 4", "5x4x3", "1 to 11x9x7"]),
        ({"lms_kernels": {"3": [[23, 3, 3]]}}, ["23x3x3 at level 3", "10x8x6", "21x17x13"]),
        ({"lms_kernels": {"1": [[3, 3]]}}, ["[3, 3]", "3D"]),
        ({"lms_kernels": {"5": [3]}}, ["level 5", "levels 1 to 4"]),
        ({"lms_kernels": [[3], [3], [3]]}, ["3 entries", "4 levels"]),
        ({"lms_kernels": "auto"}, ["auto", "nnunet_lgms override"]),
        ({"lms_group_channels": [8, 8]}, ["[8, 8] at level 1", "4 entries", "16 channels"]),
        ({"lms_kernels": [3] * 8, "widths": 4}, ["8 kernels at level 1", "4 channels"]),
        ({"gms_ratio": "9:1"}, ["9:1 at level 3", "64 channels", "divisible by 10"]),
        ({"mlp_ratio": 0.001}, ["0.001", "whole number"]),
        ({"widths": [16, 32, 64]}, ["3 entries", "4 levels"]),
        ({"widths": 10}, ["10 channels", "multiples of 4"]),
        ({"depths": [1, 1, 1, 1, 1]}, ["5 entries"]),
        ({"gms_patch": [2, 2]}, ["[2, 2]", "3D"]),
        ({"gms_patch": [16, 2, 2]}, ["level 3", "10x8x6"]),
        ({"block_by_level": {"decoder": {"4": "GMS"}}}, ["level 4", "levels 1 to 3"]),
    ],
)
def test_what_does_not_fit_the_plan(values, said):
    with pytest.raises(ValueError) as refusal:
        resolve(values)
    sentence = str(refusal.value)
    assert sentence.startswith("lgmsnet.") and "\n" not in sentence
    for part in said:
        assert part in sentence


THREE_LEVELS = {"1+": [3, 5], "2": [3], "5+": [7]}  # "5+": levels that this plan has not


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, []),
        (
            {"lms_kernels": {"4": [3]}},
            ['lms_kernels changes nothing at "4": the plan has LMS blocks at level(s) 1, 2'],
        ),
        ({"lms_kernels": {"3+": [3], "4+": [5]}}, ['lms_kernels changes nothing at "4+"']),
        ({"lms_kernels": THREE_LEVELS}, []),
        ({"lms_kernels": {"4": [3]}, "block_by_level": {"encoder": "LMS"}}, []),
        ({"lms_group_channels": {"4": [8, 8, 8, 8]}}, ['lms_group_channels changes nothing at "4"']),
        (
            {"gms_ratio": {"1": "3:1"}},
            ['gms_ratio changes nothing at "1": the plan has GMS blocks at level(s) 3, 4 only'],
        ),
        ({"gms_ratio": {"3": "1:1"}}, []),  # the decoder's
        ({"gms_ratio": {"1": "1:1"}, "block_by_level": {"decoder": "GMS"}}, []),
        ({"mlp_ratio": {"2": 1, "4": 1}}, ['mlp_ratio changes nothing at "2"']),
        ({"heads": 2, "gms_ratio": "0:1"}, ["heads changes nothing, as the plan has no GMS blocks with attention"]),
        (
            {"lms_kernels": [3], "block_by_level": {"encoder": "GMS"}},
            ["lms_kernels changes nothing, as the plan has no LMS"],
        ),
        ({"depths": {"4": 2}, "widths": {"4": 64}, "norm": "batch", "deep_supervision": True}, []),
    ],
)
def test_settings_that_change_nothing_are_remarked_upon(values, said):
    remarks = without_effect(LGMSSettings.from_plan(values), ANISOTROPIC, values)
    assert len(remarks) == len(said) and all(s in r for s, r in zip(said, remarks, strict=True)), remarks
    assert without_effect(LGMSSettings.from_plan(values), ANISOTROPIC, ["widths"]) == []


def test_the_most_exact_level_wins():
    resolved = resolve(
        {"widths": {"1+": 8, "2": 16, "3+": 32, "7+": 64}, "depths": [1, 2, 1, 3], "mlp_ratio": {"4": 1}}
    )
    assert resolved["features_per_stage"] == [8, 16, 32, 32]
    assert resolved["n_blocks_per_stage"] == [1, 2, 1, 3]
    assert resolved["mlp_ratio"] == [2, 2, 2, 1]


def test_kernels_per_level_and_axis():
    resolved = resolve({"lms_kernels": {"1": [[1, 3, 3], 5], "2": [7, 7, 7]}})
    assert resolved["lms_kernels"][:3] == [[(1, 3, 3), (5, 5, 5)], [(7, 7, 7)] * 3, [(k,) * 3 for k in (3, 5, 7, 9)]]
    # three groups of the 16 channels that enter level 2
    assert resolved["lms_group_channels"][1] == [6, 5, 5]


def test_a_newer_plan_names_the_version(monkeypatch):
    future = manager((32, 32), 3, {"requires": "99.1", "kernel_shape": "star"})
    with pytest.raises(ValueError, match=r"need nnunet_lgms 99\.1 or newer, but .* is installed: pip install"):
        build_network(future, 1, 2)
    assert settings_of(manager((32, 32), 3, {"requires": nnunet_lgms.__version__})).norm == "paper"


def test_explicit_values_survive_a_round_trip():
    given_values = {"lms_kernels": {"1": [[1, 3, 3], 5]}, "gms_ratio": [3, 1], "block_by_level": {"encoder": "LMS"}}
    assert LGMSSettings.from_plan(given_values).explicit() == given_values
    assert LGMSSettings.from_plan({"gms_ratio": "1:3"}).explicit() == {"gms_ratio": [1, 3]}


def test_documentation_shows_this_schema():
    assert settings_table() in DOCS.read_text("utf-8")


@st.composite
def plans_and_settings(draw):
    """A valid plan with small maps, and valid settings for it."""
    dim = draw(st.sampled_from([2, 3]))
    n = draw(st.integers(2, 4))
    strides = [[1] * dim] + [draw(st.lists(st.sampled_from([1, 2]), min_size=dim, max_size=dim)) for _ in range(n - 1)]
    kernels = [draw(st.lists(st.sampled_from([1, 3]), min_size=dim, max_size=dim)) for _ in range(n)]
    patch = tuple(draw(st.integers(4, 9)) * 2 for _ in range(dim))
    odd = st.integers(0, 3).map(lambda i: 2 * i + 1)
    per_level = lambda value: st.one_of(value, st.lists(value, min_size=n, max_size=n))  # noqa: E731
    ratio = st.sampled_from(["1:0", "3:1", "1:1", "1:3", "0:1"])
    kernel_lists = st.lists(odd, min_size=1, max_size=8)
    values = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "widths": per_level(st.sampled_from([8, 16])),
                "depths": per_level(st.integers(1, 2)),
                "block_by_level": st.fixed_dictionaries(
                    {},
                    optional={
                        "encoder": per_level(st.sampled_from(["LMS", "GMS", "Conv"])),
                        "decoder": st.sampled_from(["Fusion", "GMS", "Conv", "Fusion+GMS", "Conv+Conv"]),
                    },
                ),
                "lms_kernels": st.one_of(kernel_lists, st.just({"1+": [[1] * dim, 3], "2+": [5]})),
                "gms_ratio": per_level(ratio),
                "gms_patch": st.one_of(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=dim, max_size=dim)),
                "heads": st.integers(1, 3),
                "head_dim": st.sampled_from([1, 8]),
                "mlp_ratio": per_level(st.sampled_from([0.5, 1, 2])),
                "norm": st.sampled_from(["paper", "batch", "instance", "group"]),
            },
        )
    )
    return dim, (patch, n, values, None, strides, kernels)


@settings(max_examples=25, deadline=None)
@given(plans_and_settings())
def test_any_valid_override_on_any_valid_plan(case):
    dim, plan = case
    configuration = manager(*plan)
    try:
        network = build_network(configuration, 1, 2, enable_deep_supervision=True)
    except ValueError as refusal:  # a level may end up with a map smaller than what was asked for it, nothing else
        assert "voxels: allowed are" in str(refusal)
        return
    x = torch.randn(1, 1, *plan[0])
    outputs = network.eval()(x)
    assert [o.shape[:2] for o in outputs] == [(1, 2)] * (plan[1] - 1)
    assert outputs[0].shape[2:] == x.shape[2:]

    again = build_network(configuration, 1, 2, enable_deep_supervision=False).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(again(x), outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["strides", "kernel_sizes"])
def test_a_plan_whose_stages_contradict_each_other_is_refused(key):
    plan = manager((32, 32), 4)
    plan.configuration["architecture"]["arch_kwargs"][key].pop()
    with pytest.raises(ValueError, match=f"n_stages 4 but {key} "):
        Topology.of(plan.configuration)
