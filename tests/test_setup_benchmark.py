"""The benchmark of the set-up on small files: what it measures is what it says."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from setup_steps import checks
from studies import setup_benchmark


@pytest.mark.skipif(
    not shutil.which("curl") or not sys.platform.startswith("linux"), reason="measures beside curl, through /proc"
)
def test_a_download_is_measured_beside_curl_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        setup_benchmark.main(["--only", "download", "--size", "20000000", "--rounds", "2", "--folder", str(tmp_path)])
        == 0
    )
    said = capsys.readouterr().out
    assert re.search(r"curl +\d+\.\d\d s .*/s  1\.00 of curl's rate", said)
    assert re.search(r"step 2, hashed, with fsync +\d+\.\d\d s .*/s  \d+\.\d\d of curl's rate", said)
    assert "the server was asked from byte 10000000 of 20000000" in said
    # Once, and some modules that are imported on the way.
    assert re.search(r"10\.\d MB were read from the disk, 1\.0\d times the part", said)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_is_measured_beside_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "published_table", lambda section: {"a": (50, 100), "b": (7,)})
    assert setup_benchmark.main(["--only", "conversion", "--rounds", "1", "--folder", str(tmp_path)]) == 0
    rows = re.findall(r"(copy|--convert \w+) +\d+\.\d\d s .*/s  \d+\.\d\d of copy's rate", capsys.readouterr().out)
    assert rows == ["copy", "--convert fp32", "--convert bf16", "--convert fp16"]
    assert list(tmp_path.iterdir()) == []


def test_without_curl_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LightningDiTError, match="curl is not on this machine"):
        setup_benchmark.main(["--folder", str(tmp_path)])
