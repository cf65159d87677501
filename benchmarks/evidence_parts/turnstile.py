"""Trainings that share a GPU, and moments in which one of them has it alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turnstile:
    """A lock with many users, or one.

    Who wants to be alone closes the gate, waits until the others have left, and opens it when done; the others pass
    the gate whenever they come in, so they cannot keep it waiting for ever.

    Args:
        folder: where the lock's files are; the same for all processes.
    """

    @classmethod
    def of_this_gpu(cls, folder: Path) -> Turnstile:
        """That of the processes which see the same GPU as this one; others are not in the way."""
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "all"
        return cls(folder / gpu.replace("/", "_"))

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.gate, self.room = folder / "gate.lock", folder / "room.lock"

    @contextmanager
    def shared(self) -> Iterator[None]:
        """In the room together with others."""
        with self.room.open("w") as room:
            with self.gate.open("w") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(room, fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In the room alone."""
        with self.room.open("w") as room, self.gate.open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX)
            yield
