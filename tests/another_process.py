"""Another process that holds a lock, as another command on this machine would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT

HOLD = """
import os, sys, time
from pathlib import Path
from nnunet_lgms.locks import locked
with locked(Path(sys.argv[1]), "test"):
    if len(sys.argv) > 2:
        begun, begins = os.pipe()
        if os.fork() == 0:
            os.write(begins, b".")  # what is done after a fork is done
            time.sleep(60)
        os.read(begun, 1)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holds(lock: Path, *words: str) -> Iterator[subprocess.Popen]:
    """It lets go when it is killed or the block ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(lock), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.stdin.close()
        process.wait()
