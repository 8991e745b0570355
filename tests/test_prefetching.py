"""Work ahead of its use: order, errors, how much is held, and jumps between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from LightningDiT.data.prefetching import StepPrefetcher, one_ahead, prefetched


def test_results_come_in_order_and_errors_at_their_turn() -> None:
    """Later items are done first; the third one fails."""
    done = []

    def work(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0.0)
        done.append(item)
        if item == 2:
            raise ValueError("two")
        return 10 * item

    results = prefetched(work, range(6), workers=3)
    assert [next(results), next(results)] == [0, 10]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert set(done) <= set(range(6))
    assert list(prefetched(work, [], workers=2)) == []


@pytest.mark.parametrize(("ahead", "most"), [(None, 3), (0, 1), (5, 6)])
def test_no_more_results_than_asked_for_are_held(ahead: int | None, most: int) -> None:
    started = []
    results = prefetched(started.append, range(100), workers=2, ahead=ahead)
    next(results)
    results.close()
    assert 1 <= len(started) <= most  # those that are held ahead, and the one that was taken


def test_worker_processes_serve_as_threads_do() -> None:
    assert list(prefetched(abs, [-1, 2, -3], workers=1, pool=ProcessPoolExecutor)) == [1, 2, 3]


def test_an_iterator_is_one_ahead_of_its_use() -> None:
    started = []

    def results() -> Iterator[int]:
        for number in range(4):
            started.append(number)
            yield number
        raise ValueError("four")

    ahead = one_ahead(results())
    assert next(ahead) == 0
    deadline = time.monotonic() + 30
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert started == [0, 1]
    assert [next(ahead) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="four"):
        next(ahead)
    assert list(one_ahead(iter([5, 6]))) == [5, 6]


def test_a_jump_to_another_step_starts_a_new_stream() -> None:
    started = []

    def stream(step: int) -> Iterator[int]:
        started.append(step)
        for number in range(step, 8):
            if number == 5:
                raise ValueError("five")
            yield 10 * number

    steps = StepPrefetcher(stream)
    assert [steps.at(step) for step in (2, 3, 4, 3, 4)] == [20, 30, 40, 30, 40]
    assert started == [2, 3]
    with pytest.raises(ValueError, match="five"):
        steps.at(5)
    assert steps.at(6) == 60
    assert started == [2, 3, 6]
