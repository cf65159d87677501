"""Which path an operator takes: the Triton kernels of this package, or plain PyTorch."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


def triton_module(name: str, x: Tensor) -> ModuleType | None:
    """The module `nnunet_lgms.ops.<name>` for a CUDA tensor, None where plain PyTorch must do.

    The environment variable NNUNET_LGMS_KERNELS=off turns all kernels of this package off.
    """
    if x.device.type != "cuda" or os.environ.get("NNUNET_LGMS_KERNELS", "on").lower() == "off":
        return None
    return _import(name)


@lru_cache(maxsize=None)
def _import(name: str) -> ModuleType | None:
    try:
        return import_module(f"nnunet_lgms.ops.{name}")
    except ImportError as error:
        warnings.warn(f"Triton cannot be used ({error}): LGMSNet takes PyTorch's slower operators.", stacklevel=2)
        return None
