"""Bad input: one sentence that names the value, what is allowed and the way out."""

from __future__ import annotations

import numpy as np
import planned
import pytest
import torch
from authors_vectors import load
from hostile import RunsCode
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
        ({"gms_ratio": (0, 0)}, "[0, 0]", "not both 0"),
        ({"gms_ratio": (float("nan"), 1)}, "[nan, 1]", "each of the 4"),
        ({"gms_ratio": None}, "gms_ratio is None", "each of the 4"),
        ({"decoder_gms_ratio": [[3, None]] * 4}, "[3, None]", "two whole numbers"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan", "positive number"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio is inf", "positive number"),
        ({"mlp_ratio": [None] * 4}, "mlp_ratio is None", "positive number"),
        ({"decoder_mlp_ratio": [2, 2, 0, 2]}, "mlp_ratio is 0 at level 3", "positive number"),
        ({"decoder_blocks": [None] * 3}, "decoder level 1 has None", "Fusion, GMS, Conv"),
        ({"decoder_blocks": []}, "decoder_blocks is []", "each of the 3"),
        ({"encoder_blocks": [None] * 4}, "encoder level 1", "LMS, GMS, Conv"),
        ({"lms_group_channels": [[2, 2, 2, None]] * 4}, "[2, 2, 2, None]", "one per kernel"),
        ({"lms_group_channels": 3}, "lms_group_channels holds 3", "one per kernel"),
        ({"gms_patch": None}, "gms_patch holds None", "positive whole number"),
        ({"norm_op": nn.BatchNorm3d}, "BatchNorm3d", "torch.nn.InstanceNorm2d"),
        ({"norm_op": nn.LayerNorm}, "LayerNorm", "torch.nn.InstanceNorm2d"),
        ({"norm_op": "batch"}, "norm_op 'batch'", "torch.nn.InstanceNorm2d"),
        ({"norm_op": nn.BatchNorm2d, "norm_op_kwargs": {"affin": True}}, "affin", "norm_op(channels"),
        ({"norm_op_kwargs": {"affine": True}}, "norm_op_kwargs is {'affine': True}", "name the norm"),
        ({"strides": [1.0, 2.0, 2.0, 2.0]}, "strides holds 1.0", "positive whole number"),
        ({"conv_op": []}, "[]", "Conv2d"),
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


def test_numpy_arrays_are_as_good_as_lists():
    arrays = {
        "features_per_stage": np.array([8, 8, 8, 16]),
        "strides": np.array([[1, 1], [2, 2], [2, 2], [2, 2]]),
        "kernel_sizes": np.full((4, 2), 3),
        "lms_kernels": np.array([3, 5, 7, 9]),
        "gms_ratio": np.array([3, 1]),
        "gms_patch": np.array([2, 2]),
        "mlp_ratio": np.float32(2),
        "n_blocks_per_stage": torch.ones(4, dtype=torch.int64),
    }
    assert repr(LGMSNet(**{**ARGUMENTS, **arrays})) == repr(LGMSNet(**ARGUMENTS))


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
    for wrong in (
        torch.zeros(1, 1, *(8,) * (dim - 1), 0),
        torch.zeros(0, 1, *(8,) * dim),
        torch.zeros(1, 1, *(8,) * dim, dtype=torch.int32),
        torch.zeros(1, 1, *(8,) * dim, dtype=torch.complex64),
    ):
        with pytest.raises(ValueError) as error:
            network(wrong)
        assert "floating-point maps" in one_sentence(error) and str(wrong.dtype) in one_sentence(error)


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
        (lambda s: {**s, "module.Conv_1x1.bias": s["Conv_1x1.bias"]}, "'Conv_1x1.bias' twice"),
        (lambda s: {**s, "Conv_1x1.bias": s["Conv_1x1.bias"] * float("nan")}, "'Conv_1x1.bias' is torch.float32"),
        (lambda s: {**s, "Conv_1x1.bias": s["Conv_1x1.bias"].to(torch.complex64)}, "complex64"),
        (lambda s: {**s, "Conv_1x1.bias": s["Conv_1x1.bias"].to(torch.int32)}, "int32"),
        (lambda s: {**s, "Conv_1x1.bias": s["Conv_1x1.bias"].to("meta")}, "no numbers at all"),
        (lambda s: {**s, "Conv_1x1.bias": s["Conv_1x1.bias"].to_sparse()}, "'Conv_1x1.bias'"),
        (lambda s: {**s, "Conv_1x1.weight": torch.zeros(0, 16, 1, 1)}, "shape (0, 16, 1, 1)"),
        (lambda s: {**s, "Conv_1x1.weight": torch.tensor(1.0)}, "shape ()"),
        (lambda s: {**s, "encoder4.0.conv1.0.weight": torch.zeros(1, 1).expand(2**20, 2**20)}, "no numbers at all"),
        (lambda s: {**s, 1: torch.zeros(1)}, "not this dict"),
    ],
    ids=[
        *("empty", "file around it", "missing", "unknown", "other shape", "no stage 2", "twice", "NaN", "complex"),
        *("integers", "meta", "sparse", "empty tensor", "a number", "a claim of many terabytes", "no name"),
    ],
)
def test_checkpoint_that_is_not_the_authors(change, named):
    with pytest.raises(ValueError) as error:
        load_official(change(official_state_dict()))
    assert named in one_sentence(error)


def test_checkpoint_of_data_parallel_is_read():
    network = load_official({f"module.{key}": value for key, value in official_state_dict().items()})
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 2, 16, 16)


def test_official_checkpoint_from_a_file(tmp_path):
    torch.save(official_state_dict(), tmp_path / "authors.pth")
    network = load_official(tmp_path / "authors.pth")
    expected = load_official(official_state_dict()).state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(value, expected[key]) and value.device.type == "cpu"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_official(tmp_path / "none.pth")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    torch.save({**official_state_dict(), "x": RunsCode(tmp_path / "made")}, tmp_path / "authors.pth")
    with pytest.raises(ValueError) as error:
        load_official(tmp_path / "authors.pth")
    assert "mkdir" in one_sentence(error) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000])
def test_checkpoint_that_was_cut_short(tmp_path, size):
    torch.save(official_state_dict(), tmp_path / "whole.pth")
    (tmp_path / "part.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:size])
    with pytest.raises(ValueError, match="it is no checkpoint, or it was cut short"):
        load_official(tmp_path / "part.pth")


@pytest.mark.parametrize("given", [["authors.pth"], {"state_dict": {"stem.conv.0.weight": 1}, "epoch": 3}])
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
