"""Triton kernels compiled by processes beside this one.

Python and most of Triton's compiler hold the interpreter's lock, so that of many threads fewer than three get on. A
process is started that imports the compiler once, while this one still notes which kernels it needs, and then forks a
worker for each core, which compiles one kernel after the other as they are noted. What they compile lies in Triton's
cache on the disk afterwards, where this process looks before it compiles anything. Nothing else is taken from them:
whatever goes wrong there costs time, and never a result.
"""

from __future__ import annotations

import os
import pickle
import pkgutil
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from nnunet_lgms.ops.backend import kernels_for
from nnunet_lgms.parallel import cores

MOST_WORKERS = 16
FEWEST_CORES = 4  # with fewer, what is imported takes longer than is saved
WORTH_WORKERS = 100  # missing kernels, where others are there: fewer, threads compile while a process would import
EMPTY = 10  # entries of Triton's cache; with fewer it counts as empty
PATIENCE = 300  # seconds for all kernels together
# Bytes of each job in the pipe that all workers read from: a pipe keeps so many together.
JOB = 4096

_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from nnunet_lgms.ops.compiling import work; work(int(sys.argv[1]))"
_LAST = b"the last".ljust(JOB)  # for each worker: the pipe may stay open where another process has been forked
_here = threading.local()
_looks = threading.Lock()  # what one thread finds as Triton's cache manager, and restores, is not another one's
_begins = threading.Lock()
_begun: _Workers | None = None  # that nobody has asked for a kernel yet


@contextmanager
def workers_begin(device: torch.device) -> Iterator[None]:
    """Inside, workers are there before it is known what they are to compile, where Triton's cache is empty.

    It is for who is sure to need many kernels on a device, before the network is made. The first
    :func:`compiled_by_workers` inside has these workers; if there is none, they end.
    """
    global _begun
    begun = _begin(device)
    try:
        yield
    finally:
        with _begins:
            left, _begun = (_begun, None) if _begun is begun else (None, _begun)
        if left is not None:
            left.end()


def _begin(device: torch.device) -> _Workers | None:
    """Workers that have not begun before."""
    global _begun
    with _begins:
        if _begun is not None:
            if _begun.are_there():
                return None
            _begun.end()
        if kernels_for(device).path != "kernels" or (most := _most_workers()) == 0 or not _cache_is_empty():
            return None
        _begun = _Workers(most)
        _begun.start()
        return _begun


def _take_begun() -> _Workers | None:
    """Those that have begun, if they are there still."""
    global _begun
    with _begins:
        begun, _begun = _begun, None
    if begun is None or begun.are_there():
        return begun
    begun.end()
    return None


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
    workers = _take_begun() or _Workers(most)
    try:
        yield workers.ask
        workers.compile()
    finally:
        workers.end()


def _most_workers() -> int:
    if getattr(sys, "frozen", False):  # this is an application, not Python: it would be started again and again
        return 0
    try:
        from triton import knobs

        compiles_again = knobs.compilation.always_compile
    except (ImportError, AttributeError):  # before Triton 3.4, or knobs of other names
        return 0
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = cores() // ranks  # each compiles what it needs
    if mine < FEWEST_CORES or not hasattr(os, "fork") or compiles_again:
        return 0
    return min(MOST_WORKERS, mine)


def _cache_is_empty() -> bool:
    """Whether next to nothing was compiled on this machine, and can be kept."""
    from triton import knobs

    try:
        folder = there = Path(knobs.cache.dir).absolute()
        while not there.exists():
            there = there.parent
        n_entries = len(list(islice(folder.iterdir(), EMPTY))) if there == folder else 0
        return n_entries < EMPTY and os.access(there, os.W_OK)
    except (OSError, AttributeError):
        return False


class _Workers:
    """The process that :func:`work` is run by, and what it is to compile."""

    def __init__(self, most: int):
        self._most = most
        self._jobs: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None is the last
        self._missing = 0
        self._was_started = False  # once, also if nothing can be started
        self._process: subprocess.Popen | None = None
        self._parent = os.getpid()

    def start(self) -> None:
        self._was_started = True
        with suppress(Exception):
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self._most), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # so that it can be ended with all that it started
                bufsize=0,
            )
            try:  # a thread waits where the pipe is full, as long as the process imports
                threading.Thread(target=self._hand_out, args=(self._process.stdin,), daemon=True).start()
            except RuntimeError:  # no more of them are allowed
                self.end()

    def are_there(self) -> bool:
        """Whether the process runs, and is not that of another one from which this one was forked."""
        return self._process is not None and self._parent == os.getpid() and self._process.poll() is None

    def _hand_out(self, pipe: Any) -> None:
        with suppress(OSError), pipe:  # nobody reads any longer
            while (job := self._jobs.get()) is not None:
                pipe.write(job)
            for _ in range(self._most):
                pipe.write(_LAST)

    def ask(self, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes a kernel if it is not in the cache, which is looked at only until it is clear that many are missing."""
        with suppress(Exception):  # whatever it is, it is said where the kernel is compiled without a worker
            if not self._was_started and _is_compiled(kernel, args, kwargs):
                return
            self._jobs.put(_job(kernel, args, kwargs))
            self._missing += 1
            if not self._was_started and self._missing == WORTH_WORKERS:
                self.start()

    def compile(self) -> None:
        self._jobs.put(None)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)

    def end(self) -> None:
        """Once, and by the process that started them."""
        if self._parent != os.getpid():
            return
        self._jobs.put(None)
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError):  # nobody is left
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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

    with _looks, knobs.cache.scope():
        knobs.cache.manager_class = _only_looking(knobs.cache.manager_class or FileCacheManager)
        _here.only_looks = True
        try:
            function_of(kernel).warmup(*args, grid=(1,), **kwargs)
        except _NotCompiled:
            return False
        finally:
            _here.only_looks = False
    return True


class AbsentDriver(NamedTuple):
    """As much of Triton's driver as its compiler asks for, for a GPU that the process does not touch.

    Compiled kernels are kept by device, whose number is the architecture's.
    """

    target: Any  # Triton's GPUTarget

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    @property
    def launcher_cls(self) -> type:
        from triton.backends.nvidia.driver import CudaLauncher

        return CudaLauncher


def _job(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> bytes:
    """As it goes through the pipe.

    Raises:
        ValueError: it does not fit.
    """
    from triton.runtime import driver

    function = function_of(kernel).fn
    job = pickle.dumps((driver.active.get_current_target(), function.__module__, function.__name__, args, kwargs))
    if len(job) > JOB:
        raise ValueError(f"{function.__name__} has arguments of {len(job)} bytes.")
    return job.ljust(JOB)


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


def work(most: int) -> None:
    """Compiles the kernels that come through the standard input, in so many processes; ends when all are compiled.

    It ends with the process that it comes from as well, at the latest after PATIENCE. Where memory is short, it is
    ended in place of that process.
    """
    import nnunet_lgms.ops.triton as kernels

    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # forked processes have it as well
        file.write("1000")
    if hasattr(os, "nice"):
        with suppress(OSError):
            os.nice(5)  # what notes the next kernels comes first
    _end_in_time()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        import_module(module.name)
    jobs = os.dup(sys.stdin.fileno())  # which forked processes close
    workers = [get_context("fork").Process(target=_take, args=(jobs,)) for _ in range(most)]
    with suppress(OSError):  # no more processes are allowed, or no memory is left for them
        for worker in workers:
            worker.start()
    for worker in workers:
        if worker.pid is not None:
            worker.join()


def _take(jobs: int) -> None:
    """Compiles one job after the other, until there are no more."""
    _end_in_time()
    while (job := os.read(jobs, JOB)) not in (b"", _LAST):
        with suppress(Exception):  # which is raised again where the kernel is needed
            _compile(*pickle.loads(job))


def _end_in_time() -> None:
    """Has this process, but none that it forks, ended after PATIENCE even if it never comes back from the compiler."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)


def _compile(target: Any, module: str, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    from triton.runtime import driver

    driver.set_active(AbsentDriver(target))
    kernel = getattr(import_module(module), name)
    fix_key(kernel)
    build_launcher(kernel.warmup(*args, grid=(1,), **kwargs))


def build_launcher(kernel: Any) -> None:
    """Builds the C function that launches a kernel, which Triton then finds in its cache when the kernel is launched.

    It is not kept: those functions are modules of one name, and threads that import such can be given each other's.
    """
    from triton.runtime import driver

    driver.active.launcher_cls(kernel.src, kernel.metadata)
