"""Runs a test file as a script under Triton's interpreter, for kernels on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest


def run_interpreted(file: str) -> dict:
    """The JSON that the script prints last. A process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=600)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton cannot count loops with this NumPy")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
