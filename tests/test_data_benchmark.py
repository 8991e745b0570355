"""The benchmark of the readers: the way it compares with reads the same rows, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from LightningDiT.data.shards import LatentShards, shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from studies.data_benchmark import PUBLISHED, FilePerSample, main, measure, readers_of, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 5 and 4 latents, numbered through; mirrored ones are 100 higher."""
    for index, numbers in enumerate((torch.arange(5), torch.arange(5, 9))):
        latents = numbers.float().view(-1, 1, 1, 1).expand(-1, 2, 2, 2)
        write_shard(shard_path(tmp_path, 0, index), latents, numbers, latents + 100)
    return tmp_path


def test_a_file_opened_per_sample_gives_the_rows_of_the_files(folder: Path) -> None:
    latents, labels = FilePerSample(folder).batch(torch.tensor([8, 0, 5]), torch.tensor([False, True, True]))
    assert latents[:, 1, 0, 1].tolist() == [8, 100, 105]
    assert labels.tolist() == [8, 0, 5]


def test_all_readers_are_measured_on_the_same_batches(folder: Path) -> None:
    rows = measure(readers_of(folder, 4), 9, 4, rounds=3)
    assert [row.name for row in rows] == list(readers_of(folder, 4))
    assert rows[0].ratio == 1.0
    assert all(row.seconds > 0 and row.ratio > 0 for row in rows)
    assert len(table(rows)) == 2 + 3


def test_a_reader_that_gives_other_latents_is_found(folder: Path) -> None:
    plain, shards = FilePerSample(folder), LatentShards(folder)
    readers = {PUBLISHED: lambda: plain.batch, "wrong": lambda: lambda indices, flips: shards.batch(indices, ~flips)}
    with pytest.raises(LightningDiTError, match="wrong: other latents than"):
        measure(readers, 9, 4, rounds=1)


def test_a_batch_larger_than_all_shards_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--shards", "2", "--shard-size", "6", "--batch", "8", "13"])
    assert stopped.value.code == 2
    assert "--batch 13 is more than the 12 latents of all shards" in capsys.readouterr().err


def test_the_command_writes_shards_reads_them_and_gives_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--shards", "2", "--shard-size", "6", "--batch", "8", "12", "--rounds", "1"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| reader | batch |")
    assert [line.split(" | ")[1] for line in lines[-6:]] == ["8"] * 3 + ["12"] * 3
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    assert main([*options, "--output", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| a file opened per sample |") == 2
    assert "old" not in text
