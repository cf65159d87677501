"""Commands that benchmarks run in processes of their own: how they start, end and are stopped, and what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from record import ROOT

PATIENCE = 900  # seconds until a command counts as hanging


def start(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """A command in a session of its own, so that :func:`stop` reaches its children; its output goes on in ``log``."""
    with log.open("a") as said:
        pipes = {"stdout": said, "stderr": said}
        return subprocess.Popen(command, env=os.environ | (environment or {}), start_new_session=True, **pipes)


def stop(process: subprocess.Popen) -> None:
    """With its children: trainings, studies and compilers have processes of their own."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen, log: Path, seconds: float = PATIENCE) -> int:
    """The exit code.

    Raises:
        RuntimeError: it does not end, and was stopped.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        raise RuntimeError(f"a command hangs: see {log}") from None


def wait_until(happened: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = PATIENCE) -> None:
    """Returns as soon as something happened while the command runs.

    Raises:
        RuntimeError: the command ended before, or it took too long.
    """
    begin = time.monotonic()
    while not happened():
        if process.poll() is not None or time.monotonic() - begin > seconds:
            stop(process)
            raise RuntimeError(f"a command that was to be killed ended before, or hangs: see {log}")
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Linux; none of a process that has ended."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def words_of(pid: int) -> list[str]:
    """The command of a process; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(member for child in children(pid) for member in family(child))]


def resident(pid: int) -> int:
    """Bytes of a process alone: what it shares with others is not counted for each of them."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:  # it has ended
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def last_json(said: str, code: int) -> dict:
    """What a process printed as its last line, or ``{"failed": reason}``."""
    lines = said.strip().splitlines() or ["it said nothing"]
    try:
        return json.loads(lines[-1])
    except ValueError:
        return {"failed": f"exit code {code}: {lines[-1][:300]}"}


def folders(*paths: Path | str) -> str:
    """A search path of these folders, in this order."""
    return os.pathsep.join(filter(None, map(str, paths)))


def measured_training(epochs: int, iterations: int, **more: object) -> dict[str, str]:
    """The environment in which nnU-Net finds the trainers of `trainers/measured.py`, and what these are told.

    Args:
        epochs: of the training.
        iterations: steps an epoch.
        more: further variables of these trainers.
    """
    trainers = (ROOT / "benchmarks" / "trainers", ROOT / "trainers", os.environ.get("nnUNet_extTrainer", ""))
    told = {"MEASURED_EPOCHS": epochs, "MEASURED_ITERATIONS": iterations, **more}
    return {
        "nnUNet_extTrainer": folders(*trainers),
        "PYTHONPATH": folders(ROOT, os.environ.get("PYTHONPATH", "")),
        **{name: str(value) for name, value in told.items()},
    }
