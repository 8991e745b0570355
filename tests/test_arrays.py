"""Arrays of spectrograms: what files hold, native columns, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar import arrays
from LightningDiT.radar.arrays import fitted, native_columns, open_arrays, read_raw, sample_columns, save_levels
from tests.walkers import NATIVE, scroll, windows_of


def test_values_of_each_kind_of_file_come_back(tmp_path: Path) -> None:
    values = np.linspace(-60, 0, 12, dtype=np.float32).reshape(1, 3, 4)
    np.save(tmp_path / "one.npy", values[0])
    np.savez(tmp_path / "many.npz", x=np.repeat(values, 2, 0), person=["a", "b"], number=[4, 5])
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(tmp_path / "many.mat", {"S": values, "fs": 1000.0, "number": [[7]]})
    assert open_arrays(tmp_path / "one.npy").single
    many = open_arrays(tmp_path / "many.npz")
    assert many.columns == {"person": ["a", "b"], "number": ["4", "5"]}
    assert open_arrays(tmp_path / "many.mat").columns == {"number": ["7"]}
    scipy_io.savemat(tmp_path / "last.mat", {"S": np.stack([values[0], 2 * values[0]], 2)})
    assert len(open_arrays(tmp_path / "last.mat").windows) == 2
    for name, index in (("one.npy", None), ("many.npz", 1), ("many.mat", 0), ("last.mat", 0)):
        raw = read_raw(tmp_path / name, index)
        assert raw.in_db
        assert np.array_equal(raw.values, values[0])


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("npy", np.zeros((2, 3, 4), complex), "complex"),
        ("npy", np.zeros((2, 3, 4, 5)), "shape"),
        ("npy", np.zeros(3), "0 arrays"),
        ("npy", np.array([[{}]], object), "pickle|object"),
        ("npz", {"a": np.zeros((2, 2)), "b": np.zeros((2, 2))}, "2 arrays"),
        ("npz", {"a": np.zeros((2, 2, 2)), "person": ["x"]}, "1 values for 2 windows"),
    ],
)
def test_arrays_that_are_no_windows_are_refused(kind: str, values: object, reason: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    np.savez(file, **values) if isinstance(values, dict) else np.save(file, values)
    with pytest.raises(ValueError, match=reason):
        open_arrays(file)


@pytest.mark.parametrize("ending", arrays.ARRAYS)
def test_bytes_that_are_no_array_are_refused(ending: str, tmp_path: Path) -> None:
    if ending == ".mat":
        pytest.importorskip("scipy")
    file = tmp_path / f"a{ending}"
    for content in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04 and nothing", b"x" * 300):
        file.write_bytes(content)
        open_arrays.cache_clear()
        with pytest.raises((OSError, ValueError)):
            open_arrays(file)


def test_without_scipy_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    (tmp_path / "a.mat").write_bytes(b"MATLAB 5.0")
    open_arrays.cache_clear()
    with pytest.raises(LightningDiTError, match=r"scipy, which computes .* is missing .*; fix: pip install scipy"):
        open_arrays(tmp_path / "a.mat")


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_images_keep_their_depth(bits: int, tmp_path: Path) -> None:
    levels = np.array([[0, 1, 2, 2**bits - 1]])
    file = tmp_path / "a.png"
    Image.fromarray(levels.astype(np.uint16 if bits == 16 else np.uint8)).save(file)
    assert read_raw(file, None).values == pytest.approx(levels / (2**bits - 1))
    written = np.array([[0.0, 0.25, 1.0]], np.float32)
    save_levels(written, tmp_path / "b.png")
    assert read_raw(tmp_path / "b.png", None).values == pytest.approx(written, abs=1 / 65535)


@pytest.mark.parametrize("way", arrays.WAYS)
@pytest.mark.parametrize("count", [NATIVE, 55])
def test_native_columns_are_found_and_taken(way: str, count: int) -> None:
    """The enlarged window returns the columns that it was made of."""
    native, wide = [scroll(seed, count) for seed in range(3)], []
    for levels in native:
        if way in arrays.CENTRED:
            again = np.asarray(Image.fromarray(levels).resize((200, len(levels)), arrays.CENTRED[way]))
        else:
            at = np.linspace(0, count - 1, 200)
            at = np.rint(at) if way.startswith("nearest") else at
            again = np.stack([np.interp(at, np.arange(count), row) for row in levels]).astype(np.float32)
        wide.append(again)
    found = native_columns(wide)
    assert found is not None
    assert found.count == count
    assert (found.way in arrays.ON_ENDS) == (way in arrays.ON_ENDS)
    # a place between two pixels is not met exactly
    assert np.abs(sample_columns(wide[0], count, found.way) - native[0]).mean() < 0.02


def test_windows_that_were_not_enlarged_have_no_native_columns() -> None:
    assert native_columns([scroll(seed, 200) for seed in range(3)]) is None
    assert native_columns([scroll(0, 8)]) is None


def test_no_size_cuts_an_end_off() -> None:
    levels = np.zeros((128, 200), np.float32)
    levels[:, :20], levels[:, -20:] = 1.0, 0.5
    small = fitted(levels, (64, 64), "resize")
    assert small.shape == (64, 64)
    assert small[:, 0] == pytest.approx(1.0, abs=0.01)
    assert small[:, -1] == pytest.approx(0.5, abs=0.01)
    padded = fitted(levels, (64, 64), "pad")
    assert padded.shape == (64, 64)
    assert padded[:40, 63] == pytest.approx(0.5, abs=0.02)  # 128 x 200 is 40 x 64 here
    assert not padded[41:].any()
    assert fitted(windows_of(0, 1)[0], (128, NATIVE), "resize") is not None
