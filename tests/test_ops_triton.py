"""The Triton kernels of the depthwise operator: in Triton's interpreter on the CPU, and compiled where there is a GPU.

The interpreter must be chosen before Triton is imported, so one subprocess (this file run as a script) computes all its
cases and prints the errors.
"""

import json

import pytest
import torch
from interpreter import run_interpreted

from nnunet_lgms.ops import backend, depthwise, multi_kernel_depthwise

PAPER = (3, 5, 7, 9)
# batch, groups of channels, kernels, spatial size, dtype, bias, flip, residual. bfloat16 is left to the GPU.
INTERPRETED = {
    "paper_2d": (2, [1] * 4, [(k,) * 2 for k in PAPER], (16, 24), "float16", True, False, True),
    "paper_3d": (1, [1] * 4, [(k,) * 3 for k in PAPER], (3, 9, 10), "float16", True, False, False),
    "input_gradient": (2, [2, 1], [(3, 3, 3), (5, 1, 7)], (4, 8, 12), "float32", False, True, True),
    "thick_slices": (1, [1, 2], [(1, 3, 3), (1, 9, 5)], (5, 10, 8), "float16", True, False, False),
    "wide_kernel": (1, [1, 1], [(3, 5, 11), (1, 13, 3)], (2, 12, 20), "float32", False, False, False),
    "single_voxel": (3, [2], [(7, 7, 7)], (1, 1, 1), "float32", True, False, False),
    "many_patches": (1, [1], [(3, 3)], (130, 70), "float32", False, True, False),
}
LIMIT = {"float16": 5e-4, "float32": 2e-6, "bfloat16": 4e-3}


def errors(kernels, device, batch, channels, sizes, spatial, dtype, bias, flip, residual):
    """Relative errors of output and weight gradient against float64."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    flat = [k for size in sizes for k in size]
    x, grad = (torch.randn(batch, sum(channels), *spatial, generator=generator).to(dtype) for _ in range(2))
    n = depthwise._number_of_weights(channels, flat)
    parameters = torch.randn(n + sum(channels), generator=generator)
    out = kernels.convolve(x.to(device), parameters.to(device), channels, flat, bias, flip, residual)
    taps = kernels.correlate(x.to(device), grad.to(device), channels, flat)
    exact = torch.cat([parameters[:n].to(dtype).double(), parameters[n:].double()])  # biases are not rounded
    want_out = depthwise._convolve(x.double(), exact, channels, flat, bias, flip, residual)
    want_taps = depthwise._correlate(x.double(), grad.double(), channels, flat)
    assert out.dtype == dtype and taps.dtype == torch.float32
    return [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in [(out, want_out), (taps, want_taps)]]


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_kernels_match_float64(interpreted, case):
    out, taps = interpreted[case]
    assert out < LIMIT[INTERPRETED[case][4]]
    assert taps < 2e-6  # float32 sums, whatever the dtype of the maps


def test_blocks_cover_every_patch():
    triton_kernels = pytest.importorskip("nnunet_lgms.ops.triton.depthwise")
    for shape in [(128, 16, 16), (1, 32, 32), (5, 7, 5), (1, 1, 1), (40, 5, 7)]:
        block = triton_kernels._block(*shape, 32)
        assert block[0] * block[1] * block[2] == 32
    assert triton_kernels._block(128, 16, 16, 32) == (1, 2, 16)
    assert triton_kernels._block(16, 2, 2, 32) == (8, 2, 2)
    for tasks, blocks in [(1, 1), (56, 2048), (300, 7), (4, 10**5)]:
        assert 1 <= triton_kernels._splits(tasks, blocks, 132) <= max(1, blocks // 4)


# --- on a GPU --------------------------------------------------------------------------------------------------------

COMPILED = {
    **{name: case[1:4] for name, case in INTERPRETED.items()},
    "paper_128": ([1] * 4, [(k,) * 3 for k in PAPER], (32, 64, 128)),
    "odd_sizes": ([3, 1, 2, 2], [(k,) * 3 for k in PAPER], (17, 23, 31)),
    "width_of_4": ([2, 3], [(3, 3, 3), (9, 9, 9)], (10, 14, 20)),
    "width_of_2": ([5], [(3, 3)], (37, 70)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_kernels_match_float64(case, batch, dtype, monkeypatch):
    from nnunet_lgms.ops.triton import depthwise as depthwise_triton

    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    out, taps = errors(depthwise_triton, "cuda", batch, *COMPILED[case], dtype, True, False, True)
    assert out < LIMIT[dtype]
    assert taps < 2e-6


def gpu_case(dtype=torch.float16, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 18, 24, 32, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    weights = [torch.randn(2, 1, k, k, k, device="cuda") / k for k in PAPER]
    biases = [torch.randn(2, device="cuda") for _ in PAPER]
    return x, weights, biases


def gradients(function, x, weights, biases, grad):
    leaves = [t.detach().clone().requires_grad_() for t in [x, *weights, *biases]]
    out = function(leaves[0], leaves[1:5], leaves[5:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_gradients_match_the_pytorch_path(memory_format):
    x, weights, biases = gpu_case(memory_format=memory_format)
    grad = torch.randn_like(x)
    got = gradients(multi_kernel_depthwise, x, weights, biases, grad)
    assert got[0].is_contiguous()  # as norms take it
    with backend.kernels("off"):
        want = gradients(multi_kernel_depthwise, x.double(), weights, biases, grad.double())
    for a, b in zip(got, want):
        assert ((a.double() - b.double()).norm() / b.double().norm()).item() < 2e-3


@pytest.mark.gpu
def test_gradients_repeat_bit_for_bit_on_the_gpu():
    x, weights, biases = gpu_case()
    grad = torch.randn_like(x)
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(multi_kernel_depthwise, x, weights, biases, grad)
        second = gradients(multi_kernel_depthwise, x, weights, biases, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_every_output_is_written():
    x, weights, biases = gpu_case()
    want = multi_kernel_depthwise(x, weights, biases)
    del want
    torch.full((1 << 24,), float("nan"), device="cuda")  # what torch.empty will hand out next
    assert all(t.isfinite().all() for t in gradients(multi_kernel_depthwise, x, weights, biases, torch.ones_like(x)))


@pytest.mark.gpu
def test_opcheck_on_the_gpu():
    x, weights, _ = gpu_case()
    channels, kernels = [2] * 4, [k for k in PAPER for _ in range(3)]
    parameters = torch.cat([w.flatten() for w in weights]).requires_grad_()
    torch.library.opcheck(depthwise._convolve, (x.requires_grad_(), parameters, channels, kernels, False, False, True))
    torch.library.opcheck(depthwise._correlate, (x, torch.randn_like(x).requires_grad_(), channels, kernels))


@pytest.mark.gpu
def test_compiles_under_autocast_on_the_gpu():
    x, weights, biases = gpu_case(torch.float32, torch.channels_last_3d)
    function = lambda x, w, b: multi_kernel_depthwise(x * 2, w, b, residual=True).relu()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True)
    with torch.autocast("cuda", torch.float16):
        got = gradients(compiled, x, weights, biases, torch.ones_like(x, dtype=torch.float16))
        want = gradients(function, x, weights, biases, torch.ones_like(x, dtype=torch.float16))
    assert got[0].dtype == torch.float16
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-2)


if __name__ == "__main__":
    from nnunet_lgms.ops.triton import depthwise as depthwise_triton

    torch.set_num_threads(1)
    print(json.dumps({name: errors(depthwise_triton, "cpu", *case) for name, case in INTERPRETED.items()}))
