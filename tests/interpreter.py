"""Runs a test file as a script under Triton's interpreter, for kernels on a machine without a GPU."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest


def _without_idle_work() -> None:
    """Takes from the interpreter what costs more than half of its time and changes no number.

    It makes Triton's language over anew at every call of a device function, `tl.sum` among them, and the second time
    finds nothing left to do. It computes for every sum and product of integers whether it overflows, and asserts this
    only in a mode that nobody sets here. A Triton that has other inner names keeps its ways.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, builder = interpreter._patch_lang, interpreter.interpreter_builder
        options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    except (ImportError, AttributeError, TypeError):
        return
    seen = set()

    def once(function):
        names = frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)
        if names not in seen:
            patch(function)
            seen.add(names)
        return SimpleNamespace(restore=lambda: None)  # this process is the interpreter's to its end

    interpreter._patch_lang, builder.options = once, options


if os.environ.get("TRITON_INTERPRET") == "1":
    _without_idle_work()


def run_interpreted(file: str) -> dict:
    """The JSON that the script prints last. A process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=600)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton cannot count loops with this NumPy")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
