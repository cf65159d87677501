"""`torch.library` for this package's operators, without the import of the compiler where nothing is compiled.

PyTorch calls what runs an operator through ``torch._dynamo.disable``, so that no compiler looks into it, and imports
``torch._dynamo`` for that at the first call: two seconds of every prediction, as long as the rest of PyTorch takes. To
look for the kernels of an operator when that is defined, it imports Inductor as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._library import triton as torch_triton
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import is_wrap_triton_enabled

NOT_LOOKED_INTO = "__dynamo_disable"  # where `torch._disable_dynamo` keeps what it calls


def custom_op(name: str, **options: Any) -> Callable[[Callable], CustomOpDef]:
    """As :func:`torch.library.custom_op`."""
    return lambda function: _without_compiler(torch.library.custom_op(name, **options)(function))


def triton_op(name: str, **options: Any) -> Callable[[Callable], CustomOpDef]:
    """As :func:`torch.library.triton_op`."""

    def define(function: Callable) -> CustomOpDef:
        with _kernels_looked_for_when_asked():
            operator = torch.library.triton_op(name, **options)(function)
        return _without_compiler(operator)

    return define


def wrap_triton(kernel: Any) -> Any:
    """As :func:`torch.library.wrap_triton`, which imports what traces kernels also where nothing is traced."""
    return torch.library.wrap_triton(kernel) if is_wrap_triton_enabled() else kernel


class _KernelsOf:
    """The kernels within a function, looked for whenever somebody goes through them, as PyTorch 2.11 and 2.13 do."""

    def __init__(self, find: Callable[[Callable], list], function: Callable):
        self._find, self._function = find, function

    def __iter__(self) -> Iterator[Any]:
        return iter(self._find(self._function))


@contextmanager
def _kernels_looked_for_when_asked() -> Iterator[None]:
    """Inside, who defines an operator does not wait for Inductor, which helps PyTorch to look for the kernels in it.

    They are part of the key by which a compiled network is found again, which nobody needs before something compiles.
    """
    find = getattr(torch_triton, "get_inner_triton_kernels", None)
    if find is None:  # a version that does not look for any
        yield
        return
    torch_triton.get_inner_triton_kernels = lambda function: _KernelsOf(find, function)
    try:
        yield
    finally:
        torch_triton.get_inner_triton_kernels = find


def _without_compiler(operator: CustomOpDef) -> CustomOpDef:
    for wrapped in operator._backend_fns.values():
        if hasattr(wrapped, "__wrapped__"):
            _run_as_it_is(wrapped, wrapped.__wrapped__)
    return operator


def _run_as_it_is(wrapped: Callable, function: Callable) -> None:
    """Makes `wrapped`, which PyTorch calls, call `function` until there is a compiler."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        vars(function).pop(NOT_LOOKED_INTO, None)
        return wrapped(*args, **kwargs)  # which asks the compiler not to look

    setattr(function, NOT_LOOKED_INTO, call)
