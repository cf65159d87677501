"""Triton kernels compiled by processes beside this one.

Python and most of Triton's compiler hold the interpreter's lock, so that of many threads fewer than three get on. What
workers compile lies in Triton's cache on the disk afterwards, where this process looks before it compiles anything.
Nothing else is taken from them: whatever goes wrong with a worker costs time, and never a result.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from torch import distributed as dist

from nnunet_lgms.parallel import cores

MOST_WORKERS = 15
FEWEST_CORES = 4  # with fewer, what workers import takes longer than they save
WORTH_WORKERS = 16  # missing kernels: threads have compiled fewer before a worker has PyTorch imported
PATIENCE = 300  # seconds for all kernels together

_WORKER = "import sys; sys.path[:] = sys.argv[1:]; from nnunet_lgms.ops.compiling import work; work()"
_here = threading.local()


@contextmanager
def compiled_by_workers() -> Iterator[Callable[..., None]]:
    """Gives a function of a kernel, its arguments and keywords; at the end, what it was called with is in the cache.

    That is so if all goes well. Tensors among the arguments are given as their dtype. Workers are started when kernels
    are missing in the cache, and only where there are cores for them.
    """
    most = _most_workers()
    if most == 0:
        yield lambda *asked: None
        return
    workers = _Workers(most)
    try:
        yield workers.ask
        workers.wait()
    finally:
        workers.end()


def _most_workers() -> int:
    try:
        from triton import knobs
    except ImportError:  # before Triton 3.4
        return 0
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = cores() // ranks  # each compiles what it needs
    return min(MOST_WORKERS, mine - 1) if mine >= FEWEST_CORES and not knobs.compilation.always_compile else 0


class _Workers:
    """Processes that are each given one kernel after the other, by a thread of this one that waits for the answer."""

    def __init__(self, most: int):
        self._threads = ThreadPoolExecutor(most, "compiling")
        self._missing: list[bytes] = []  # kernels that nobody compiles yet
        self._given: list[Future] = []
        self._started: list[subprocess.Popen] = []
        self._idle: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._ended = False  # or one has failed, so that the next would fail as well

    def ask(self, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Has a kernel compiled if it is not in the cache, which is looked at only until workers are needed."""
        with suppress(Exception):  # whatever it is, it is said where the kernel is compiled without a worker
            job = _job(kernel, args, kwargs)
            if self._given or not _is_compiled(kernel, args, kwargs):
                self._missing.append(job)
            if self._given or len(self._missing) >= WORTH_WORKERS:
                self._given += [self._threads.submit(self._give, job) for job in self._missing]
                self._missing.clear()

    def _give(self, job: bytes) -> None:
        answer = b""
        try:
            worker = self._idle_worker()
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(job)
            answer = worker.stdout.readline()
            self._idle.append(worker)
        finally:
            self._ended |= not answer

    def _idle_worker(self) -> subprocess.Popen:
        with self._lock:
            if self._ended:
                raise ChildProcessError("no workers any more")
            if self._idle:
                return self._idle.pop()
            worker = subprocess.Popen(
                [sys.executable, "-c", _WORKER, *sys.path],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self._started.append(worker)
            return worker

    def wait(self) -> None:
        wait(self._given, PATIENCE)

    def end(self) -> None:
        with self._lock:
            self._ended = True
        for worker in self._started:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._started:
            with worker:  # waits for its end and closes the pipes
                pass


def function_of(kernel: Any) -> Any:
    """Triton's function within what :func:`torch.library.wrap_triton` gives, or the kernel as it is."""
    return kernel if hasattr(kernel, "fn") else getattr(kernel, "kernel", kernel)


class _NotCompiled(Exception):
    """A kernel is not in Triton's cache."""


@cache
def _only_looking(manager: type) -> type:
    """A manager of Triton's cache that raises :class:`_NotCompiled`, in a thread that only looks, for a compilation."""

    class OnlyLooking(manager):
        def get_group(self, filename: str) -> dict[str, str] | None:
            group = super().get_group(filename)
            if getattr(_here, "only_looks", False) and filename not in (group or ()):
                raise _NotCompiled
            return group

    return OnlyLooking


def _is_compiled(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a kernel is in Triton's cache, from where it is loaded then."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with knobs.cache.scope():
        knobs.cache.manager_class = _only_looking(knobs.cache.manager_class or FileCacheManager)
        _here.only_looks = True
        try:
            function_of(kernel).warmup(*args, grid=(1,), **kwargs)
        except _NotCompiled:
            return False
        finally:
            _here.only_looks = False
    return True


class _Driver(NamedTuple):
    """As much of Triton's driver as its compiler asks for, for a GPU that the process does not touch."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def _job(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> bytes:
    from triton.runtime import driver

    function = function_of(kernel).fn
    return pickle.dumps((driver.active.get_current_target(), function.__module__, function.__name__, args, kwargs))


def fix_key(function: Any) -> None:
    """Computes a function's key in Triton's cache after those of the functions that it calls.

    In Triton, constants of these are part of the key if their own keys happen to be known before, from another kernel.
    Every process would have keys of its own then, as each compiles other kernels first.
    """
    from triton.runtime.jit import JITFunction

    if isinstance(function, JITFunction):
        for name in function.fn.__code__.co_names:
            fix_key(function.fn.__globals__.get(name))
        hash(function)  # of that key


def work() -> None:
    """Compiles the kernels that come through the standard input, each answered by a line, until that is closed."""
    from triton.runtime import driver

    while True:
        try:
            target, module, name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        driver.set_active(_Driver(target))
        with suppress(Exception):  # which is raised again where the kernel is needed
            kernel = getattr(import_module(module), name)
            fix_key(kernel)
            kernel.warmup(*args, grid=(1,), **kwargs)
        print(flush=True)
