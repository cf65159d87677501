"""Seconds that a prediction spends in each of its stages, which overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("start", "read", "preprocess", "network", "export", "write")


class Stages:
    """Adds up seconds of the clock on the wall, in all and for each case; threads may share one.

    Attributes:
        seconds: of each stage, summed over cases. Stages of several cases run at the same time: the sum may be more
            than what the clock on the wall says.
        cases: the same for each case.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.cases: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float, case: str | None = None) -> None:
        with self._lock:
            self.seconds[stage] += seconds
            if case is not None:
                of_case = self.cases.setdefault(case, {})
                of_case[stage] = of_case.get(stage, 0.0) + seconds

    @contextmanager
    def measured(self, stage: str, case: str | None = None) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - begin, case)
