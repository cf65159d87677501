"""The operators between maps and tokens, and the linear layer: their kernels in Triton's interpreter on the CPU, and
compiled where there is a GPU.

The interpreter must be chosen before Triton is imported, so one subprocess (this file run as a script) computes all
cases and prints their relative errors against PyTorch in float64.
"""

import json

import pytest
import torch
from interpreter import run_interpreted
from torch import nn

from nnunet_lgms.blocks.attention import SparseTransformer
from nnunet_lgms.ops import kernels, linear, tokens
from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.ops.memory_format import channels_last

LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
CASES = {  # batch, channels of the tokens, channels of the rest, size of the map, patch
    "2d": (2, 6, 4, (8, 12), (2, 2)),
    "2d_no_rest": (1, 96, 0, (6, 4), (2, 2)),
    "2d_padded": (3, 48, 16, (9, 7), (2, 2)),
    "3d": (2, 12, 20, (4, 6, 8), (2, 2, 2)),
    "3d_padded": (1, 5, 3, (5, 1, 7), (1, 2, 3)),
    "many_programs": (2, 20, 1, (120, 90), (2, 3)),
}


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def layer(transformer, x, rest_factor):
    """A layer whose products are factors; the rest gets a factor, too."""
    first, second = transformer
    channels, patch = first.normalized_shape[0], transformer.patch
    t, normed, rest = tokens.unfold_norm(x, first, patch)
    assert (rest is None) == (x.shape[1] == channels)
    t, normed = tokens.add_norm(t, 2 * normed, second)
    rest = None if rest is None else rest_factor * rest
    return tokens.fold_add(t, 3 * normed, rest, patch, x.shape[2:])


def all_results(norms, x, grad, factor):
    """Result, and gradients of the map and of all parameters."""
    x = x.detach().requires_grad_()
    out = layer(norms, x, factor)
    return [out.detach(), *torch.autograd.grad(out, [x, *norms.parameters()], grad)]


def make(case, device, dtype=torch.float32):
    torch.manual_seed(0)
    batch, channels, rest, size, patch = CASES[case]
    norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)]).to(device)
    for p in norms.parameters():
        nn.init.normal_(p)
    norms.patch = patch
    x, grad = (
        (torch.randn(batch, channels + rest, *size) + 1).to(device, dtype).to(memory_format=LAYOUT[len(size) + 2])
        for _ in range(2)
    )
    return norms, x, grad


def errors(case, device, dtype=torch.float32):
    norms, x, grad = make(case, device, dtype)
    with as_on_gpu():
        actual = all_results(norms, x, grad, -1)
    with kernels("off"):
        expected = all_results(norms.double(), x.double(), grad.double(), -1)
    assert actual[0].dtype == dtype and actual[0].is_contiguous(memory_format=LAYOUT[x.ndim])
    return [relative(a, b) for a, b in zip(actual, expected, strict=True)]


def errors_of_linear(device, dtype=torch.float32):
    """Of result and gradients of a linear layer of tokens."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 36).to(device, dtype)
    x, grad = (torch.randn(2, 4, 700, n).to(device, dtype) for n in (20, 36))

    def results(layer, x, grad):
        out = linear(x.requires_grad_(), layer)
        return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad)]

    with as_on_gpu():
        actual = results(layer, x, grad)
    assert all(a.dtype == dtype for a in actual)
    with kernels("off"):
        expected = results(layer.double(), x.detach().double(), grad.double())
    return [relative(a, b) for a, b in zip(actual, expected, strict=True)]


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "linear"])
def test_interpreted_kernels_match_float64(interpreted, case):
    assert max(interpreted[case]) < 1e-5


def test_kernels_are_told_what_memory_they_get():
    """Shapes and strides on tensors without numbers: a channels-last map, as convolutions and norms want it."""
    transformer = SparseTransformer(12, 24, (2, 2)).to("meta")
    x = torch.empty(2, 16, 7, 10, device="meta").to(memory_format=torch.channels_last)
    with as_on_gpu():
        out = transformer(x, nn.ReLU())
    assert out.shape == x.shape and channels_last(out)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels_match_float64(case, dtype, limit):
    assert max(errors(case, "cuda", getattr(torch, dtype))) < limit


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_linear_matches_float64(dtype, limit):
    assert max(errors_of_linear("cuda", getattr(torch, dtype))) < limit


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit():
    results = [all_results(*make("many_programs", "cuda", torch.float16), 2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["2d_padded", "2d_no_rest", "3d"])
def test_opcheck(case):
    from nnunet_lgms.ops.triton import tokens as registered

    norms, x, _ = make(case, "cuda")
    weight, bias, patch = norms[0].weight, norms[0].bias, list(norms.patch)
    torch.library.opcheck(registered.unfold_norm, (x.requires_grad_(), weight, bias, 1e-5, patch))
    t, normed, rest = (t.detach().requires_grad_() for t in registered.unfold_norm(x, weight, bias, 1e-5, patch))
    torch.library.opcheck(registered.add_norm, (t, normed, weight, bias, 1e-5))
    torch.library.opcheck(registered._fold_add, (t, normed, rest if rest.numel() else None, patch, list(x.shape[2:])))


@pytest.mark.gpu
def test_compiles_under_autocast():
    torch.manual_seed(0)
    transformer = SparseTransformer(48, 128, (2, 2)).cuda()
    x = torch.randn(2, 64, 31, 42, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)

    def results(function):
        leaf = x.detach().requires_grad_()
        with torch.autocast("cuda", torch.float16):
            out = function(leaf, nn.ReLU())
        gradients = torch.autograd.grad(out, [leaf, *transformer.parameters()], torch.ones_like(out))
        return [out.detach(), *gradients]

    for a, b in zip(results(torch.compile(transformer, fullgraph=True)), results(transformer), strict=True):
        assert relative(a, b.double()) < 1e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"linear": errors_of_linear("cpu"), **{case: errors(case, "cpu") for case in CASES}}))
