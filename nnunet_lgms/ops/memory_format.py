"""Memory formats and dtypes of maps (B, C, *spatial), as the operators ask for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_lgms.ops.backend import counts_as_gpu

HALF = (torch.float16, torch.bfloat16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> bool:
    """Whether x (B, C, *spatial) is stored with its channels innermost."""
    return x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]) and (x.shape[1] == 1 or not x.is_contiguous())


def as_channels_last(x: Tensor) -> Tensor:
    """x (B, C, *spatial), contiguous with channels innermost, by PyTorch's own copy where one is needed.

    A map of one channel is contiguous in either format, but convolutions go by the strides.
    """
    if x.shape[1] == 1 and x.is_contiguous():
        return x.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim])


def wants_channels_last(x: Tensor) -> bool:
    """Whether a network runs faster on x (B, C, *spatial), on a CPU, with its channels innermost.

    oneDNN has no double precision. A compiler, or the runtime that a network is exported to, chooses layouts itself.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or counts_as_gpu():
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
