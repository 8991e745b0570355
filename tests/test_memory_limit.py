"""Memory that runs out: half the batch, the same images, and more again later."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.errors import LightningDiTError, is_out_of_memory
from LightningDiT.sampling.memory_limit import GOOD_BATCHES, BatchLimit
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.resumable_run import sample_run
from LightningDiT.sampling.solver_choice import Solver

NEVER_THERE = 2**59  # bytes


def fail_to_allocate() -> None:
    """Ask torch for memory that no machine has."""
    torch.empty(NEVER_THERE, dtype=torch.uint8)


class SmallMemory:
    """Makes a pipeline fail by a real allocation, after the steps, where more than `most` images come at once.

    Attributes:
        seen: the number of images of every batch, those that failed included.
    """

    def __init__(self, pipe: LightningDiTPipeline, most: int) -> None:
        self.most, self.seen, self._plain = most, list[int](), pipe._solve
        pipe._solve = self._solve

    def _solve(self, solver: Solver, labels: list[int], *inputs: Any) -> Any:
        self.seen.append(len(labels))
        result = self._plain(solver, labels, *inputs)
        if len(labels) > self.most:
            fail_to_allocate()
        return result


@pytest.fixture
def pipe(tiny_source: Path) -> LightningDiTPipeline:
    return LightningDiTPipeline.from_config(tiny_source / "config.yaml", device="cpu")


def refuse(limit: BatchLimit, images: int) -> None:
    with pytest.warns(UserWarning, match=f"memory ran out with {images} images at once"):
        limit.halve(images, RuntimeError("no memory"))


def test_what_torch_says_without_memory_is_known_and_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        fail_to_allocate()
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as numpys:
        np.empty(NEVER_THERE, dtype=np.uint8)
    assert is_out_of_memory(numpys.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(shapes.value)
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_the_batch_is_halved_and_doubles_after_good_ones() -> None:
    limit = BatchLimit()
    assert limit.of(12) == 12
    refuse(limit, 12)
    refuse(limit, 6)
    assert limit.of(12) == 3
    for _ in range(2 * GOOD_BATCHES):  # twice as patient after the second failure
        assert limit.of(12) == 3
        limit.count_success()
    assert limit.of(12) == 6
    refuse(limit, 6)
    for _ in range(4 * GOOD_BATCHES):
        assert limit.of(12) == 3
        limit.count_success()
    for _ in range(4 * GOOD_BATCHES):
        assert limit.of(12) == 6
        limit.count_success()
    assert limit.of(12) == 12


def test_other_errors_pass_and_change_nothing(pipe: LightningDiTPipeline) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pipe([0, 1], callback=lambda step, t, state: torch.ones(2, 3) @ torch.ones(2, 3))
    assert pipe.batch_limit.of(12) == 12


def test_no_noise_and_no_label_change_where_memory_runs_out(pipe: LightningDiTPipeline) -> None:
    labels = [0, 1, 2, 0, 1, 2, 0]
    whole = pipe(labels, seed=3, batch_size=7, output_type="np").images.astype(int)
    memory = SmallMemory(pipe, 2)
    with pytest.warns(UserWarning, match="going on with 3") as warned:
        out = pipe(labels, seed=3, batch_size=7, output_type="np")
    assert np.abs(out.images.astype(int) - whole).max() <= 1
    assert out.labels == labels
    assert out.seeds == [(3, index) for index in range(7)]
    assert out.nfe == 3
    assert [str(warning.message)[-1] for warning in warned] == ["3", "1"]
    assert memory.seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_run_goes_on_with_smaller_batches_and_larger_ones_later(pipe: LightningDiTPipeline, tmp_path: Path) -> None:
    labels = [index % 3 for index in range(40)]
    whole = sample_run(pipe, labels, 1, tmp_path / "whole", None)
    memory = SmallMemory(pipe, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = sample_run(pipe, labels, 1, tmp_path / "broken", None)
        memory.most = 2  # it ran out at the start, after 8 and after 16 more; 16 of the next 32 are done
        for path in broken.paths[:24]:
            path.unlink()
        sample_run(pipe, labels, 1, tmp_path / "broken", None)
    assert memory.seen[-20:] == [1] * 16 + [2] * 4
    for one, other in zip(whole.paths, broken.paths, strict=True):
        assert np.abs(np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))).max() <= 1


def test_one_image_that_does_not_fit_is_one_line(pipe: LightningDiTPipeline) -> None:
    SmallMemory(pipe, 0)
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(LightningDiTError, match=r"does not hold one image .*; fix: close other programs"),
    ):
        pipe([0, 1], batch_size=2)
