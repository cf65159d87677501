"""Runs the tests that need a GPU, and writes down what came out of them.

    python benchmarks/gpu_tests.py [--output benchmarks/results] [TEST ...]

Writes gpu_tests.txt: date, device, versions, commit, and a line for each test. Exit code as pytest's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch
from record import ROOT, command_line, provenance

from nnunet_lgms.files import atomic_write

ENDED = re.compile(r"\[gw\d+\] \[ *\d+%\] (\w+ \S+)")  # what pytest -v says when a test has
SUMMARY = re.compile(r"=+ (.* in [\d.]+s.*) =+")


def report(said: Sequence[str], about: str) -> str:
    """A line for each test that ended, and how it went in all."""
    ended = sorted(found.group(1) for line in said if (found := ENDED.match(line)))
    summary = [found.group(1) for line in said if (found := SUMMARY.match(line))]
    count = next((line for line in said if re.search(r"workers \[\d+ items\]", line)), "no test was found")
    return "\n".join([about, *ended, summary[-1] if summary else f"cut off after {len(ended)} tests: {count}"]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or names (all)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("these tests need a CUDA device, and PyTorch finds none")
    now = provenance()
    packages = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
    code = f"commit {now['commit']}" if now["commit"] else f"code {now['code']}"
    about = f"Tests marked gpu, {now['date']}: {now['device']}, Python {now['python']}, {packages}, {code}."
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))  # each compiles with threads of its own
    options = ["-m", "gpu", "-v", "--durations", "15", "--numprocesses", str(workers)]
    command = [sys.executable, "-m", "pytest", *options, *args.tests]
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # what is known by then is written, too
    said = []
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line.rstrip())
        process.wait()
    finally:
        process.terminate()  # where this one is, too, or nothing would be written before the tests end
        with atomic_write(args.output / "gpu_tests.txt") as temporary:
            temporary.write_text(report(said, about))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
