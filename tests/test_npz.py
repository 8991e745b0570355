"""The sample file of ADM's evaluation: its layout, its size in memory, and what it refuses."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT import files
from LightningDiT.data.image_sets import Classes, FileImages
from LightningDiT.data.npz import NpzImages, reading, write_npz
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import save_png


def save_images(folder: Path, pixels: np.ndarray, labels: list[int], repeats: int = 1) -> FileImages:
    files = [save_png(Image.fromarray(image), folder / f"{index:06d}.png") for index, image in enumerate(pixels)]
    return FileImages("run", files * repeats, Classes(torch.tensor(labels)))


def nothing() -> None:
    """Take no note of an image that is in."""


def test_it_is_what_savez_writes(tmp_path: Path) -> None:
    """ADM's `np.savez(path, images, labels)`, against the file written in a stream."""
    pixels = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    labels = [3, 1, 4, 1, 5]
    counted: list[int] = []
    images = save_images(tmp_path, pixels, labels)
    write_npz(images, 8, tmp_path / "streamed.npz", lambda: counted.append(1))
    np.savez(tmp_path / "whole.npz", pixels, np.array(labels, dtype=np.int64))
    assert len(counted) == 5
    streamed, whole = (np.load(tmp_path / name) for name in ("streamed.npz", "whole.npz"))
    assert streamed.files == whole.files == ["arr_0", "arr_1"]
    for name in whole.files:
        assert streamed[name].dtype == whole[name].dtype
        np.testing.assert_array_equal(streamed[name], whole[name])
    with zipfile.ZipFile(tmp_path / "streamed.npz") as one, zipfile.ZipFile(tmp_path / "whole.npz") as other:
        assert one.testzip() is None
        for member in other.namelist():
            assert one.read(member) == other.read(member)


def test_memory_holds_a_few_images_at_a_time(tmp_path: Path) -> None:
    side, count = 128, 100
    images = save_images(tmp_path, np.zeros((1, side, side, 3), np.uint8), [0] * count, count)
    tracemalloc.start()
    try:
        write_npz(images, side, tmp_path / "all.npz", nothing)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * side * side * 3  # all of them are 100 times that of one
    assert np.load(tmp_path / "all.npz")["arr_0"].shape == (count, side, side, 3)


@pytest.mark.parametrize("name", ["manifest.json", "000000.png", "config.yaml", "samples.npz", "zipped.npz"])
def test_a_file_of_someone_else_is_not_replaced(name: str, tmp_path: Path) -> None:
    """The run's own manifest, an image of it and a configuration are no target; nor is a foreign archive."""
    images = save_images(tmp_path / "run", np.zeros((1, 8, 8, 3), np.uint8), [0])
    target = tmp_path / "run" / name
    if name == "zipped.npz":
        np.savez(target, np.zeros(3))
    elif not target.exists():
        target.write_text("precious")
    before = target.read_bytes()
    with pytest.raises(LightningDiTError, match=rf"{name} (is to be an .npz file|cannot be written .this program did)"):
        write_npz(images, 8, target, nothing)
    assert target.read_bytes() == before
    write_npz(images, 8, tmp_path / "new.npz", nothing)
    write_npz(images, 8, tmp_path / "new.npz", nothing)  # an own one
    target.write_bytes(b"")
    if target.suffix == ".npz":
        write_npz(images, 8, target, nothing)  # an empty one


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".all.npz.12345678{files.UNFINISHED}").touch()
    os.utime(tmp_path / f".all.npz.12345678{files.UNFINISHED}", (0, 0))
    write_npz(save_images(tmp_path / "run", np.zeros((1, 8, 8, 3), np.uint8), [0]), 8, tmp_path / "all.npz", nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "run"]


def test_a_target_that_is_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "all.npz").mkdir()
    with pytest.raises(LightningDiTError, match=r"all.npz is a folder"):
        write_npz(save_images(tmp_path, np.zeros((1, 8, 8, 3), np.uint8), [0]), 8, tmp_path / "all.npz", nothing)
    assert not list(tmp_path.glob(".all.npz*"))


def test_an_image_that_is_no_whole_image_of_the_run_is_named(tmp_path: Path) -> None:
    images = save_images(tmp_path, np.full((3, 8, 8, 3), 200, np.uint8), [0, 1, 2])
    file = images.files[1]
    write_npz(images, 8, tmp_path / "all.npz", nothing)
    good = (tmp_path / "all.npz").read_bytes()
    whole = file.read_bytes()
    save_png(Image.new("RGB", (9, 7)), file)
    with pytest.raises(LightningDiTError, match=r"000001.png has 9x7 pixels, 8x8 expected; fix: delete it"):
        write_npz(images, 8, tmp_path / "all.npz", nothing)
    for damaged in (whole[:40], b"no picture"):
        file.write_bytes(damaged)
        with pytest.raises(LightningDiTError, match=r"000001.png is no whole image .*; fix: delete it"):
            write_npz(images, 8, tmp_path / "all.npz", nothing)
    file.unlink()
    with pytest.raises(LightningDiTError, match=r"000001.png is no whole image"):
        write_npz(images, 8, tmp_path / "all.npz", nothing)
    assert (tmp_path / "all.npz").read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))


def test_images_are_read_in_any_order_from_a_stream(tmp_path: Path) -> None:
    """Forwards, over a gap, and back, from a plain archive and from a compressed one."""
    pixels = np.random.RandomState(0).randint(0, 256, (6, 4, 8, 3)).astype(np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", pixels, np.array([5, 4, 3, 2, 1, 0]))
        images = NpzImages(tmp_path / "a.npz")
        for numbers in ([0, 1], [4, 5], [2], [5, 0, 3]):
            batch = images.batch(numbers)
            np.testing.assert_array_equal(batch.pixels.permute(0, 2, 3, 1).numpy(), pixels[numbers])
            assert batch.labels.tolist() == [5 - number for number in numbers]
        parts = [batch.pixels for batch in images.batches(range(6), 4)]
        np.testing.assert_array_equal(torch.cat(parts).permute(0, 2, 3, 1).numpy(), pixels)


# ---- damage


def npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": kind, "fortran_order": False, "shape": shape})
    return content.getvalue()


PIXELS = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3)).astype(np.uint8)
IMAGES = npy(PIXELS)


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytearray:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return bytearray(content.getvalue())


def flipped(method: int) -> bytearray:
    """Bits of a packed member are flipped, 60 bytes behind the start of the file: beyond its local header."""
    content = packed({"arr_0.npy": IMAGES}, method)
    content[60:160] = bytes(value ^ 255 for value in content[60:160])
    return content


def in_both_headers(offset: int, value: int) -> bytearray:
    """A field of the local header (30 bytes) and of the central one, which lies 2 bytes further in, is changed."""
    content = packed({"arr_0.npy": IMAGES})
    content[offset] = content[content.find(b"PK\x01\x02") + offset + 2] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (flipped(zipfile.ZIP_DEFLATED), "Error -3 while decompressing|Bad CRC"),
        (flipped(zipfile.ZIP_BZIP2), "Invalid data stream"),
        (flipped(zipfile.ZIP_LZMA), "Corrupt input data|Invalid or unsupported|Bad CRC"),
        (in_both_headers(6, 1), "is encrypted"),
        (in_both_headers(8, 77), "compression method is not supported"),
        (packed({"arr_0": IMAGES}), "no item named 'arr_0.npy'"),
        (packed({"arr_1.npy": IMAGES}), "no item named 'arr_0.npy'"),
        (packed({"arr_0.npy": b"\x93NUMPY\x09\x00" + IMAGES[8:]}), r"version \(9, 0\) of the format is unknown"),
        (packed({"arr_0.npy": IMAGES[:-1]}), r"claims uint8 \(4, 8, 8, 3\), 768 bytes, and 767 are there"),
        (packed({"arr_0.npy": header((10**18, 8, 8, 3))}), r"claims uint8 \(10{18}, 8, 8, 3\), 1920{18} bytes, and 0"),
        (
            packed({"arr_0.npy": IMAGES, "arr_1.npy": header((6 * 10**9,), "<i8")}),
            r"claims int64 \(60{9},\), 480{9} bytes",
        ),
        (packed({"arr_0.npy": header((4, 0, 0, 3))}), "uint8 .N, H, W, 3. in C order is expected"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytearray, words: str, tmp_path: Path) -> None:
    """Whatever the readers of zlib, bzip2, lzma, zip and NumPy raise; and nothing of a header's size is allocated."""
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    with pytest.raises(LightningDiTError, match=rf"a\.npz(?:: arr_0 is| is no whole .npz file) .*(?:{words})"):
        list(NpzImages(file).batches(range(4), 4))


def test_a_directory_that_claims_more_than_an_archive_can_hold_is_refused(tmp_path: Path) -> None:
    """The unpacked bytes in the central header: a stored member has its own, a deflated one 1032 times that at most."""
    for method, ratio in ((zipfile.ZIP_STORED, 1), (zipfile.ZIP_DEFLATED, 1032)):
        content = packed({"arr_0.npy": header((10**7, 8, 8, 3)) + IMAGES[-768:]}, method)
        at = content.find(b"PK\x01\x02")
        held = int.from_bytes(content[at + 20 : at + 24], "little")
        content[at + 24 : at + 28] = (1_920_000_128).to_bytes(4, "little")
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(LightningDiTError, match=f"claims 1920000128 bytes, and {held * ratio} are the most"):
            NpzImages(tmp_path / "a.npz")


def test_memory_that_ran_out_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), reading(tmp_path / "a.npz"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
