"""Attention with small heads: its kernels in Triton's interpreter on the CPU, and compiled where there is a GPU.

The interpreter must be chosen before Triton is imported, so one subprocess (this file run as a script) computes all
cases and prints their relative errors against PyTorch in float64. It computes bfloat16 wrongly, which is left to the
GPU.
"""

import json

import pytest
import torch
from interpreter import run_interpreted

from nnunet_lgms.blocks.attention import PositionGroupAttention
from nnunet_lgms.ops import attention, kernels
from nnunet_lgms.ops.backend import as_on_gpu

CASES = {  # batch, groups, tokens, heads, channels, factor of all numbers, what is special, dtype
    "published": (1, 2, 64, 4, 8, 1, "", "float32"),
    "published_half": (1, 2, 64, 4, 8, 1, "", "float16"),
    "ragged": (1, 1, 150, 2, 8, 1, "", "float32"),
    "ragged_half": (1, 1, 300, 2, 8, 1, "", "float16"),
    "one_token": (2, 1, 1, 1, 8, 1, "", "float32"),
    "masked": (2, 2, 40, 2, 8, 1, "mask", "float32"),
    "masked_half": (1, 2, 200, 1, 8, 1, "mask", "float16"),
    "heads_of_1": (1, 1, 20, 3, 1, 1, "", "float32"),
    "heads_of_12": (1, 1, 33, 2, 12, 1, "", "float16"),
    "heads_of_16": (1, 1, 130, 1, 16, 1, "mask", "float32"),
    "heads_of_28": (1, 1, 33, 1, 28, 1, "", "float16"),
    "sharp": (1, 1, 130, 1, 8, 4, "", "float32"),
    "keys_beyond_the_estimate": (1, 1, 600, 1, 8, 1, "outliers", "float32"),
    "keys_beyond_the_estimate_half": (1, 1, 600, 1, 8, 1, "outliers", "float16"),
    "strided": (1, 2, 48, 2, 8, 1, "strided", "float32"),
}
LIMIT = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}


def make(case, device, dtype=None):
    """qkv, mask and the gradient of the result."""
    batch, groups, tokens, heads, channels, factor, special, of_case = CASES[case]
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype or of_case)
    shape = (batch, groups, tokens, 3, heads, channels)
    qkv = factor * torch.randn(shape, generator=generator)
    if special == "outliers":  # between the keys that are looked at: weights of 2^-20 and of 1
        qkv[:, :, :, 1] *= 0.1
        qkv[:, :, 1::100, 1] = 4 * qkv[:, :, :1, 0]
    grad = torch.randn(batch, groups, tokens, heads * channels, generator=generator)
    mask = torch.rand(groups, tokens, generator=generator) < 0.6 if special == "mask" else None
    if mask is not None:
        mask[:, 0], mask[:, -16:] = True, False
        mask = mask.to(device)
    qkv = qkv.to(device, dtype)
    if special == "strided":
        qkv = qkv.transpose(2, 4).contiguous().transpose(2, 4)
    return qkv, mask, grad.to(device, dtype)


def results(qkv, mask, grad):
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, mask)
    gradient = torch.autograd.grad(out, qkv, grad)[0]
    return [out.detach(), *gradient.unbind(3)]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def errors(case, device, dtype=None):
    """Of the result, and of the gradients of queries, keys and values."""
    qkv, mask, grad = make(case, device, dtype)
    with as_on_gpu():
        actual = results(qkv, mask, grad)
        again = results(qkv, mask, grad)
    assert actual[0].dtype == qkv.dtype and all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    with kernels("off"):
        expected = results(qkv.double(), mask, grad.double())
    found = [relative(a, b) for a, b in zip(actual, expected, strict=True)]
    return found if qkv.shape[2] > 1 else [found[0], found[3]]  # one key has all the weight, and the rest is zero


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_match_float64(interpreted, case):
    assert max(interpreted[case]) < LIMIT[CASES[case][-1]]


def test_wide_heads_go_to_pytorch():
    kernels = pytest.importorskip("nnunet_lgms.ops.triton.attention")

    def fits(channels, tokens=64, dtype=torch.float16):
        return kernels.fits(torch.empty((2, 4, tokens, 3, 4, channels), device="meta", dtype=dtype))

    assert fits(8) and fits(28) and not fits(29) and not fits(64)
    assert not fits(8, dtype=torch.float64) and not fits(8, tokens=2**23)


def test_what_is_kept_for_the_backward_pass():
    """On tensors without numbers: the joined projection, the result, a number for each query and head."""
    module = PositionGroupAttention(24).to("meta")
    kept = []
    with as_on_gpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = module(torch.empty(2, 4, 256, 24, device="meta"))
    assert out.shape == (2, 4, 256, 24)
    of_attention = [t.shape for t in kept if t.ndim != 2 or t.shape == (32, 256)]
    assert torch.Size((8, 256, 3, 4, 8)) in of_attention and torch.Size((32, 256)) in of_attention
    assert sum(t.numel() for t in kept if t.ndim == 4 and t.shape[-1] == 8) <= 8 * 256 * 32  # the result, once


def test_polynomials_are_powers_of_two():
    """What the kernels compute two at a time, in the rounding of float16, for every float16."""
    constants = pytest.importorskip("nnunet_lgms.ops.triton.attention_kernels")._CONSTANTS
    lowest, highest, magic, c1, c2, c3 = (torch.tensor(v, dtype=torch.float16).double() for v in constants.values())

    def half(value):
        return value.half().double()

    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    y = x.clamp(lowest, highest)
    t = half(y + magic)
    y = half(y - half(t - magic))
    power = ((t.half().view(torch.int16).int() & 0x3F) << 10).to(torch.int16).view(torch.float16).double()
    p = half(half(y * c3 + c2) * y + c1)
    result = half(p * half(y * power) + power)
    inside = (x > -14.4) & (x < 15.4)
    assert (result[inside] / x[inside].exp2() - 1).abs().max() < 8e-4  # 5e-4 is the rounding
    assert (result[x < -15] == 0).all() and not torch.isfinite(result[(x >= 16) | x.isnan()]).any()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("case", CASES)
def test_compiled_kernels_match_float64(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert max(errors(case, "cuda", dtype)) < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_of_the_size_of_pytorch_s(dtype, factor):
    """Exponents are rounded to float16, too, or queries times the scale to bfloat16."""
    torch.manual_seed(0)
    qkv = (factor * torch.randn(2, 2, 2048, 3, 4, 8, device="cuda")).to(dtype)
    grad = torch.randn(2, 2, 2048, 32, device="cuda").to(dtype)
    ours = results(qkv, None, grad)
    with kernels("off"):
        theirs, exact = results(qkv, None, grad), results(qkv.double(), None, grad.double())
    for name, a, b, want in zip(("result", "queries", "keys", "values"), ours, theirs, exact, strict=True):
        print(f"{name}: PyTorch {relative(b, want):.2e}, kernels {relative(a, want):.2e}")
        assert relative(a, want) < 5 * relative(b, want) + 1e-4


@pytest.mark.gpu
def test_what_is_no_number_stays_none():
    qkv = torch.randn(1, 1, 512, 3, 2, 8, device="cuda", dtype=torch.float16)
    for place in (slice(7, 8), slice(None)):
        for part in range(3):
            spoilt = qkv.clone()
            spoilt[0, 0, place, part, 0] = float("nan")
            out = attention(spoilt)[0, 0]
            assert out[:, :8].isnan().all() if part or place == slice(None) else out[7, :8].isnan().all()
            assert not out[:, 8:].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["published_half", "masked", "ragged_half"])
def test_opcheck(case):
    from nnunet_lgms.ops.triton import attention as registered

    qkv, mask, _ = make(case, "cuda")
    qkv = qkv.flatten(0, 1).requires_grad_()
    torch.library.opcheck(registered._attention, (qkv, mask, "tf32x3"))


@pytest.mark.gpu
def test_compiles_under_autocast():
    torch.manual_seed(0)
    module = PositionGroupAttention(48).cuda()
    tokens = torch.randn(2, 4, 300, 48, device="cuda", dtype=torch.float16)

    def both(function):
        leaf = tokens.detach().requires_grad_()
        with torch.autocast("cuda", torch.float16):
            out = function(leaf)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], torch.ones_like(out))]

    for a, b in zip(both(torch.compile(module, fullgraph=True)), both(module), strict=True):
        assert relative(a, b.double()) < 1e-2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({case: errors(case, "cpu") for case in CASES}))
