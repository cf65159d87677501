"""The schema of the "lgmsnet" key and how it meets a plan."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planned import manager

import nnunet_lgms
from nnunet_lgms import LGMSNet
from nnunet_lgms.config import LGMSSettings, settings_of
from nnunet_lgms.config.resolve import Topology, network_kwargs, without_effect
from nnunet_lgms.config.settings import settings_table
from nnunet_lgms.nnunet.builder import build_network

DOCS = Path(__file__).resolve().parents[1] / "docs" / "reference" / "plans.md"
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
        ({"lms_kernels": {"1": [[3, 3]]}}, ["lms_kernels holds [3, 3]", "each of the 3 axes"]),
        ({"lms_kernels": {"5": [3]}}, ["level 5", "levels 1 to 4"]),
        ({"lms_kernels": [[3], [3], [3]]}, ["3 entries", "4 levels"]),
        ({"lms_kernels": "auto"}, ["auto", "nnunet_lgms override"]),
        ({"lms_group_channels": [8, 8]}, ["lms_group_channels at level 1", "[8, 8]", "4 kernels", "sum to 16"]),
        ({"lms_kernels": [3] * 8, "widths": 4}, ["lms_kernels at level 1", "8 kernels", "4 channels"]),
        ({"gms_ratio": "9:1"}, ["gms_ratio", "9:1", "64 channels at level 3", "divisible by 10"]),
        ({"mlp_ratio": 0.001}, ["0.001", "whole number"]),
        ({"widths": [16, 32, 64]}, ["3 entries", "4 levels"]),
        ({"widths": 10}, ["widths at level 1", "10 channels", "multiples of 4", "choose 12"]),
        ({"depths": [1, 1, 1, 1, 1]}, ["5 entries"]),
        ({"gms_patch": [2, 2]}, ["gms_patch holds [2, 2]", "each of the 3 axes"]),
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


# --- any override on any plan ----------------------------------------------------------------------------------------

LARGEST_DRAWN = 13
RATIOS = ["1:0", "3:1", "1:1", "1:3", "0:1"]
DECODER_BLOCKS = ["Fusion", "GMS", "Conv", "Fusion+GMS", "Conv+Conv"]


@st.composite
def topologies(draw) -> Topology:
    """Of plans with small maps."""
    dim, n = draw(st.sampled_from([2, 3])), draw(st.integers(2, 4))
    axes = {values: st.lists(st.sampled_from(values), min_size=dim, max_size=dim) for values in ((1, 2), (1, 3, 3))}
    strides = [[1] * dim, *(draw(axes[1, 2]) for _ in range(n - 1))]
    kernels = [draw(axes[1, 3, 3]) for _ in range(n)]
    patch = [draw(st.integers(4, 9)) * 2 for _ in range(dim)]
    return Topology(tuple(patch), tuple(map(tuple, strides)), tuple(map(tuple, kernels)))


def by_level(draw, values: list) -> tuple:
    """A setting that gives values to the levels of a plan, in any of its forms, and the values that it then gives."""
    form = draw(st.sampled_from(["single", "list", "table", "open table"]))
    if form == "single":
        return values[0], [values[0]] * len(values)
    if form == "list":
        return values, values
    if form == "table":
        return {str(level): value for level, value in enumerate(values, start=1)}, values
    return {"1": values[0], "2+": values[-1]}, values[:1] + values[-1:] * (len(values) - 1)


@st.composite
def kernels_of_level(draw, largest: tuple[int, ...]):
    """Kernels of up to five groups, none beyond what the level's map allows; one number or one per axis."""
    odd = [st.integers(0, (min(LARGEST_DRAWN, most) - 1) // 2).map(lambda i: 2 * i + 1) for most in largest]
    smallest = odd[largest.index(min(largest))]
    return draw(st.lists(smallest | st.tuples(*odd).map(list), min_size=1, max_size=5))


@st.composite
def parts_of(draw, whole: int, n: int):
    """Positive whole numbers that sum to ``whole``, mostly unequal."""
    cuts = sorted(draw(st.lists(st.integers(1, whole - 1), min_size=n - 1, max_size=n - 1, unique=True)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, whole])]


@st.composite
def plans_and_settings(draw) -> tuple[Topology, dict]:
    """A valid plan with small maps, and valid settings for it."""
    topology = draw(topologies())
    n, dim = topology.n_levels, topology.dim
    levels = range(1, n + 1)

    def per_level(*choices, last: int = n):
        return by_level(draw, [draw(st.sampled_from(choices)) for _ in range(last)])

    widths, width_of = per_level(8, 12, 16)
    largest = [topology.largest_kernel(level) for level in levels]
    if draw(st.booleans()):  # a flat list holds at every level, and is of single numbers
        smallest = tuple(min(sizes) for sizes in zip(*largest, strict=True))
        flat = draw(kernels_of_level((min(smallest),)).filter(lambda ks: all(isinstance(k, int) for k in ks)))
        kernels, kernels_at = flat, [flat] * n
    else:
        drawn = [draw(kernels_of_level(most)) for most in largest]
        kernels = drawn if draw(st.booleans()) else {str(level): drawn[level - 1] for level in levels}
        kernels_at = drawn
    entering = [width_of[0], *width_of[:-1]]
    groups = [draw(parts_of(channels, len(ks))) for channels, ks in zip(entering, kernels_at, strict=True)]
    patch = [min(3, *(max(2, topology.map_size(level)[axis]) for level in levels)) for axis in range(dim)]
    values = {
        "widths": widths,
        "depths": per_level(1, 2)[0],
        "block_by_level": {
            "encoder": per_level("LMS", "LMS", "GMS", "Conv")[0],
            "decoder": per_level(*DECODER_BLOCKS, last=n - 1)[0] if n > 2 else draw(st.sampled_from(DECODER_BLOCKS)),
        },
        "lms_kernels": kernels,
        "gms_ratio": per_level(*RATIOS)[0],
        "gms_patch": draw(st.integers(1, min(patch)) | st.tuples(*(st.integers(1, most) for most in patch)).map(list)),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 8])),
        "mlp_ratio": per_level(0.5, 1, 2)[0],
        "norm": draw(st.sampled_from(["paper", "batch", "instance", "group"])),
        "deep_supervision": draw(st.booleans()),
    }
    chosen = {name: value for name, value in values.items() if draw(st.integers(0, 3))}
    if {"widths", "lms_kernels"} <= chosen.keys() and draw(st.booleans()):
        chosen["lms_group_channels"] = groups if draw(st.booleans()) else dict(zip(map(str, levels), groups))
    return topology, chosen


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plans_and_settings())
def test_any_valid_override_on_any_valid_plan(case):
    """It builds, keeps the sizes of the plan, learns from a step, and its weights are those of the prediction."""
    topology, values = case
    configuration = manager(
        topology.patch_size,
        topology.n_levels,
        values,
        strides=[list(s) for s in topology.strides],
        kernel_sizes=[list(k) for k in topology.kernel_sizes],
    )
    deep_supervision = settings_of(configuration).deep_supervision
    torch.manual_seed(0)
    network = build_network(configuration, 1, 2, enable_deep_supervision=deep_supervision)
    x = torch.randn(2, 1, *topology.patch_size)
    outputs = network(x)
    outputs = outputs if deep_supervision else [outputs]
    n_outputs = topology.n_levels - 1 if deep_supervision else 1
    assert [o.shape for o in outputs] == [(2, 2, *topology.map_size(level)) for level in range(1, n_outputs + 1)]
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    again = build_network(configuration, 1, 2, enable_deep_supervision=False).eval()
    again.load_state_dict(network.state_dict(), strict=True)
    with torch.inference_mode():
        expected = network.eval()(x)
        torch.testing.assert_close(again(x), expected[0] if deep_supervision else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["strides", "kernel_sizes"])
def test_a_plan_whose_stages_contradict_each_other_is_refused(key):
    plan = manager((32, 32), 4)
    plan.configuration["architecture"]["arch_kwargs"][key].pop()
    with pytest.raises(ValueError, match=f"n_stages 4 but {key} "):
        Topology.of(plan.configuration)
