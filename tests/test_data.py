"""Image sets, shards and the feature extraction between them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT import extract_features
from LightningDiT.data.images import ImageBatches, evenly_spaced, fashion_mnist, image_files, pad_to_32
from LightningDiT.data.shards import LatentShards, iterate_shards, shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE


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
    write_shard(shard_path(tmp_path, 0, 0), torch.ones(2, 1, 1, 1), torch.zeros(2))
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


def test_extraction_writes_the_modes_and_their_statistics(tiny_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("cats", "dogs", "seals")):
        (images / name).mkdir(parents=True)
        for shade in range(3):
            Image.new("RGB", (16, 16), (80 * number, 60 * shade, 128)).save(images / name / f"{shade}.png")
    output = tmp_path / "latents"
    command = ["--config", str(tiny_folder / "config.yaml"), "--images", str(images), "--output", str(output)]
    assert extract_features.main([*command, "--batch-size", "2", "--shard-size", "4", "--posterior", "mode"]) == 0
    shards = LatentShards(output)
    assert shards.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    latents, _ = shards.batch(torch.arange(9))
    tokenizer = VA_VAE(tiny_folder / "tokenizer.yaml")
    picture = tokenizer.img_transform()(Image.open(images / "dogs" / "2.png"))
    expected = tokenizer.encode_images(picture.unsqueeze(0), sample=False)
    torch.testing.assert_close(latents[5:6], expected, atol=1e-5, rtol=1e-5)
    stats = LatentStats.load(output / "latents_stats.pt", 4)
    torch.testing.assert_close(stats.mean.flatten(), latents.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)


def test_old_shards_are_never_mixed_with_new_ones(shard_folder: Path, tiny_folder: Path, fashion_folder: Path) -> None:
    command = ["--config", str(tiny_folder / "config.yaml"), "--data-root", str(fashion_folder)]
    with pytest.raises(LightningDiTError, match="holds latent shards already"):
        extract_features.main([*command, "--output", str(shard_folder)])
    assert len(LatentShards(shard_folder)) == 9


def test_a_folder_without_images_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    command = ["--config", str(tiny_folder / "config.yaml"), "--images", str(tmp_path / "absent")]
    with pytest.raises(LightningDiTError, match="no images in"):
        extract_features.main([*command, "--output", str(tmp_path / "latents")])


def test_images_that_name_no_class_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "flat.png")
    command = ["--config", str(tiny_folder / "config.yaml"), "--images", str(tmp_path / "images")]
    with pytest.raises(LightningDiTError, match=r"flat.png lies in no subfolder"):
        extract_features.main([*command, "--output", str(tmp_path / "latents")])


def test_extraction_passes_broken_images_over_and_keeps_the_labels_right(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, output = tmp_path / "images", tmp_path / "latents"
    for name in ("cats", "dogs"):
        (images / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(images / name / "1.png")
        (images / name / "0.png").write_bytes(b"no image")
    command = ["--config", str(tiny_folder / "config.yaml"), "--images", str(images), "--output", str(output)]
    assert extract_features.main(command) == 0
    assert LatentShards(output).labels.tolist() == [0, 1]
    said = capsys.readouterr().out
    assert f"passed over 2 files that are no images, {images / 'cats' / '0.png'} the first" in said
    assert "wrote 2 latents" in said


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
