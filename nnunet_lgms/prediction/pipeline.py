"""Work on a list of cases that overlaps, in threads and with bounded queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def ahead(
    function: Callable[[Input], Output],
    inputs: Iterable[Input],
    threads: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Future[Output]]:
    """Futures of `function` of each input, in order and done; at most `threads` of them are begun ahead.

    With 0 threads nothing is begun before it is asked for, and all happens here.

    Args:
        function: of one input.
        inputs: any number of them.
        threads: that run it.
        meanwhile: called once, when the first ones have begun.
    """
    if threads == 0:
        for value in inputs:
            future = Future()
            _run(future, function, value)
            yield future
        return
    inputs = iter(inputs)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(function, value) for value in islice(inputs, threads))
        try:
            meanwhile()
            for value in inputs:
                waiting.append(pool.submit(function, value))
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
