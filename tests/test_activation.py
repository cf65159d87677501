"""gelu inside Triton's kernels, against float64."""

import json
import math

import pytest
from interpreter import run_interpreted

# What is allowed of |x| <= 12, and of numbers near zero, relative to the result.
BOUNDS = {"float32": (5e-7, 1e-6), "float16": (4e-6, 5e-5), "bfloat16": (4e-6, 5e-5)}
FAR = [-7.0, 7.0, -65504.0, 65504.0, -1e38]
NOT_FINITE = [math.inf, -math.inf, math.nan]


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreted(__file__)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_gelu_is_as_exact_as_its_map_asks_for(interpreted, dtype):
    largest, near_zero = interpreted[dtype]["errors"]
    assert largest < BOUNDS[dtype][0]
    assert near_zero < BOUNDS[dtype][1]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_gelu_far_from_zero(interpreted, dtype):
    far = interpreted[dtype]["far"]
    assert far[: len(FAR)] == pytest.approx([max(x, 0.0) for x in FAR], abs=1e-10)
    assert all(map(math.isnan, far[len(FAR) :])), "what is not finite must not get lost"


if __name__ == "__main__":
    import torch
    import torch.nn.functional as F
    import triton
    import triton.language as tl

    from nnunet_lgms.ops.triton.activation import gelu

    @triton.jit
    def kernel(x, out, like, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, gelu(tl.load(x + i), like.dtype.element_ty))

    def computed(x, dtype):
        out = torch.empty_like(x)
        kernel[(1,)](x, out, torch.empty(1, dtype=dtype), N=x.numel())
        return out

    grid = torch.linspace(-12, 12, 1 << 16)
    small = torch.logspace(-30, -0.3, 1 << 12)
    small = torch.cat([small, -small])
    far = torch.tensor([*FAR, *NOT_FINITE])
    found = {}
    for name in BOUNDS:
        dtype = getattr(torch, name)
        largest = (computed(grid, dtype) - F.gelu(grid.double())).abs().max().item()
        near_zero = (computed(small, dtype) / F.gelu(small.double()) - 1).abs().max().item()
        found[name] = {"errors": (largest, near_zero), "far": computed(far, dtype).tolist()}
    print(json.dumps(found))
