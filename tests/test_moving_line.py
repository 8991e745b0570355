"""The line that moves while a notebook samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from LightningDiT.console import Progress
from LightningDiT.sampling import moving_line
from LightningDiT.sampling.pipeline import LightningDiTPipeline

LINE = "LightningDiT.sampling.moving_line"


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """How far each line came, and of how much, in the kernel of a notebook."""
    seen: list[tuple[float, int]] = []
    monkeypatch.setattr(f"{LINE}.in_notebook", lambda: True)
    monkeypatch.setattr(Progress, "reach", lambda self, done, note="": seen.append((done, self.total)))
    return seen


def test_a_call_in_a_notebook_shows_the_steps_of_its_batches(
    tiny_folder: Path, reached: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three images by three steps of euler, two images at once."""
    pipe = LightningDiTPipeline.from_config(tiny_folder / "config.yaml")
    images = pipe([0, 1, 2], output_type="np").images
    assert reached == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    reached.clear()
    seen: list[int] = []
    own = pipe([0, 1, 2], output_type="np", callback=lambda step, t, state: seen.append(step)).images
    assert (seen, reached) == ([0, 1, 2, 0, 1, 2], [])
    monkeypatch.setattr(f"{LINE}.in_notebook", lambda: False)
    plain = pipe([0, 1, 2], output_type="np").images
    assert reached == []
    assert np.array_equal(images, own)
    assert np.array_equal(images, plain)


def test_a_run_shows_its_own_progress(tiny_folder: Path, reached: list[tuple[float, int]]) -> None:
    pipe = LightningDiTPipeline.from_config(tiny_folder / "config.yaml")
    with pipe.settled(pipe.plan(1, 1), "a test"):
        pipe(0)
    assert reached == []


def test_a_batch_that_is_sampled_again_counts_once(reached: list[tuple[float, int]]) -> None:
    """Of four images of two steps, memory ran out behind the first step: two halves follow."""
    with moving_line.moving_line(4, 2, None) as watch:
        assert watch is not None
        for step, count in ((0, 4), (0, 2), (1, 2), (0, 2), (1, 2), (0, 2)):
            watch(step, 0.5, torch.zeros(count, 1))
    assert [done for done, _ in reached] == [4, 2, 4, 6, 8, 8]
