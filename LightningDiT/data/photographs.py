"""Image files by number, for training: decoded by threads while the step before is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.data.images import image_files, read_image
from LightningDiT.errors import LightningDiTError


class Photographs:
    """The images below a folder, cropped to one size.

    A file that cannot be read is remembered, and the next one stands in for it.

    Args:
        folder: every image file below it counts.
        crop: image -> image of the size that all of them have.

    Attributes:
        unreadable: files that no image could be made of so far.
    """

    def __init__(self, folder: str | Path, crop: Callable[[Image.Image], Image.Image]) -> None:
        self.files = image_files(folder)
        self.unreadable: set[Path] = set()
        self._crop = crop
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")
        self._expected: tuple[tuple[int, ...], list[Future[Tensor]]] = ((), [])

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return images (N, 3, H, W) float32 in [-1, 1].

        Raises:
            LightningDiTError: no file at all can be read.
        """
        self.expect(indices)
        pixels = torch.stack([image.result() for image in self._expected[1]])  # (N, H, W, 3) uint8
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def expect(self, indices: Sequence[int]) -> None:
        """Begin to decode what the next call of `batch` asks for."""
        wanted = tuple(int(index) for index in indices)
        if wanted != self._expected[0]:
            self._expected = (wanted, [self._threads.submit(self._read, index) for index in wanted])

    def _read(self, index: int) -> Tensor:
        """Return the pixels (H, W, 3) uint8 of a file, or of the next one that can be read."""
        for offset in range(len(self.files)):
            path = self.files[(index + offset) % len(self.files)]
            try:
                return torch.from_numpy(np.array(self._crop(read_image(path))))
            except Exception:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
                self.unreadable.add(path)
        raise LightningDiTError(
            f"none of {len(self.files)} files is an image, {self.files[0]} the first", "name a folder of images"
        )
