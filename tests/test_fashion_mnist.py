"""Fashion-MNIST: its files as they are written, and every damage in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST

from LightningDiT.data.fashion_mnist import fashion_mnist, holds_fashion_mnist, pad_to_32
from LightningDiT.errors import LightningDiTError
from tests.conftest import write_idx


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
