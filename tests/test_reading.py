"""Processes that read images: the same pixels and reasons as without them, and their end in every case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.data import reading
from LightningDiT.data.image_sets import FileImages, Unreadable
from LightningDiT.data.reading import ReadingProcesses
from LightningDiT.errors import LightningDiTError

NAMES = ("plain.png", "two\nlines.png", "猫 ñ.jpg", os.fsdecode(b"not utf-8 \xff.png"), "broken.png", "none.png")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Images of 40x30 pixels under odd names, a file that is none, and a missing one."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(NAMES), 30, 40, 3), np.uint8)
    for name, values in zip(NAMES[:4], pixels, strict=False):
        try:
            Image.fromarray(values).save(tmp_path / name)
        except (OSError, ValueError):  # a system that allows no such names; the file is then missing for both
            continue
    (tmp_path / NAMES[4]).write_bytes(b"no image")
    return [tmp_path / name for name in NAMES]


@pytest.mark.parametrize("count", [1, 3])
def test_processes_read_what_the_program_itself_does(count: int, files: list[Path]) -> None:
    images = FileImages("files", files).cropped(16)
    expected = images.batch(range(len(files)), Unreadable.BLACK)
    assert not expected.read[-2:].any()
    with ReadingProcesses(count) as processes:
        (found,) = images.read_by(processes).batches(range(len(files)), 8, Unreadable.BLACK)
        whole, cut = processes.read(files[0], None)
    assert found.unreadable == expected.unreadable
    for name in ("pixels", "labels", "read", "cut"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (whole.shape, cut) == ((30, 40, 3), 0.0)
    np.testing.assert_array_equal(whole, np.asarray(Image.open(files[0])))


def test_a_process_that_was_killed_is_one_line(files: list[Path]) -> None:
    with ReadingProcesses(1) as processes:
        processes.read(files[0], 16)
        (process,) = processes._started
        process.kill()
        with pytest.raises(LightningDiTError, match=r"plain.png has ended \(exit code -?\d+\); fix: run the same comm"):
            processes.read(files[0], 16)


def test_processes_end_with_the_context_and_with_their_input(files: list[Path]) -> None:
    with ReadingProcesses(2) as processes:
        assert processes._started == []  # none is needed yet
        processes.read(files[0], 16)
    assert [process.poll() is not None for process in processes._started] == [True]
    command = [sys.executable, "-c", reading.SERVE, str(reading.ROOT), *sys.path]
    answer = subprocess.run(command, input=b'["none.png", 4, "crop"]\n', capture_output=True, check=True, timeout=60)
    assert b'{"unreadable": "' in answer.stdout
    assert answer.stderr == b""


def test_too_little_memory_is_no_damage_of_an_image(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "def read_image(file): raise MemoryError('no room')\nreading.read_image = read_image; reading.serve()"
    monkeypatch.setattr(reading, "SERVE", reading.SERVE.replace("reading.serve()", "exec('''" + broken + "''')"))
    with ReadingProcesses(1) as processes, pytest.raises(MemoryError, match="no room"):
        processes.read(files[0], 16)


def test_a_process_starts_without_torch() -> None:
    """Which takes seconds and hundreds of megabytes in each of sixteen."""
    code = "import sys; sys.path[:] = sys.argv[1:]; import LightningDiT.data.reading; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(reading.ROOT), *sys.path]
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.split() == [b"False"]


def test_a_python_that_prints_at_its_start_does_no_harm(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SERVE", f"print('hello'); {reading.SERVE}")
    with ReadingProcesses(1) as processes:
        assert processes.read(files[0], 16)[0].shape == (16, 16, 3)


def test_a_python_that_is_not_there_is_said(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/none/python")
    with ReadingProcesses(1) as processes, pytest.raises(LightningDiTError, match="no process that reads images start"):
        processes.read(files[0], 16)
