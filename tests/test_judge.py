"""The judge: shapes, determinism, folding, files, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.checkpoint import inspect, save_weights
from LightningDiT.data.fashion_mnist import pad_to_32
from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.judge import FEATURES, Judge, judge_images, load_judge
from studies.train_judge import save_judge, train_judge

BUNDLED = Path(__file__).parents[1] / "models" / "fashion-mnist" / "judge.safetensors"
SAMPLES = Path(__file__).parent / "samples" / "fashion_mnist_test.png"


def uint8_images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)


def two_kinds(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are bright at the top (class 3) or at the bottom (class 7), with noise."""
    images = uint8_images(count) // 4
    labels = torch.where(torch.arange(count) % 2 == 0, 3, 7)
    images[labels == 3, :10] += 150
    images[labels == 7, -10:] += 150
    return images, labels


@pytest.fixture(scope="module")
def trained() -> Judge:
    return train_judge(*two_kinds(2560), epochs=1, seed=0)


def test_size_and_shapes() -> None:
    judge = Judge().eval()
    assert sum(value.numel() for value in judge.state_dict().values()) == 139_754
    images = pad_to_32(uint8_images(5))
    assert judge(images).shape == (5, 10)
    assert judge.features(images).shape == (5, FEATURES)
    with pytest.raises(ValueError, match=r"\(1, 3, 28, 28\)"):
        judge(torch.zeros(1, 3, 28, 28))


def test_the_border_is_not_seen() -> None:
    judge = Judge().eval()
    images = pad_to_32(uint8_images(2))
    framed = images.clone()
    framed[..., :2, :] = framed[..., :2] = framed[..., -2:] = 1.0
    framed[..., -2:, :] = 1.0
    assert torch.equal(judge(images), judge(framed))


def test_training_learns_and_is_repeatable(trained: Judge) -> None:
    images, labels = two_kinds(512)
    _, seen = judge_images(trained, pad_to_32(images))
    assert (seen == labels).float().mean() > 0.98
    few = [train_judge(images[:256], labels[:256], epochs=1, seed=seed) for seed in (5, 5, 6)]
    sizes = [judge.output.weight.double().sum().item() for judge in few]
    assert sizes[0] == sizes[1]
    assert sizes[0] != sizes[2]


def test_judge_images_splits_without_effect(trained: Judge) -> None:
    images = pad_to_32(uint8_images(501))  # one more than a batch
    features, seen = judge_images(trained, images)
    with torch.no_grad():
        torch.testing.assert_close(features, trained.features(images), rtol=1e-5, atol=1e-5)
        assert torch.equal(seen, trained(images).argmax(1))


def test_folding_keeps_the_output() -> None:
    torch.manual_seed(0)
    judge = Judge(folded=False).train()
    images = pad_to_32(uint8_images(64))
    for _ in range(3):
        judge(images)  # running statistics that are not 0 and 1
    judge.eval()
    with torch.no_grad():
        before = judge(images)
        torch.testing.assert_close(judge.fold()(images), before, rtol=1e-4, atol=1e-4)
    assert judge.state_dict().keys() == Judge().state_dict().keys()


def test_a_file_gives_the_same_judge_back(trained: Judge, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_judge(trained, path, {"test_accuracy": 0.93, "seed": 0, "epochs": 1})
    assert path.stat().st_size <= 500_000
    assert inspect(path).metadata == {"test_accuracy": "0.93", "seed": "0", "epochs": "1"}
    loaded = load_judge(path)
    assert not loaded.training
    images = pad_to_32(uint8_images(20))
    rounded = trained.half().float()
    with torch.no_grad():  # float32 weights would differ by about 1e-3
        torch.testing.assert_close(loaded(images), rounded(images), rtol=0, atol=1e-5)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"does not exist; fix: python -m studies\.train_judge"):
        load_judge(tmp_path / "none.safetensors")
    save_weights({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(LightningDiTError, match="does not fit Judge"):
        load_judge(tmp_path / "other.safetensors")


def test_the_bundled_judge_knows_real_photographs() -> None:
    assert float(inspect(BUNDLED).metadata["test_accuracy"]) >= 0.91
    assert BUNDLED.stat().st_size <= 500_000
    rows = torch.from_numpy(np.array(Image.open(SAMPLES))).unflatten(0, (10, 28)).unflatten(2, (10, 28))
    images = rows.transpose(1, 2).flatten(0, 1)  # (100, 28, 28), ten a class
    _, seen = judge_images(load_judge(BUNDLED), pad_to_32(images))
    right = (seen == torch.arange(10).repeat_interleave(10)).sum()
    # 100 draws at 91 % have a standard deviation of 3: 85 is two below
    assert right >= 85
