"""The training that the classifiers share."""

from __future__ import annotations

import torch

from LightningDiT.data.fashion_mnist import pad_to_32
from studies.classifiers import augment


def test_augmentation_moves_by_two_pixels_at_most_and_mirrors() -> None:
    image = pad_to_32(torch.zeros(1, 28, 28, dtype=torch.uint8))
    image[0, :, 10, 5] = 1.0  # one bright pixel
    moved = augment(image.repeat(400, 1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == (400, 3, 32, 32)
    assert torch.equal(moved[:, 0], moved[:, 2])
    number, row, column = torch.nonzero(moved[:, 0] > 0).unbind(1)
    assert torch.equal(number, torch.arange(400))  # never lost, never doubled
    assert set(row.tolist()) == {8, 9, 10, 11, 12}
    plain = {3, 4, 5, 6, 7}
    assert set(column.tolist()) == plain | {31 - value for value in plain}
