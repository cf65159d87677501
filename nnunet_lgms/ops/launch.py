"""Launching Triton kernels, or compiling them without a launch.

Triton compiles a kernel when it is launched first, so a network's first step compiles its hundred kernels one after the
other. What a step would launch is known before, though: what was asked for inside :func:`only_compiling` is compiled at
its end, by as many threads as there are cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

# Kernel, arguments and keywords of the launches that are only compiled, each once; None where launches are launches.
_asked_for: dict[tuple, None] | None = None


def launch(kernel: JITFunction) -> JITFunction | _Asked:
    """``launch(kernel)[grid](...)`` is ``kernel[grid](...)``, launched or only compiled."""
    return kernel if _asked_for is None else _Asked(kernel)


class _Asked:
    """A kernel that notes what it is asked for."""

    def __init__(self, kernel: JITFunction):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def note(*args: Any, **kwargs: Any) -> None:
            # of a tensor the compiler knows the type, and that it is aligned
            args = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
            _asked_for[self._kernel, args, tuple(kwargs.items())] = None

        return note


@contextmanager
def only_compiling() -> Iterator[None]:
    """Inside, operators give memory without content; at its end, the kernels that they would launch are compiled."""
    global _asked_for
    _asked_for = {}
    try:
        yield
        asked_for = list(_asked_for)
    finally:
        _asked_for = None
    if asked_for:
        _compile(asked_for)


def _compile(asked_for: list[tuple]) -> None:
    import triton

    on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else ()
    with ThreadPoolExecutor(os.cpu_count(), "compile", *on_device) as threads:
        with triton.AsyncCompileMode(threads):
            kernels = [kernel.warmup(*args, grid=(1,), **dict(kwargs)) for kernel, args, kwargs in asked_for]
        list(threads.map(_build_launcher, {id(kernel): kernel for kernel in map(_compiled, kernels)}.values()))


def _compiled(kernel: Any) -> CompiledKernel:
    """The kernel that a warm-up gave, or promised."""
    return kernel.result() if hasattr(kernel, "result") else kernel


def _build_launcher(kernel: CompiledKernel) -> None:
    """Builds the C function that launches a kernel, which Triton then finds in its cache when the kernel is launched.

    It is not kept: those functions are modules of one name, and threads that import such can be given each other's.
    """
    from triton.runtime import driver

    driver.active.launcher_cls(kernel.src, kernel.metadata)
