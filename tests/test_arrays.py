"""Arrays of spectrograms: what files hold, native columns, sizes."""

from __future__ import annotations

import io
import zipfile
import zlib
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


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def claiming(shape: tuple[int, ...]) -> bytes:
    """Return the header of an array of float32, and three bytes in place of its values."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return content.getvalue() + b"abc"


WHOLE = npy(np.linspace(0, 1, 2000).reshape(2, 25, 40))


@pytest.mark.parametrize(
    ("name", "content", "method", "changed", "reason"),
    [
        ("w.npy", WHOLE, zipfile.ZIP_STORED, (6, 8), "encrypted"),  # flags: RuntimeError
        ("w.npy", WHOLE, zipfile.ZIP_STORED, (8, 10), "compression method"),  # NotImplementedError
        ("w.npy", WHOLE, zipfile.ZIP_DEFLATED, (60, None), ""),  # zlib.error
        ("w.npy", WHOLE, zipfile.ZIP_LZMA, (50, None), ""),  # LZMAError
        ("w", b"no array", zipfile.ZIP_STORED, None, "magic string"),  # a member that NumPy gives as bytes
        ("w.npy", claiming((10**5, 300, 400)), zipfile.ZIP_STORED, None, "claims float32 .*, 48000000000 bytes, and 3"),
    ],
)
def test_a_damaged_archive_is_one_line(
    name: str, content: bytes, method: int, changed: tuple[int, int | None] | None, reason: str, tmp_path: Path
) -> None:
    """The reasons are those of zipfile and its libraries, each with an exception of another type."""
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    if changed:
        damaged = bytearray(file.read_bytes())
        if changed[1]:
            for at in (changed[0], damaged.find(b"PK\x01\x02") + changed[1]):
                damaged[at] ^= 1
        else:
            damaged[changed[0] : changed[0] + 40] = bytes(byte ^ 255 for byte in damaged[changed[0] : changed[0] + 40])
        file.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"^it is no whole .npz file \(.*{reason}"):
        open_arrays(file)


def test_a_header_that_claims_more_than_the_file_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(claiming((10**5, 300, 400)))
    reason = r"its header claims float32 \(100000, 300, 400\), 48000000000 bytes, and 3 are there"
    with pytest.raises(ValueError, match=reason):
        open_arrays(tmp_path / "a.npy")


def test_a_packed_matlab_file_is_measured_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and not, the same variables have the same bytes: those of the file whose elements are not packed."""
    scipy_io = pytest.importorskip("scipy.io")
    variables, sizes = {"S": np.zeros((30, 40, 50)), "number": np.arange(50.0)}, []
    for packed in (False, True):
        scipy_io.savemat(tmp_path / f"{packed}.mat", variables, do_compression=packed)
        content = (tmp_path / f"{packed}.mat").read_bytes()
        sizes.append(arrays._matlab_bytes(content) - (len(content) if packed else 0))
    assert sizes[0] == (tmp_path / "False.mat").stat().st_size == sizes[1] + 128  # of the header, which is not packed
    assert arrays._unpacked_length(zlib.compress(bytes(10**6)), 10**7) == 10**6
    assert arrays._unpacked_length(zlib.compress(bytes(10**8)), 10**6) < 2 * 10**6
    assert len(open_arrays(tmp_path / "True.mat").windows) == 50
    open_arrays.cache_clear()
    monkeypatch.setattr(arrays, "MOST_BYTES", 2**18)  # the packed file has less, its values have more
    assert (tmp_path / "True.mat").stat().st_size < 2**18 < variables["S"].nbytes
    np.savez_compressed(tmp_path / "a.npz", **variables)
    for name in ("True.mat", "a.npz"):
        with pytest.raises(ValueError, match="^it unpacks to more than 2 GB"):
            open_arrays(tmp_path / name)


@pytest.mark.parametrize(("kind", "mode"), [("jpg", "L"), ("jpg", "RGB"), ("png", "I;16")])
def test_an_orientation_changes_no_pixel_and_is_noted(kind: str, mode: str, tmp_path: Path) -> None:
    values = np.arange(24 * 16).reshape(24, 16) % 251
    image = Image.fromarray(values.astype(np.uint16)) if mode == "I;16" else Image.fromarray(values.astype(np.uint8))
    image, exif = image if mode == "I;16" else image.convert(mode), Image.Exif()
    raws = {}
    for orientation in (None, 1, 6):
        if orientation:
            exif[0x0112] = orientation  # of TIFF 6.0
        file = tmp_path / f"{orientation}.{kind}"
        image.save(file, exif=exif)
        raws[orientation] = read_raw(file, None)
    assert [raw.is_turned for raw in raws.values()] == [False, False, True]
    assert {raw.size for raw in raws.values()} == {(24, 16)}
    assert len({raw.digest for raw in raws.values()}) == 1


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
