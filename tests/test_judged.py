"""Images as the judge sees them: pixels, classes, and figures of sets whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from LightningDiT.images import as_images, to_uint8
from LightningDiT.metrics.judge import Judge
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from studies.judged import (
    ImageSet,
    diversity,
    equal_labels,
    judged,
    photographs,
    real_images,
    recognised,
    sample_images,
    some_of_each_class,
)
from tests.test_evaluate_bundled import data_root, grey_images, image_set  # noqa: F401 - data_root is a fixture


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(as_images(pixels)), pixels)
    photographs_of_test = photographs(image_set(20))
    torch.testing.assert_close(photographs_of_test, grey_images(20) / 127.5 - 1, rtol=0, atol=1e-6)


def test_real_images_are_those_of_the_files(data_root: Path) -> None:  # noqa: F811
    images = real_images(Judge().eval(), str(data_root), train=False)
    assert torch.equal(images.pixels[:, 2:-2, 2:-2], grey_images(20)[..., None].expand(-1, -1, -1, 3))
    assert int(images.pixels[:, :2].max()) == 0
    assert images.labels.tolist() == [index % 10 for index in range(20)]


def test_diversity_is_one_for_the_same_set_and_falls_with_contrast() -> None:
    real = image_set(40)
    assert diversity(real, real)["mean"] == pytest.approx(1.0, abs=1e-12)
    halved = judged(Judge().eval(), real.pixels // 2 * 2 // 2, real.labels)
    ratios = diversity(halved, real)
    assert ratios["mean"] == pytest.approx(0.5, abs=0.01)
    assert len(ratios["by_class"]) == 10


def test_the_share_of_recognised_images_by_class() -> None:
    labels, seen = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 2, 2])
    figures = recognised(ImageSet(torch.zeros(5, 32, 32, 3), labels, torch.zeros(5, 1), seen))
    assert figures["accuracy"] == pytest.approx(3 / 5)
    shares = list(figures["by_class"].values())
    assert shares[:3] == [1 / 2, 1 / 2, 1.0]
    assert all(math.isnan(share) for share in shares[3:])  # there is no image of these classes


def test_some_of_each_class_draws_by_seed() -> None:
    images = image_set(60)
    drawn = some_of_each_class(images, 3, seed=1)
    assert drawn.labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert torch.equal(drawn.pixels, some_of_each_class(images, 3, seed=1).pixels)
    assert not torch.equal(drawn.pixels, some_of_each_class(images, 3, seed=2).pixels)


def test_equal_labels_are_ordered_by_class() -> None:
    assert equal_labels(30).tolist() == [label for label in range(10) for _ in range(3)]


def test_samples_do_not_depend_on_their_batches(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder, "cpu")
    labels = torch.tensor([0, 2, 1])
    whole = sample_images(pipe, labels, seed=3, output_type="latent")
    monkeypatch.setattr("studies.judged.BATCH_SIZE", 2)
    parts = sample_images(pipe, labels, seed=3, output_type="latent")
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-5)
    assert (whole.images.shape, whole.nfe) == ((3, *pipe.latent_shape), 3)
    pixels = sample_images(pipe, labels, seed=3)
    assert (pixels.images.shape, pixels.images.dtype) == ((3, 16, 16, 3), np.uint8)
