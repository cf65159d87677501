"""The processes that nnU-Net starts: they end with their training, and it does not outlive one that prepares batches.

Those that prepare batches come with the data loaders, and nnU-Net leaves two things open. A training that is killed
leaves them behind, and they wait for ever for somebody to take their batches and keep their memory. And one that is
killed can hold a lock that the training waits for: about once in a thousand kills it then hangs. Those of several GPUs
are ended by the system with the command that started them, but by an interrupt, which they ignore if that was started
in the background of a script.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

#: seconds that a training has to say itself that a process ended; nnU-Net's own orderly way takes up to a minute
GRACE = 120.0
PROCESS_ENDED = (
    "A process that prepares batches ended before its time. Unless an error of its own is printed above it was killed, "
    "most often for want of memory: allow fewer of them (nnUNet_n_proc_DA) or make room, then continue with --c."
)


class SharedDataset:
    """A dataset of nnU-Net's for its data loaders; a process that reads from it ends when its parent did.

    Args:
        dataset: nnU-Net's.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # asked for before it is there, while this is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def load_case(self, identifier: str) -> Any:
        if multiprocessing.current_process().daemon:  # as nnU-Net's are
            end_with_parent(os.getpid())
        return self.dataset.load_case(identifier)


@cache
def end_with_parent(pid: int) -> None:
    """Once in every process: a forked one has its parent's cache. Nothing in one that multiprocessing did not start."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def end_if_one_ends(workers: Sequence[BaseProcess], ended: threading.Event, grace: float = GRACE) -> None:
    """Ends this process with a message, if one of ``workers`` ended and nothing has come of it for ``grace`` seconds.

    Args:
        workers: running processes.
        ended: set when the training has ended, in whatever way.
    """

    def watch() -> None:
        wait([worker.sentinel for worker in workers])
        if not ended.wait(grace):
            print(PROCESS_ENDED, file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
