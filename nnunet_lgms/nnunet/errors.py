"""What stops a training or prediction: one sentence instead of a traceback, also under nnU-Net's own commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TrainingError(ValueError, SystemExit):
    """Something that the user can put right; the message says what it is and the way out.

    It is a ValueError to whoever calls nnU-Net from Python. ``nnUNetv2_train`` and ``nnUNetv2_predict`` catch nothing,
    and there it is a SystemExit: Python prints the message alone and the exit code is 1.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = message


@contextmanager
def said_in_one_sentence() -> Iterator[None]:
    """Turns a ValueError into a :class:`TrainingError` with the same message, on one line."""
    try:
        yield
    except TrainingError:
        raise
    except ValueError as error:
        raise TrainingError(" ".join(str(error).split())) from error
