"""Operators that are defined without the compiler, and what the compiler finds of them later."""

import subprocess
import sys

import pytest
import torch
from torch._library import triton as torch_triton

from nnunet_lgms.ops import library

pytest.importorskip("triton")

DEFINE = """
import pkgutil, sys
from importlib import import_module
import nnunet_lgms.ops.triton as kernels
for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
    import_module(module.name)
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


def test_to_define_operators_imports_no_compiler():
    """It takes longer than all else that a prediction imports."""
    said = subprocess.run([sys.executable, "-c", DEFINE], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


@pytest.mark.skipif(not hasattr(torch_triton, "get_triton_kernels_for_op"), reason="this PyTorch looks for no kernels")
def test_the_compiler_finds_the_kernels_of_an_operator():
    """They are part of the key by which a compiled network is found again."""
    from nnunet_lgms.ops.triton.layout import _transpose_kernel

    find = torch_triton.get_inner_triton_kernels

    @library.triton_op("nnunet_lgms_tests::transpose", mutates_args=())
    def transpose(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        library.wrap_triton(_transpose_kernel)[(1,)](x, out, 64, TO_LAST=True, C=4, LANES=4, ROWS=64)
        return out

    assert torch_triton.get_inner_triton_kernels is find
    assert list(torch_triton.get_triton_kernels_for_op("nnunet_lgms_tests::transpose")) == find(transpose._init_fn)
