"""Generated windows as numbers: the levels of the files, their dB, and whose they are, as step 5 reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.arrays import open_arrays
from LightningDiT.tools import export_windows

LEVELS = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    for name, pixels in (("ID_10/000.png", LEVELS), ("ID_2/000.png", LEVELS[::-1]), ("ID_2/001.png", LEVELS.T)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_levels_and_names_are_those_of_the_files(samples: Path, tmp_path: Path) -> None:
    file = tmp_path / "windows.npz"
    for _ in range(2):  # its own file is written again
        assert export_windows.main(["--samples", str(samples), "--output", str(file)]) == 0
    read = open_arrays(file)
    assert read.windows.dtype == np.float32 and read.windows.shape == (3, 8, 8)
    np.testing.assert_allclose(read.windows[0], LEVELS[::-1] / 65535, atol=1e-7)
    np.testing.assert_allclose(read.windows[2], LEVELS / 65535, atol=1e-7)
    assert read.columns["person"] == ["ID_2", "ID_2", "ID_10"]  # in natural order
    assert read.columns["number"] == ["1", "2", "3"] and read.columns["condition"] == ["", "", ""]


def test_db_range_gives_db(samples: Path, tmp_path: Path) -> None:
    file = tmp_path / "windows.npz"
    export_windows.main(["--samples", str(samples), "--output", str(file), "--db-range", "-45", "5"])
    np.testing.assert_allclose(open_arrays(file).windows[2], -45 + 50 * (LEVELS / 65535), atol=1e-5)


def test_8_bits_are_levels_too(samples: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(samples / "ID_10/000.png")
    export_windows.main(["--samples", str(samples), "--output", str(tmp_path / "windows.npz")])
    np.testing.assert_allclose(open_arrays(tmp_path / "windows.npz").windows[2], 0.2, atol=1e-7)


def test_what_is_wrong_is_named(samples: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, images=np.zeros(3))
    before = foreign.read_bytes()
    with pytest.raises(LightningDiTError, match=r"foreign\.npz"):
        export_windows.main(["--samples", str(samples), "--output", str(foreign)])
    assert foreign.read_bytes() == before
    with pytest.raises(LightningDiTError, match="holds no folder of a person with generated windows; fix: generate"):
        export_windows.main(["--samples", str(samples / "ID_2"), "--output", str(tmp_path / "a.npz")])
    Image.fromarray(LEVELS[:4]).save(samples / "ID_10/000.png")
    with pytest.raises(LightningDiTError, match=r"has the shape \(4, 8\), \(8, 8\) is expected"):
        export_windows.main(["--samples", str(samples), "--output", str(tmp_path / "a.npz")])
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a.npz", "--db-range", "0", "-45"], "--db-range takes the lower value first, 0 -45 given"),
        (["--output", "a.npy"], "--output takes a file that ends in .npz, a.npy given"),
    ],
)
def test_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export_windows.parse(["--samples", "folder", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
