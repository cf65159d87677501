"""Which path an operator takes: the Triton kernels of this package, or plain PyTorch.

Decided once, when the package is imported, so that `torch.compile` sees constants.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

#: Environment variable: "on" (default) or "off", PyTorch alone.
KERNELS = os.environ.get("NNUNET_LGMS_KERNELS", "on").lower()
if KERNELS not in ("off", "on"):
    raise ValueError(f"NNUNET_LGMS_KERNELS is {KERNELS!r}: set it to off or on, or unset it.")
HAS_TRITON = find_spec("triton") is not None
HALF = (torch.float16, torch.bfloat16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


_as_on_gpu = False


def use_kernels(x: Tensor) -> bool:
    """Whether this tensor goes to the Triton kernels; each operator adds the limits of its own."""
    return KERNELS == "on" and HAS_TRITON and (x.is_cuda or _as_on_gpu)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, tensors take the path of CUDA tensors wherever they are; for those without numbers, to count memory."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def channels_last(x: Tensor) -> bool:
    """Whether x (B, C, *spatial) is stored with its channels innermost."""
    return x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]) and (x.shape[1] == 1 or not x.is_contiguous())


def wants_channels_last(x: Tensor) -> bool:
    """Whether a network runs faster on x (B, C, *spatial) with its channels innermost.

    oneDNN has no double precision. A compiler, or the runtime that a network is exported to, chooses layouts itself.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _as_on_gpu:
        return False
    onednn = torch.backends.mkldnn
    return x.device.type == "cpu" and x.dtype != torch.float64 and onednn.is_available() and onednn.enabled


def map_memory(reference: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Uninitialised (B, *size, channels), the memory of a channels-last map, which is its `.movedim(-1, 1)`.

    Batch, dtype and device are those of `reference`. A plain tensor and not one of another memory format, because
    Inductor (torch 2.11) fills the latter before a kernel overwrites it.
    """
    return torch.empty((reference.shape[0], *size, channels), dtype=reference.dtype, device=reference.device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x works in: autocast's where that is on."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
