"""The path that an operator takes: the Triton kernels of this package, or PyTorch's own operators.

There is one switch, :func:`set_kernels`, whose first value is the environment variable NNUNET_LGMS_KERNELS, and one
decision for every device, :func:`kernels_for`, which says why. Who has little to compute goes without kernels inside of
:func:`nothing_prepared`. A kernel that Triton cannot build, or that a GPU has not the memory for, switches the kernels
off on its device: the operator runs again on PyTorch's path, with one warning.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

VARIABLE = "NNUNET_LGMS_KERNELS"
SETTINGS = ("auto", "on", "off")
HAS_TRITON = find_spec("triton") is not None
CAPABILITY = (8, 0)  # of the oldest GPUs that the kernels are made for: tensor cores with bfloat16 and tf32
MEASURED = (9, 0)  # capability of the H100 and H200, on which tiles were chosen by the clock
SHARED_MEMORY = 77_824  # bytes of a block that the largest kernel takes where there is little of it
ALL_HAVE = 99 << 10  # bytes of shared memory that every GPU of that capability has, where PyTorch does not say it


class Decision(NamedTuple):
    """The path that operators take on a device, "kernels" or "pytorch", and the reason in one sentence."""

    path: str
    reason: str


class KernelsSwitchedOff(RuntimeError):
    """A kernel failed, and those of its device are switched off: what was computed can be computed again without."""


def _setting_of(value: str) -> str:
    if value.lower() not in SETTINGS:
        raise ValueError(f"{VARIABLE} is {value!r}: set it to auto, on or off, or unset it.")
    return value.lower()


_setting = _setting_of(os.environ.get(VARIABLE, "auto"))
_failed: dict[int, str] = {}  # kernels that failed, by index of the device
_as_on_gpu = False


class _Here(threading.local):
    """What holds for a thread, as others may predict meanwhile."""

    without_kernels = False


_here = _Here()
# cuDNN's choice is that of all threads: the last to leave :func:`nothing_prepared` puts back what the first one found.
_counting = threading.Lock()
_inside, _outside_benchmark = 0, False


def set_kernels(setting: str) -> None:
    """Switches the Triton kernels.

    "on" uses them on every device that they are made for, "off" on none; "auto" is "on", but for predictions that are
    too few to compile kernels for. Code that ``torch.compile`` has compiled is compiled anew, a training step that was
    recorded stays as it is.

    Raises:
        ValueError: ``setting`` is none of the three.
    """
    global _setting
    if setting not in SETTINGS:
        raise ValueError(f"set_kernels takes 'auto', 'on' or 'off', not {setting!r}.")
    _setting = setting


@contextmanager
def kernels(setting: str) -> Iterator[None]:
    """Inside, :func:`set_kernels` is in force, and at the end what was before."""
    before = _setting
    set_kernels(setting)
    try:
        yield
    finally:
        set_kernels(before)


def are_asked_for() -> bool:
    """Whether the setting is "on": the kernels are compiled also for what is little."""
    return _setting == "on"


@contextmanager
def nothing_prepared() -> Iterator[None]:
    """Inside, operators that this thread calls are PyTorch's, and cuDNN tries out no algorithms.

    With the setting "on", kernels are compiled and algorithms tried out as outside.
    """
    global _inside, _outside_benchmark
    if are_asked_for():
        yield
        return
    cudnn, before = torch.backends.cudnn, _here.without_kernels
    with _counting:
        if _inside == 0:
            _outside_benchmark = cudnn.benchmark
        _inside += 1
        cudnn.benchmark, _here.without_kernels = False, True
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if _inside == 0:
                cudnn.benchmark = _outside_benchmark
            _here.without_kernels = before


def kernels_for(device: torch.device | str) -> Decision:
    """The path that operators take for tensors on ``device``, and why."""
    device = torch.device(device)
    if device.type != "cuda":
        return Decision("pytorch", f"The Triton kernels are for NVIDIA GPUs, not for the device {device.type!r}.")
    if _setting == "off":
        return Decision("pytorch", f"The Triton kernels are switched off ({VARIABLE} or set_kernels).")
    if _here.without_kernels:
        return Decision("pytorch", "To compile the Triton kernels would take longer than they save.")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index in _failed:
        return Decision("pytorch", _failed[index])
    return _hardware(index)


@functools.cache
def _hardware(index: int) -> Decision:
    """What the machine allows on the CUDA device ``index``."""
    if not HAS_TRITON:
        return Decision("pytorch", "The Triton kernels need the package triton, which is not installed.")
    try:
        import triton
    except Exception as error:  # a broken installation may raise anything
        reason = " ".join(str(error).split())[:200]
        return Decision("pytorch", f"The Triton kernels need the package triton, which cannot be imported ({reason}).")
    if not hasattr(triton.language, "tuple"):
        reason = f"The Triton kernels need Triton 3.3, which comes with PyTorch 2.7, and this is {triton.__version__}."
        return Decision("pytorch", reason)
    if torch.version.hip is not None:
        return Decision("pytorch", "The Triton kernels are for NVIDIA GPUs, and this PyTorch is built for AMD's.")
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    if capability < CAPABILITY:
        need = ".".join(map(str, CAPABILITY))
        has = ".".join(map(str, capability))
        return Decision(
            "pytorch", f"The Triton kernels need compute capability {need}, and {properties.name} has {has}."
        )
    shared = shared_memory(index)
    if shared < SHARED_MEMORY:
        return Decision(
            "pytorch",
            f"The Triton kernels need {SHARED_MEMORY} bytes of shared memory per block, and {properties.name} has "
            f"{shared}.",
        )
    reason = f"The Triton kernels run on {properties.name}."
    if not hasattr(triton, "knobs"):  # what worker processes need
        reason += f" Triton {triton.__version__} compiles one after the other, so the first step takes longer."
    return Decision("kernels", reason)


def shared_memory(device: torch.device | int) -> int:
    """Bytes of shared memory that a block may have on a CUDA device."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", ALL_HAVE)


@functools.lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; of others, such as the interpreter's, that of the GPU that was measured."""
    if device.type != "cuda":
        return MEASURED
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def use_kernels(x: Tensor) -> bool:
    """Whether x goes to the Triton kernels; each operator adds the limits of its own."""
    if _as_on_gpu:
        return HAS_TRITON and _setting != "off"
    return _setting != "off" and x.is_cuda and _chosen(x.device.index)


def _chosen(index: int) -> bool:
    return kernels_for(torch.device("cuda", index)).path == "kernels"


# As `torch.compiler.assume_constant_result`, which imports the compiler for it: two seconds of every prediction.
_chosen._dynamo_marked_constant = True


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, tensors take the path of a GPU's tensors wherever they are: on the meta device, to count memory."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def counts_as_gpu() -> bool:
    """Whether :func:`as_on_gpu` is in force."""
    return _as_on_gpu


def kernel_failed(device: torch.device, kernel: str, error: Exception) -> RuntimeError:
    """Switches the kernels of ``device`` off, with a warning, and returns the error that ends what was being computed.

    Processes that train together would exchange different things, so there it is an error for good.
    """
    what = (
        f"the Triton kernel {kernel} failed on {device} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    )
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return RuntimeError(f"{what[0].upper()}{what[1:]}: set {VARIABLE}=off for all processes of this training.")
    index = device.index if device.index is not None else 0
    if index not in _failed:
        _failed[index] = f"The Triton kernels are switched off, as {what}."
        warnings.warn(f"{what[0].upper()}{what[1:]}: PyTorch's operators take its place.", RuntimeWarning, stacklevel=2)
    return KernelsSwitchedOff(_failed[index])


def with_fallback(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, called a second time if a kernel failed in it and is switched off by then.

    For what can be repeated: an operator, or a whole training step where the kernel may be one of the backward pass.
    """
    try:
        return function(*args, **kwargs)
    except KernelsSwitchedOff:
        return function(*args, **kwargs)


def operator(function: Callable) -> Callable:
    """Decorates an operator, whose first argument is a map or a sequence of maps.

    Kernels are launched on the device of that map, and PyTorch's path takes their place where one fails. A compiler
    sees to both in its own way.
    """

    @functools.wraps(function)
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        first = x if isinstance(x, Tensor) else x[0]
        if torch.compiler.is_compiling() or not first.is_cuda:
            return function(x, *args, **kwargs)
        with torch.cuda.device_of(first):
            return with_fallback(function, x, *args, **kwargs)

    return call
