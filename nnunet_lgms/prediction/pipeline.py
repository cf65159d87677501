"""Work on a list of cases that overlaps, in threads and with bounded queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def ahead(function: Callable[[Input], Output], inputs: Iterable[Input], threads: int) -> Iterator[Future[Output]]:
    """Futures of `function` of each input, in order and done; at most `threads` of them are begun ahead.

    With 0 threads nothing is begun before it is asked for, and all happens here.
    """
    if threads == 0:
        for value in inputs:
            future = Future()
            _run(future, function, value)
            yield future
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Output]] = deque()
        try:
            for value in inputs:
                waiting.append(pool.submit(function, value))
                if len(waiting) > threads:
                    yield _done(waiting.popleft())
            while waiting:
                yield _done(waiting.popleft())
        finally:  # also where the caller has stopped asking
            for future in waiting:
                future.cancel()


class Behind(Generic[Output]):
    """Runs functions in threads, behind the caller, who waits only if `threads` of them are still running.

    Results come in the order in which functions were given. Use it as a context: at the end all are done.
    """

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._threads = threads
        self.futures: list[Future[Output]] = []
        self._running: deque[Future[Output]] = deque()

    def run(self, function: Callable[[], Output]) -> Future[Output]:
        if self._pool is None:
            future = Future()
            _run(future, function)
        else:
            while len(self._running) >= self._threads:
                _done(self._running.popleft())
            future = self._pool.submit(function)
            self._running.append(future)
        self.futures.append(future)
        return future

    def __enter__(self) -> Behind[Output]:
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=error[0] is not None)


def _done(future: Future) -> Future:
    future.exception()  # waits
    return future


def _run(future: Future, function: Callable, *arguments) -> None:
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
