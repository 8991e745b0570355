"""The bootstrap beside the truth: a row by hand, and the table of a small run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from LightningDiT.metrics.scores import Score
from studies import bootstrap_study
from tests.conftest import write_idx


def test_a_row_of_the_table() -> None:
    scores = [Score(1.0, 0.5, 2.5, 0.25), Score(3.0, 2.25, 4.25, 0.75)]
    # mean 2, 0.5 above the limit 1.5; mean bias 0.5; quantiles of two values lie 0.95 of their distance apart
    assert bootstrap_study.row_of(200, scores, 1.5) == ["200", "2", "0.5", "0.5", "1.9", "2", "50%"]


def test_a_small_run_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prefix, count in (("train", 30), ("t10k", 20)):
        photographs = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", photographs)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    options = ["--counts", "5", "10", "--sets", "3", "--resamples", "4", "--output", str(tmp_path / "out")]
    assert bootstrap_study.main(["--data-root", str(tmp_path), *options]) == 0
    rows = capsys.readouterr().out.splitlines()[-4:]
    assert [row.count("|") for row in rows] == [8, 8, 8, 8]
    assert [row.split()[1] for row in rows[2:]] == ["5", "10"]
    # a set is a part of the training images, and its distance is larger than theirs
    assert all(float(row.split("|")[3]) > 0 for row in rows[2:])
