"""Results computed ahead of their use, in order, by threads or processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetched(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int | None = None,
    pool: Callable[[int], Executor] = ThreadPoolExecutor,
) -> Iterator[Result]:
    """Yield `work(item)` for each item in order, computed by `workers` while earlier results are used.

    An exception of `work` is raised when its item's turn comes.

    Args:
        ahead: how many results may exist beyond the one in use; by default one a worker.
        pool: makes the executor of a number of workers; `ProcessPoolExecutor` serves where `work`, items and results
            can be pickled.
    """
    pending: deque[Future[Result]] = deque()
    with pool(workers) as executor:
        try:
            for item in items:
                pending.append(executor.submit(work, item))
                if len(pending) > (workers if ahead is None else ahead):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def one_ahead(results: Iterator[Result]) -> Iterator[Result]:
    """Yield the results of an iterator; a thread computes the next one while one is used."""
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(next, results, None)
        while (result := coming.result()) is not None:
            coming = executor.submit(next, results, None)
            yield result


class StepPrefetcher(Generic[Result]):
    """The results of a training's steps: each is prefetched while the step before it computes.

    Args:
        stream: step -> the results of that step and of all later ones, see `prefetched`. A jump to another step
            starts a new stream.
    """

    def __init__(self, stream: Callable[[int], Iterator[Result]]) -> None:
        self._stream = stream
        self._results: Iterator[Result] = iter(())
        self._next: int | None = None

    def at(self, step: int) -> Result:
        """Return the result of `step`, which usually follows the step of the last call."""
        if step != self._next:
            self._results = self._stream(step)
        self._next = None  # in case of an exception
        result = next(self._results)
        self._next = step + 1
        return result
