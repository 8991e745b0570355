"""Work that threads do ahead of its use, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Generic[Item, Result]):
    """What `work` gives for each of `items`, in their order, made by `threads` while earlier results are used.

    At most `threads` + 1 results are held at once. What `work` raises is raised at its place.

    Attributes:
        waited: seconds that was waited for results which were not made yet.
    """

    def __init__(self, work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> None:
        self.waited = 0.0
        self._work, self._items, self._threads = work, items, threads

    def __iter__(self) -> Iterator[Result]:
        pending: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for item in self._items:
                    pending.append(pool.submit(self._work, item))
                    if len(pending) > self._threads:
                        yield self._wait(pending.popleft())
                while pending:
                    yield self._wait(pending.popleft())
            finally:
                for future in pending:
                    future.cancel()

    def _wait(self, future: Future[Result]) -> Result:
        started = time.perf_counter()
        result = future.result()
        self.waited += time.perf_counter() - started
        return result
