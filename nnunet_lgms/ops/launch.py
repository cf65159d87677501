"""Launching Triton kernels, or compiling them without a launch.

Triton compiles a kernel when it is launched first, so a network's first step compiles its hundred kernels one after the
other. What a step would launch is known before, though: inside :func:`only_compiling` it is compiled by as many threads
as there are cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

_only_compiling = False


def launch(kernel: JITFunction) -> JITFunction | _Warmup:
    """``launch(kernel)[grid](...)`` is ``kernel[grid](...)``, launched or only compiled."""
    return _Warmup(kernel) if _only_compiling else kernel


class _Warmup:
    """A kernel that is compiled in place of being launched."""

    compiling: list[Any] = []

    def __init__(self, kernel: JITFunction):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def warmup(*args: Any, **kwargs: Any) -> None:
            self.compiling.append(self._kernel.warmup(*args, grid=grid, **kwargs))

        return warmup


@contextmanager
def only_compiling() -> Iterator[None]:
    """Inside, operators give memory without content, and the kernels that they need are compiled; ready at the end."""
    import triton

    global _only_compiling
    # Which thread compiles is a matter of the thread that asks, so the backward pass has to ask in this one.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        with triton.AsyncCompileMode(threads), one_thread:
            _only_compiling = True
            try:
                yield
            finally:
                _only_compiling = False
        # The C function that launches a kernel is compiled when it is first asked for.
        kernels = {id(kernel): kernel for kernel in _Warmup.compiling}
        _Warmup.compiling.clear()
        list(threads.map(lambda kernel: kernel.run, kernels.values()))
