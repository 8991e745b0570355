"""Image sets for training: Fashion-MNIST as tensors, and any folder of one subfolder per class."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.errors import LightningDiTError

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IDX_UINT8 = 0x08  # type code of unsigned bytes in the IDX header


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor of a gzipped IDX file (LeCun's MNIST format)."""
    content = gzip.decompress(path.read_bytes())
    if content[:2] != b"\0\0" or content[2] != IDX_UINT8:
        raise LightningDiTError(f"{path} is no IDX file of bytes", "download Fashion-MNIST again")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(values.reshape(shape).copy())


def fashion_mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) uint8 and labels (N,) int64 of Fashion-MNIST (Xiao et al., arXiv 1708.07747).

    Args:
        root: a folder that holds the four `*-ubyte.gz` files; where they are missing they are fetched
            into it by torchvision.
        train: the 60,000 training photographs, or the 10,000 test photographs.
    """
    prefix = "train" if train else "t10k"
    folder = Path(root)
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    if all((folder / name).is_file() for name in names):
        images, labels = (read_idx(folder / name) for name in names)
        return images, labels.long()
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise LightningDiTError(
            f"Fashion-MNIST is not in {folder} and could not be downloaded ({error})",
            "pass --data-root FOLDER with the four *-ubyte.gz files",
        ) from error
    return dataset.data, dataset.targets.long()


def pad_to_32(images: Tensor) -> Tensor:
    """Return (N, 3, 32, 32) float32 in [-1, 1] of grey uint8 images (N, 28, 28): two black pixels around."""
    padded = F.pad(images, (2, 2, 2, 2)).float() / 127.5 - 1.0  # (N, 32, 32)
    return padded.unsqueeze(1).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)
