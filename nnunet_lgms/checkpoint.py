"""Checkpoints from others are data: they are unpickled without running code.

``torch.load`` with ``weights_only=False`` runs whatever a file tells it to, and that is how nnU-Net loads checkpoints.
What nnU-Net writes needs none of it: tensors, Python's own containers and numbers, a ``torch.device``, and a few NumPy
numbers. So a file is first read with nothing else allowed, and nnU-Net only gets those that pass.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import safe_globals

from nnunet_lgms.files import one_line, shown

#: how NumPy's numbers and small arrays are pickled; none of these runs code of the file's choosing
NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    np.ndarray,
    np.generic.__reduce__(np.float64(0))[0],  # "scalar", which NumPy 2 moved to another module
    np.zeros(1).__reduce__()[0],  # "_reconstruct", likewise
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
]
#: PyTorch's words for an object that it did not make
FOREIGN = re.compile(r"(?:GLOBAL|unrecognized function|unsupported class) (\S+)")


def read_checkpoint(path: str | Path | BinaryIO) -> Any:
    """Content of a checkpoint, a file's or that of an open one, on the CPU; nothing in it is executed.

    Raises:
        ValueError: the file is damaged, is no checkpoint, or holds objects beside tensors, numbers and text.
        FileNotFoundError: it is not there.
    """
    if isinstance(path, (str, Path)) and not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    try:
        with safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of random bytes brings almost anything to light
        if found := FOREIGN.search(str(error)):
            raise ValueError(
                f"{path} holds {shown(found[1])}, not weights and numbers alone, and would run code when loaded: it is "
                "not opened; use checkpoints as nnU-Net writes them."
            ) from error
        reason = one_line(str(error).rpartition("WeightsUnpickler error:")[2]) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}): it is no checkpoint, or it was cut short.") from error
