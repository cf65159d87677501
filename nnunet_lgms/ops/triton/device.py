"""What kernels are sized by: how many processors a GPU has, and how much shared memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from nnunet_lgms.ops.backend import shared_memory


class Device(NamedTuple):
    """Sizes of a GPU."""

    processors: int
    shared_memory: int  # bytes that a program may have


@lru_cache(maxsize=16)
def sizes(device: torch.device) -> Device:
    """Those of a GPU; the interpreter and the meta device count as a small one."""
    if device.type != "cuda":
        return Device(4, 1 << 17)
    return Device(torch.cuda.get_device_properties(device).multi_processor_count, shared_memory(device))
