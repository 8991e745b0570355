"""Images, shards, and work ahead of its use."""

from __future__ import annotations

import gzip
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST

from LightningDiT.data.images import (
    ImageBatches,
    as_rgb,
    evenly_spaced,
    fashion_mnist,
    holds_fashion_mnist,
    image_files,
    pad_to_32,
    read_image,
    shown,
)
from LightningDiT.data.prefetching import Ahead
from LightningDiT.data.shards import LatentShards, iterate_shards, shard_path, write_shard
from LightningDiT.errors import LightningDiTError


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Twelve small photographs in Fashion-MNIST's files."""
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(12) % 3)
    return tmp_path


def test_idx_files_are_read(fashion_folder: Path) -> None:
    images, labels = fashion_mnist(fashion_folder, train=True)
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    np.testing.assert_array_equal(images.numpy(), expected)
    assert labels.tolist() == [0, 1, 2] * 4
    padded = pad_to_32(images)
    assert padded.shape == (12, 3, 32, 32)
    torch.testing.assert_close(padded[:, 1, 2:-2, 2:-2], images / 127.5 - 1)
    assert (padded[:, :, :2] == -1).all()


def test_a_file_that_is_no_idx_is_named(fashion_folder: Path) -> None:
    (fashion_folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"hello there"))
    with pytest.raises(LightningDiTError, match="is no IDX file"):
        fashion_mnist(fashion_folder, train=True)


@pytest.mark.parametrize("damage", ["junk", "cut", "short", "wide", "labels"])
def test_damaged_fashion_mnist_is_one_line(damage: str, fashion_folder: Path) -> None:
    file = fashion_folder / "train-images-idx3-ubyte.gz"
    if damage == "junk":
        file.write_bytes(b"no gzip")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif damage == "short":
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    elif damage == "wide":
        write_idx(file, np.zeros((12, 28, 30)))
    else:
        write_idx(fashion_folder / "train-labels-idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(LightningDiTError, match=r".*; fix: download Fashion-MNIST again") as caught:
        fashion_mnist(fashion_folder, train=True)
    assert "\n" not in str(caught.value)


def test_a_failed_download_leaves_a_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a folder of images would pass for Fashion-MNIST from then on."""
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(LightningDiTError, match=r"could not be downloaded .*; fix: name a folder") as caught:
            fashion_mnist(folder, train=True)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert not holds_fashion_mnist(tmp_path)


def test_an_image_like_a_thread_is_refused(tmp_path: Path) -> None:
    """Its crop would take 256 x 256 x 257 pixels; up to 256 times as long as wide it is read."""
    for length in (256, 257):
        Image.new("RGB", (1, length)).save(tmp_path / f"{length}.png")
    assert read_image(tmp_path / "256.png").size == (1, 256)
    with pytest.raises(ValueError, match="1x257 pixels"):
        read_image(tmp_path / "257.png")


def test_names_that_are_no_unicode_can_be_printed() -> None:
    assert shown(Path(os.fsdecode(b"a/\xff.png"))) == "a/?.png"


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    """Three shards of 3, 4 and 2 latents, numbered through; mirrored ones are 100 higher."""
    start = 0
    for index, count in enumerate((3, 4, 2)):
        latents = torch.arange(start, start + count).float().view(-1, 1, 1, 1).expand(count, 2, 2, 2)
        labels = torch.arange(start, start + count)
        write_shard(shard_path(tmp_path, 0, index), latents, labels, latents + 100)
        start += count
    return tmp_path


def test_shards_read_at_random_places(shard_folder: Path) -> None:
    shards = LatentShards(shard_folder)
    assert len(shards) == 9
    assert shards.shape == (2, 2, 2)
    indices = torch.tensor([8, 0, 3, 2, 6])
    latents, labels = shards.batch(indices)
    assert latents[:, 1, 0, 1].tolist() == indices.tolist()
    assert labels.tolist() == indices.tolist()
    flipped, _ = shards.batch(indices, torch.tensor([True, False, True, False, False]))
    assert flipped[:, 0, 0, 0].tolist() == [108, 0, 103, 2, 6]


def test_sets_without_mirrored_latents_ignore_the_wish(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long))
    latents, _ = LatentShards(tmp_path).batch(torch.tensor([1, 0]), torch.tensor([True, True]))
    assert latents.flatten().tolist() == [1, 1]


def test_missing_and_damaged_shards_are_named(shard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="no latent shards"):
        list(iterate_shards(tmp_path / "none"))
    first = shard_path(shard_folder, 0, 0)
    with pytest.raises(LightningDiTError, match="is a file, the folder of latent shards"):
        list(iterate_shards(first))
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(LightningDiTError, match="cut short or damaged"):
        list(iterate_shards(shard_folder))


def test_shards_of_any_number_are_read_in_order(tmp_path: Path) -> None:
    for index in (0, 2, 10, 999, 1000, 1001):
        write_shard(shard_path(tmp_path, 0, index), torch.full((1, 1, 1, 1), float(index)), torch.tensor([index]))
    write_shard(shard_path(tmp_path, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([7]))  # of a second process
    assert LatentShards(tmp_path).labels.tolist() == [0, 2, 10, 999, 1000, 1001, 7]


def test_random_batches_are_rows_of_the_files(tmp_path: Path) -> None:
    """Against the tensors as they were written, in random order, with repeats."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, 3, 2, 2, generator=generator) for size in (5, 1, 8)]
    labels = torch.randint(9, (14,), generator=generator)
    for index, (part, named) in enumerate(zip(parts, labels.split([5, 1, 8]), strict=True)):
        write_shard(shard_path(tmp_path, 0, index), part, named, -part)
    write_shard(shard_path(tmp_path, 0, 3), torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.long))  # none readable
    whole = torch.cat(parts)
    shards = LatentShards(tmp_path)
    assert shards.has_flips  # the empty shard has none, and counts for nothing
    indices = torch.randint(14, (20,), generator=generator)
    latents, found = shards.batch(indices)
    assert torch.equal(latents, whole[indices])
    assert torch.equal(found, labels[indices])
    flips = torch.rand(20, generator=generator) < 0.5
    mirrored, _ = shards.batch(indices, flips)
    assert torch.equal(mirrored, torch.where(flips.view(-1, 1, 1, 1), -whole[indices], whole[indices]))
    with pytest.raises(IndexError):
        shards.batch(torch.tensor([14]))


def test_the_memory_of_a_batch_is_used_again_only_once_nobody_has_it(shard_folder: Path) -> None:
    shards = LatentShards(shard_folder)
    batches = [shards.batch(torch.tensor([place]))[0] for place in range(5)]
    view = batches[4][0, 0].view(-1)[:1]
    assert [float(latents[0, 0, 0, 0]) for latents in batches] == [0, 1, 2, 3, 4]
    del batches
    others = [shards.batch(torch.tensor([8]))[0] for _ in range(4)]
    assert float(view) == 4.0  # a view alone holds it
    assert all(float(latents[0, 0, 0, 0]) == 8.0 for latents in others)
    place = others[3].data_ptr()
    del others
    taken = [shards.batch(torch.tensor([1]))[0] for _ in range(2)]
    assert place in [latents.data_ptr() for latents in taken]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shards_of_any_precision_give_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(6.0).view(3, 2, 1, 1) / 4  # exact in all of them
    write_shard(shard_path(tmp_path, 0, 0), values.to(dtype), torch.arange(3))
    latents, _ = LatentShards(tmp_path).batch(torch.tensor([2, 0]))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, values[[2, 0]])


@pytest.mark.parametrize(
    ("latents", "labels", "flipped", "message"),
    [
        ((2, 1, 1, 1), [0, 1, 2], None, r"latents \[2, 1, 1, 1\] and labels \[3\]"),
        ((2, 1, 1), [0, 1], None, r"latents \[2, 1, 1\]"),
        ((2, 1, 1, 1), [0.5, 1], None, "float32"),
        ((2, 1, 1, 1), [0, -1], None, "the label -1 is no class"),
        ((2, 1, 1, 1), [0, 1], (1, 1, 1, 1), r"latents_flip has the shape \[1, 1, 1, 1\]"),
    ],
)
def test_shards_whose_tensors_do_not_belong_together_are_named(
    latents: tuple[int, ...], labels: list[float], flipped: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    path = shard_path(tmp_path, 0, 0)
    write_shard(path, torch.zeros(latents), torch.tensor(labels), None if flipped is None else torch.ones(flipped))
    with pytest.raises(LightningDiTError, match=message) as caught:
        LatentShards(tmp_path)
    assert str(path) in str(caught.value)


def test_shards_of_two_shapes_are_no_set(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, 0, 0), torch.zeros(1, 4, 2, 2), torch.tensor([0]))
    write_shard(shard_path(tmp_path, 0, 1), torch.zeros(1, 4, 4, 4), torch.tensor([0]))
    with pytest.raises(LightningDiTError, match=r"shapes \(4, 2, 2\) and \(4, 4, 4\)"):
        LatentShards(tmp_path)


def test_results_come_in_order_and_errors_at_their_place() -> None:
    """Later items are done first; the third one fails."""
    done = []

    def work(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0.0)
        done.append(item)
        if item == 2:
            raise ValueError("two")
        return 10 * item

    ahead = Ahead(work, range(6), threads=3)
    results = iter(ahead)
    assert [next(results), next(results)] == [0, 10]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert ahead.waited > 0
    assert set(done) <= set(range(6))
    assert list(Ahead(work, [], threads=2)) == []


def test_no_more_results_than_asked_for_are_held() -> None:
    started = []
    results = iter(Ahead(lambda item: started.append(item), range(100), threads=2))
    next(results)
    results.close()
    assert len(started) <= 3  # two threads' and the one that was taken


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I;16", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("I", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("L", [0, 1, 128, 255], [0, 1, 128, 255]),
        ("1", [0, 1, 1, 0], [0, 255, 255, 0]),
    ],
)
def test_grey_pixels_of_any_depth_keep_black_and_white(mode: str, values: list[int], expected: list[int]) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "L": np.uint8, "1": bool}[mode]
    image = as_rgb(Image.fromarray(np.array([values], kind)))
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


def test_pixels_without_a_fixed_range_are_refused() -> None:
    with pytest.raises(ValueError, match="fractions"):
        as_rgb(Image.fromarray(np.array([[0.5]], np.float32)))
    with pytest.raises(ValueError, match="from -3 to 70000, beyond 16 bits"):
        as_rgb(Image.fromarray(np.array([[-3, 70000]], np.int32)))


def test_image_files_are_found_by_their_endings_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    for name in ("a/b/x.JPG", "a/y.webp", "z.tiff", "notes.txt", "model.pt"):
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a/b/x.JPG", "a/y.webp", "z.tiff"]


@pytest.mark.parametrize(
    ("count", "at_most", "chosen"),
    [(3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (10, 4, [0, 2, 5, 7]), (7, 1, [0]), (0, 3, [])],
)
def test_evenly_spaced_items(count: int, at_most: int, chosen: list[int]) -> None:
    assert evenly_spaced(range(count), at_most) == chosen


def test_batches_are_full_whatever_cannot_be_read(tmp_path: Path) -> None:
    """Shades 0 to 6, the odd ones of which are no images: batches of 3 hold 0, 2, 4 and 6."""
    files = [tmp_path / f"{shade}.png" for shade in range(7)]
    for shade, path in enumerate(files):
        Image.new("L", (2, 2), shade).save(path)
        if shade % 2:
            path.write_bytes(path.read_bytes()[:-30])
    reader = ImageBatches(files, lambda image: torch.from_numpy(np.asarray(image).copy()), 3)
    shades = [[int(image.max()) for image in images] for images, _ in reader]
    assert shades == [[0, 2, 4], [6]]
    assert reader.unreadable == files[1::2]
