"""Bad input: one sentence that names the value, what is allowed and the way out."""

from __future__ import annotations

import planned
import pytest
import torch
from networks import tiny_network
from torch import nn

from nnunet_lgms import LGMSNet, load_official
from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.nnunet.trainer import nnUNetTrainerLGMSNet

ARGUMENTS = {
    "input_channels": 1,
    "num_classes": 2,
    "n_stages": 4,
    "features_per_stage": [8, 8, 8, 16],
    "conv_op": nn.Conv2d,
    "kernel_sizes": [3] * 4,
    "strides": [1, 2, 2, 2],
}


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and message[-1] in ".'" and len(message) < 400, message
    return message


@pytest.mark.parametrize(
    ("wrong", "named", "way_out"),
    [
        ({"input_channels": 0}, "input_channels is 0", "at least 1"),
        ({"input_channels": -3}, "-3", "at least 1"),
        ({"num_classes": 0}, "num_classes is 0", "at least 1"),
        ({"num_classes": 1.5}, "1.5", "whole number"),
        ({"n_stages": 1}, "1 stages", "at least 2"),
        ({"n_stages": 5}, "features_per_stage", "each of the 5"),
        ({"strides": [2, 2, 2, 2]}, "[2, 2]", "[1, 1]"),
        ({"strides": [1, 2, 2]}, "strides", "each of the 4"),
        ({"strides": [1, 2, 2, 0]}, "0", "positive"),
        ({"strides": [1, 2, 2, [2, 2, 2]]}, "[2, 2, 2]", "2 axes"),
        ({"kernel_sizes": [3, 3, 3]}, "kernel_sizes", "each of the 4"),
        ({"kernel_sizes": [3, 3, 3, -1]}, "-1", "positive"),
        ({"features_per_stage": [10, 8, 8, 16]}, "10", "12"),
        ({"features_per_stage": [8, 8, 8, 18]}, "18", "divisible by 4"),
        ({"features_per_stage": [8, 8, 8, 0]}, "0", "positive"),
        ({"features_per_stage": [8, 8, 8]}, "features_per_stage", "each of the 4"),
        ({"gms_ratio": (2, 1)}, "2:1", "divisible by 3"),
        ({"gms_ratio": (0, 0)}, "(0, 0)", "not both 0"),
        ({"lms_kernels": (3, 4)}, "4", "odd"),
        ({"encoder_blocks": ["LMS", "LMS", "Swin", "GMS"]}, "Swin", "LMS, GMS, Conv"),
        ({"decoder_blocks": [["Fusion"], [], ["GMS"]]}, "decoder level 2", "Fusion"),
        ({"conv_op": nn.Conv1d}, "Conv1d", "Conv2d"),
        ({"n_heads": 0}, "n_heads is 0", "at least 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_network_that_cannot_be_built(wrong, named, way_out):
    with pytest.raises(ValueError) as error:
        LGMSNet(**{**ARGUMENTS, **wrong})
    message = one_sentence(error)
    assert named in message and way_out in message, message


def test_arguments_are_good_without_the_wrong_one():
    assert LGMSNet(**ARGUMENTS)(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("dim", [2, 3])
def test_wrong_tensor(dim):
    network = tiny_network(dim, 3)
    for rank in (dim + 1, 5 - dim + 2):
        with pytest.raises(ValueError) as error:
            network(torch.zeros((1,) * rank))
        message = one_sentence(error)
        assert f"{dim}D" in message and str((1,) * rank) in message
    with pytest.raises(ValueError) as error:
        network(torch.zeros(1, 3, *(8,) * dim))
    assert "1 input channel" in one_sentence(error) and "3" in one_sentence(error)


def test_wrong_dimension_of_the_papers_network():
    with pytest.raises(ValueError, match="dim=4"):
        LGMSNet.paper(1, 1, dim=4)


@pytest.mark.parametrize(
    ("patch", "n_stages", "more", "named"),
    [
        ((32, 32), 1, {}, "1"),
        ((32, 32), 3, {"strides": [[2, 2], [2, 2], [2, 2]]}, "[2, 2]"),
        ((32, 32), 3, {"strides": [[1, 1], [2, 2]]}, "n_stages 3 but strides [[1, 1], [2, 2]]"),
        ((32, 32), 3, {"settings": {"widths": [16, 30, 64]}}, "30"),
        ((32, 32, 32), 4, {"settings": {"widths": [16, 32, 64, 130]}}, "130"),
    ],
    ids=["one stage", "stride at full resolution", "a stride too few", "LMS width", "GMS width"],
)
def test_plan_that_cannot_be_built(patch, n_stages, more, named):
    with pytest.raises(ValueError) as error:
        build_network(planned.manager(patch, n_stages, **more), 1, 2)
    assert named in one_sentence(error)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 2), (1, 0)])
def test_plan_without_channels(inputs, outputs):
    manager = planned.manager((32, 32), 3)
    with pytest.raises(ValueError, match="at least 1"):
        nnUNetTrainerLGMSNet.build_network_architecture(None, manager, inputs, outputs)


def test_plan_of_a_transformer_has_no_stages():
    manager = planned.manager((32, 32), 3)
    manager.configuration["architecture"]["arch_kwargs"] = {"embed_dim": 864}
    with pytest.raises(ValueError) as error:
        build_network(manager, 1, 2)
    assert "n_stages" in one_sentence(error) and "planner" in one_sentence(error)


def official_state_dict() -> dict[str, torch.Tensor]:
    """Names of the published 2D network, by way of the test vectors."""
    from test_vectors import load

    return load("lgmsnet_2d")[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: {}, "stem.conv.0.weight"),
        (lambda s: {"state_dict": s["Conv_1x1.weight"]}, "state_dict"),
        (lambda s: {k: v for k, v in s.items() if k != "Up2.up.1.bias"}, "bias"),
        (lambda s: {**s, "aux.weight": torch.zeros(1)}, "aux.weight"),
        (lambda s: {**s, "Up2.up.1.weight": torch.zeros(3, 3, 3, 3)}, "(3, 3, 3, 3)"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("encoder2")}, "encoder2"),
    ],
    ids=["empty", "file around it", "missing", "unknown", "other shape", "no stage 2"],
)
def test_checkpoint_that_is_not_the_authors(change, named):
    with pytest.raises(ValueError) as error:
        load_official(change(official_state_dict()))
    assert named in one_sentence(error)


def test_checkpoint_of_data_parallel_is_read():
    network = load_official({f"module.{key}": value for key, value in official_state_dict().items()})
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize("given", ["authors.pth", {"state_dict": {"stem.conv.0.weight": 1}, "epoch": 3}])
def test_official_checkpoint_that_is_no_state_dict(given):
    with pytest.raises(ValueError, match="takes a state dict"):
        load_official(given)


def test_mixed_precision_of_an_official_checkpoint_rounds_nothing():
    state = official_state_dict()
    state["stem.conv.0.weight"] = state["stem.conv.0.weight"].half()
    assert {p.dtype for p in load_official(state).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "change", [{"patch_size": None}, {"architecture": None}, {"architecture": {"arch_kwargs": {}}}]
)
def test_plan_that_cannot_be_read(change):
    manager = planned.manager((32, 32), 3)
    manager.configuration.update(change)
    with pytest.raises(ValueError, match="plan again|cannot be read"):
        build_network(manager, 1, 2)
