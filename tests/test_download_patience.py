"""The least speed of a download, on a clock of the test."""

from __future__ import annotations

import pytest

from setup_steps import downloads
from setup_steps.downloads import Patience


def test_each_window_needs_its_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand bytes buy the first second and no later one; of the ten that the next one needs come three."""
    clock = iter([0.0, 0.5, 1.1, 1.3, 2.2])
    monkeypatch.setattr(downloads.time, "monotonic", lambda: next(clock))
    floor = downloads._Floor(Patience(window=1.0, floor=10.0))
    for amount in (1000, 1, 1):
        floor.count(amount)
    with pytest.raises(downloads._TryAgainError, match="only 3 B came in 1 s"):
        floor.count(2)
