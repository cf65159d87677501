"""nnU-Net's predictor without the compiler that it imports, and only asks whether a network went through it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class _IsCompiled(type):
    def __instancecheck__(cls, network: object) -> bool:
        compiler = sys.modules.get("torch._dynamo")
        return compiler is not None and isinstance(network, compiler.OptimizedModule)


class OptimizedModule(metaclass=_IsCompiled):
    """Stands for ``torch._dynamo.OptimizedModule``: networks are instances of both, or of none."""


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, modules that import ``OptimizedModule`` from ``torch._dynamo`` get this module's.

    ``torch._dynamo`` takes as long to import as PyTorch, two seconds, before the first image is read. It is still
    imported where something is compiled.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in = ModuleType("torch._dynamo")
    stand_in.OptimizedModule = OptimizedModule
    sys.modules["torch._dynamo"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torch._dynamo"]


try:
    with without_compiler():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
except ImportError:  # a version that asks for more of the compiler
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

__all__ = ["OptimizedModule", "nnUNetPredictor"]
