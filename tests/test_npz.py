"""The sample file of ADM's evaluation: its layout, its size in memory, and what it refuses."""

from __future__ import annotations

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
from LightningDiT.data.npz import NpzImages, write_npz
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
