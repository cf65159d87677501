"""Runs the tests that need a GPU, and writes down what came out of them.

    python benchmarks/gpu_tests.py [--output benchmarks/results] [TEST ...]

Writes gpu_tests.txt: date, device, versions, and a line for each test. Exit code as pytest's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from nnunet_lgms.files import written_whole

ROOT = Path(__file__).resolve().parent.parent
LINE = ("PASSED", "FAILED", "SKIPPED", "ERROR")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or names (all)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these tests need a CUDA device, and PyTorch finds none")
    workers = max(1, min(8, (os.cpu_count() or 1) // 4))  # each compiles with threads of its own
    options = ["-m", "gpu", "-v", "-rA", "--durations", "15", "--numprocesses", str(workers)]
    command = [sys.executable, "-m", "pytest", *options, *args.tests]
    said = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line.rstrip())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "nnunetv2"))
    lines = [line for line in said if line.startswith(LINE)]
    report = [
        f"Tests marked gpu, {datetime.date.today()}: {torch.cuda.get_device_name()}, Python "
        f"{platform.python_version()}, {packages}.",
        *sorted(lines),
        said[-1],
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    with written_whole(args.output / "gpu_tests.txt") as temporary:
        temporary.write_text("\n".join(report) + "\n")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
