"""What can be compared: images (folders, ADM's .npz files, Fashion-MNIST) and statistics of a reference set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from LightningDiT.data.fashion_mnist import holds_fashion_mnist
from LightningDiT.data.image_sets import ImageSet, open_fashion_mnist, open_samples
from LightningDiT.data.npz import PIXELS, NpzImages, open_npz, real_numbers
from LightningDiT.errors import LightningDiTError

PARTS = ("train", "test")  # FOLDER:train and FOLDER:test of Fashion-MNIST
#: Names under which ADM (and EDM, but for the spatial ones) keeps mean and covariance of a feature.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

Moments = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """One side of a comparison: images, or mean and covariance of their features, or both.

    Attributes:
        moments: `features` and, for sFID, `spatial` -> mean (F,) and covariance (F, F), float64.
    """

    images: ImageSet | None
    moments: Moments


def open_source(name: str, size: int | None = None) -> Source:
    """Return what `name` means: a folder, `FOLDER:train` or `FOLDER:test` of Fashion-MNIST, or an .npz file.

    Args:
        size: images are reduced and cropped to size x size pixels (ADM's crop); by default they stay as they are.

    Raises:
        LightningDiTError: nothing is there, or it holds neither images nor statistics.
    """
    path = Path(name)
    folder, _, part = name.rpartition(":")
    if part in PARTS and not path.exists():
        return Source(open_fashion_mnist(folder, part).cropped(size), {})
    if path.suffix == ".npz":
        return _archive(path, size)
    if path.is_file():
        kind = path.suffix or "plain"
        raise LightningDiTError(
            f"{name} is a {kind} file; a folder of images or an .npz file (images, or mu and sigma) is expected",
            "write mean and covariance by numpy.savez(FILE, mu=..., sigma=...), or name the folder of the images",
        )
    if holds_fashion_mnist(path):
        raise LightningDiTError(f"{name} holds Fashion-MNIST, and not which part of it", f"name {name}:test")
    return Source(open_samples(name).cropped(size), {})


def open_images(name: str, size: int | None = None) -> ImageSet:
    """Return the images that `name` means; see `open_source`.

    Raises:
        LightningDiTError: see `open_source`; or it holds statistics alone.
    """
    images = open_source(name, size).images
    if images is None:
        raise LightningDiTError(
            f"{name} holds statistics and no images ({PIXELS})", "name a folder or an .npz file with images"
        )
    return images


def _archive(path: Path, size: int | None) -> Source:
    """Return images and statistics of an .npz file."""
    with open_npz(path) as archive:
        names = set(archive.files)
        moments = {
            kind: (real_numbers(archive[mean]), real_numbers(archive[covariance]))
            for kind, (mean, covariance) in MOMENTS.items()
            if {mean, covariance} <= names
        }
    if PIXELS in names:
        return Source(NpzImages(path).cropped(size), moments)
    if not moments:
        raise LightningDiTError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}; {PIXELS} (images) or mu and sigma are expected",
            "name a file in ADM's layout",
        )
    return Source(None, moments)
