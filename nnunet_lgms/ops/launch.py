"""Launching Triton kernels, or compiling them without a launch.

Triton compiles a kernel when it is launched first, so a network's first step compiles its hundred kernels one after the
other. What a step would launch is known before, though: what was asked for inside :func:`only_compiling` is compiled at
its end, by as many threads as there are cores. Workers of :mod:`nnunet_lgms.ops.compiling` begin before that, and leave
the threads little to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnunet_lgms.ops.backend import kernel_failed
from nnunet_lgms.ops.compiling import build_launcher, compiled_by_workers, fix_key, function_of

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction


class _Here(threading.local):
    """What becomes of the launches of a thread, as others may predict meanwhile."""

    # Kernel, arguments and keywords of those that are only compiled, each once; None where launches are launches.
    asked_for: dict[tuple, None] | None = None
    ask_workers: Callable[..., None] | None = None  # who are told of each of them at once


_here = _Here()


def launch(kernel: JITFunction) -> _Launch | _Asked:
    """``launch(kernel)[grid](...)`` is ``kernel[grid](...)``, launched or only compiled.

    Raises:
        KernelsSwitchedOff: at the launch, where Triton cannot build the kernel or the GPU has not the memory for it;
            see :func:`nnunet_lgms.ops.backend.kernel_failed`.
    """
    return _Launch(kernel) if _here.asked_for is None else _Asked(kernel)


class _Launch:
    """A kernel of which a failure switches the kernels off."""

    def __init__(self, kernel: JITFunction):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                self._kernel[grid](*args, **kwargs)
            except Exception as error:
                if not _is_triton_s(error):
                    raise
                device = next(arg.device for arg in args if isinstance(arg, Tensor))
                raise kernel_failed(device, _name(self._kernel), error) from error

        return run


def _is_triton_s(error: Exception) -> bool:
    """Whether a kernel cannot be built, or cannot run on this GPU whatever it is given."""
    from triton.errors import TritonError

    if isinstance(error, TritonError | CalledProcessError | OSError):  # of its C compiler; of its cache on the disk
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("PassManager", "C compiler"))


def _name(kernel: Any) -> str:
    function = function_of(kernel)
    return getattr(function, "fn", function).__name__


class _Asked:
    """A kernel that notes what it is asked for."""

    def __init__(self, kernel: JITFunction):
        fix_key(function_of(kernel))
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def note(*args: Any, **kwargs: Any) -> None:
            # of a tensor the compiler knows the type, and that it is aligned
            args = tuple(arg.dtype if isinstance(arg, Tensor) else arg for arg in args)
            assert _here.asked_for is not None
            asked = self._kernel, args, tuple(kwargs.items())
            if _here.ask_workers is not None and asked not in _here.asked_for:
                _here.ask_workers(self._kernel, args, kwargs)
            _here.asked_for[asked] = None

        return note


@contextmanager
def only_compiling() -> Iterator[None]:
    """Inside, operators give memory without content; at its end, the kernels that they would launch are compiled.

    That is so in this thread, where gradients are computed as well then, and in no other one.
    """
    with compiled_by_workers() as ask_workers, torch.autograd.set_multithreading_enabled(False):
        _here.asked_for, _here.ask_workers = {}, ask_workers
        try:
            yield
            asked_for = list(_here.asked_for)
        finally:
            _here.asked_for = _here.ask_workers = None
    if asked_for:
        copy_context().run(_compile, asked_for)  # where a compilation ends with an error, Triton's mode stays on


def _compile(asked_for: list[tuple]) -> None:
    import triton

    on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else ()
    with ThreadPoolExecutor(os.cpu_count(), "compile", *on_device) as threads:
        together = getattr(triton, "AsyncCompileMode", nullcontext)  # Triton 3.4 has none: one after the other
        try:
            with together(threads):
                kernels = [kernel.warmup(*args, grid=(1,), **dict(kwargs)) for kernel, args, kwargs in asked_for]
            kernels = filter(None, map(_compiled, kernels))  # Triton's interpreter compiles none
            list(threads.map(build_launcher, {id(kernel): kernel for kernel in kernels}.values()))
        except Exception as error:  # at its launch, the kernel fails again, and somebody is there to do without it
            if not _is_triton_s(error):
                raise


def _compiled(kernel: Any) -> CompiledKernel:
    """The kernel that a warm-up gave, or promised."""
    return kernel.result() if hasattr(kernel, "result") else kernel
