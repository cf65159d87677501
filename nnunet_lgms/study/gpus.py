"""One GPU a job."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from nnunet_lgms.locks import acquired, file_lock


@contextmanager
def one_gpu(poll_seconds: float = 5) -> Iterator[str | None]:
    """Holds one of the visible GPUs that no other job of this user on this host holds, and makes it the only one.

    Sets CUDA_VISIBLE_DEVICES, so it must come before torch is used. On a cluster that shows a job its own GPU alone
    there is nothing to choose and nothing to wait for. Yields the GPU, or None where there is none.
    """
    gpus = visible_gpus()
    if not gpus:
        yield None
        return
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows gives every user a folder for this
    folder = Path(tempfile.gettempdir()) / f"nnunet_lgms_gpus_{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpu, lock = _first_free(gpus, folder, poll_seconds)
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        yield gpu
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        lock.release()


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; [] if there are none."""
    listed: list[tuple[str, str]] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True)
        lines = answer.stdout.splitlines() if answer.returncode == 0 else []
        listed = [tuple(cell.strip() for cell in line.split(",")) for line in lines]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [uuid for _, uuid in listed]
    by_index = dict(listed)
    # what is no index is a name already: a GPU's UUID, or that of a MIG instance
    return [by_index.get(word.strip(), word.strip()) for word in visible.split(",") if word.strip() not in ("", "-1")]


def _first_free(gpus: Sequence[str], folder: Path, poll_seconds: float) -> tuple[str, FileLock]:
    said = False
    while True:
        for gpu in gpus:
            lock = file_lock(folder / f"{gpu.replace('/', '_')}.lock")
            if acquired(lock):
                return gpu, lock
        if not said:
            print(f"Waiting for one of {len(gpus)} GPU(s)", flush=True)
            said = True
        time.sleep(poll_seconds)
