"""Fashion-MNIST (Xiao et al., arXiv 1708.07747): the one reader of its files, and the border of the bundled model."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import open_regular
from LightningDiT.images import to_float

FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TORCHVISION_FOLDER = Path("FashionMNIST", "raw")  # where torchvision keeps the files
SIDE = 28  # pixels of a photograph
BORDER = 2  # black pixels on each side that make 32x32 pixels of it
MOST_BYTES = 2**26  # 60,000 images are 47 MB
IDX_UINT8 = 0x08  # type code of unsigned bytes in the IDX header
FIX = "download Fashion-MNIST again"


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor in a gzipped IDX file (LeCun's MNIST format).

    Raises:
        LightningDiTError: the file is damaged, or of another format.
    """
    try:
        with open_regular(path) as file, gzip.open(file) as unpacked:
            content = unpacked.read(MOST_BYTES)
        if content[:3] != bytes([0, 0, IDX_UINT8]):
            raise LightningDiTError(f"{path} is no IDX file of bytes", FIX)
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise LightningDiTError(f"{path} is cut short or damaged ({error})", FIX) from error


def fashion_mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) uint8 and labels (N,) int64.

    Args:
        root: folder with the four `*-ubyte.gz` files; torchvision downloads missing ones into it.
        train: the 60,000 training photographs; false: the 10,000 test photographs.

    Raises:
        LightningDiTError: the files are missing and cannot be downloaded, or are damaged.
    """
    prefix = "train" if train else "t10k"
    folder = Path(root)
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    if all((folder / name).is_file() for name in names):
        images, labels = (read_idx(folder / name) for name in names)
    else:
        images, labels = _by_torchvision(folder, train)
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise LightningDiTError(
            f"{folder} has images {list(images.shape)} and labels {list(labels.shape)}; [N, 28, 28] and [N] are"
            " expected of Fashion-MNIST",
            FIX,
        )
    return images, labels.long()


def _by_torchvision(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images and labels by torchvision, which downloads missing files."""
    from torchvision.datasets import FashionMNIST

    made = (folder / TORCHVISION_FOLDER, (folder / TORCHVISION_FOLDER).parent, folder)
    absent = [path for path in made if not path.exists()]
    try:
        dataset = FashionMNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        for path in absent:  # torchvision makes them before it downloads anything
            with contextlib.suppress(OSError):
                path.rmdir()
        reason = " ".join(str(error).split())
        raise LightningDiTError(
            f"Fashion-MNIST is not in {folder} and could not be downloaded ({reason[:200]})",
            "name a folder with the four *-ubyte.gz files",
        ) from error
    return dataset.data, dataset.targets


def holds_fashion_mnist(folder: Path) -> bool:
    """Whether `folder` has the training photographs of Fashion-MNIST, by themselves or as torchvision keeps them."""
    unpacked = Path(TRAIN_IMAGES).stem
    return any(
        (folder / file).is_file()
        for file in (TRAIN_IMAGES, TORCHVISION_FOLDER / TRAIN_IMAGES, TORCHVISION_FOLDER / unpacked)
    )


def padded(images: Tensor) -> Tensor:
    """Return images (N, 32, 32) of images (N, 28, 28): two black pixels are added on each side."""
    return F.pad(images, [BORDER] * 4)


def pad_to_32(images: Tensor) -> Tensor:
    """Return (N, 3, 32, 32) float32 in [-1, 1] of grey uint8 images (N, 28, 28), see `padded`."""
    return to_float(padded(images)).unsqueeze(1).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
