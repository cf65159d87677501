"""Every block and both whole networks against the authors' numbers (tests/vectors)."""

import pytest
import torch
from authors_vectors import load

from nnunet_lgms import LGMSNet, load_official
from nnunet_lgms.architecture.official import rename_block
from nnunet_lgms.blocks import FusionBlock, GMSBlock, LMSBlock


def build_block(kind, dim):
    if kind == "lms":
        return LMSBlock(16 if dim == 2 else 8, dim=dim)
    if kind == "gms":
        return GMSBlock(24 if dim == 2 else 16, 32, dim=dim)
    return FusionBlock(16, dim=dim)


def worst_error(actual, expected, std=None):
    """Largest deviation in units of the expected tensor's standard deviation."""
    std = expected.double().std() if std is None else std
    return ((actual.double() - expected.double()).abs().max() / std).item()


def run(module, vectors, dtype):
    """Eval output, input gradient and train output, in the order in which the vectors were made."""
    module = module.to(dtype).eval()
    x = vectors["input"].to(dtype).requires_grad_()
    output_eval = module(x)
    (grad_input,) = torch.autograd.grad(output_eval, x, vectors["grad_output"].to(dtype))
    with torch.no_grad():
        output_train = module.train()(vectors["input"].to(dtype))
    return output_eval.detach(), grad_input, output_train


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["lms", "gms", "fusion"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_block_matches_the_authors_numbers(kind, dim, dtype, tolerance):
    weights, vectors = load(f"{kind}_{dim}d")
    block = build_block(kind, dim)
    block.load_state_dict(rename_block(weights, kind))

    output_eval, grad_input, output_train = run(block, vectors, dtype)

    assert worst_error(output_eval, vectors["output_eval"]) < tolerance
    assert worst_error(grad_input, vectors["grad_input_eval"]) < tolerance
    assert worst_error(output_train, vectors["output_train"]) < tolerance


def test_whole_2d_network_matches_the_authors_numbers():
    weights, vectors = load("lgmsnet_2d")
    output_eval, grad_input, output_train = run(load_official(weights), vectors, torch.float64)
    assert worst_error(output_eval, vectors["output_eval"]) < 1e-9
    assert worst_error(grad_input, vectors["grad_input_eval"]) < 1e-9
    assert worst_error(output_train, vectors["output_train"]) < 1e-9


@pytest.mark.slow
def test_whole_3d_network_matches_the_authors_numbers():
    weights, vectors = load("lgmsnet_3d")
    output_eval, grad_input, output_train = run(load_official(weights), vectors, torch.float64)
    for name, output in (("output_eval", output_eval), ("output_train", output_train)):
        assert output.shape == (1, 3, 32, 64, 32)
        thinned = output[..., ::3, ::3, ::3]
        assert worst_error(thinned, vectors[f"{name}_every_3rd"], vectors[f"{name}_std"]) < 1e-9
    assert worst_error(grad_input, vectors["grad_input_eval"]) < 1e-9


def test_published_parameter_counts():
    count = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    assert count(LGMSNet.paper(3, 1, dim=2)) == 2_321_393
    assert count(LGMSNet.paper(1, 14, dim=3)) == 6_193_742
