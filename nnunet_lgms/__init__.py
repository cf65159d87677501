"""LGMSNet (arXiv 2508.15476) as a plugin on stock nnU-Net.

Importing this package is cheap: PyTorch is loaded when one of the names below is first used.

Example::

    >>> from nnunet_lgms import LGMSNet
    >>> network = LGMSNet.paper(1, 14, dim=3)
"""

import os
from importlib import import_module

__version__ = "0.2.0"

# ONNX Runtime looks for a telemetry server as soon as it is imported, and keeps a database of processes in the home
# folder. It reads this variable then, and only then; every module that imports it comes after this one.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

_HOME_OF = {
    "LGMSNet": "nnunet_lgms.architecture.lgmsnet",
    "load": "nnunet_lgms.pretrained",
    "load_official": "nnunet_lgms.architecture.official",
    "predict": "nnunet_lgms.inference",
}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
