"""Where ``torch.compile`` is not wanted, or cannot be had: its compiler for GPUs is Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

OLDEST = (7, 0)  # compute capability that torch.compile asks for; below it, its first step ends with GPUTooOldForTriton


def is_wanted() -> bool:
    """Whether the user leaves compilation on; nnU-Net's variable and its words for yes."""
    return os.environ.get("nnUNet_compile", "true").lower() in ("true", "1", "t")


def why_not_compiled(device: torch.device | str) -> str | None:
    """Why nothing can be compiled for a CUDA device, in one sentence; None where it can.

    nnU-Net looks at the system alone: on other machines the training would end with its first step.
    """
    if os.name == "nt":
        return "nnU-Net does not compile on Windows."
    if find_spec("triton") is None:
        return "torch.compile needs the package triton, which is not installed."
    properties = torch.cuda.get_device_properties(device)
    has = properties.major, properties.minor
    if torch.version.hip is None and has < OLDEST:
        need, has = (".".join(map(str, version)) for version in (OLDEST, has))
        return f"torch.compile needs compute capability {need}, and {properties.name} has {has}."
    return None
