"""Latent statistics: the arithmetic, and every way in which the file can be damaged."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.latents import LatentStats, Moments, diagnose

CHANNELS = 4


def tensors(value: float, channels: int = CHANNELS) -> torch.Tensor:
    return torch.full((1, channels, 1, 1), value)


def write(path: Path, mean: object, std: object) -> Path:
    torch.save({"mean": mean, "std": std}, path)
    return path


def test_normalisation_and_its_inverse() -> None:
    stats = LatentStats(tensors(2.0), tensors(4.0), multiplier=0.5)
    z = torch.randn(3, CHANNELS, 2, 2)
    torch.testing.assert_close(stats.normalise(z), (z - 2) / 4 * 0.5)
    torch.testing.assert_close(stats.denormalise(stats.normalise(z)), z)


def test_moments_give_mean_and_standard_deviation() -> None:
    z = torch.randn(50, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(1)) * 3 + 1
    moments = Moments()
    moments.add(z)
    stats = moments.stats()
    torch.testing.assert_close(stats.mean.flatten(), z.mean((0, 2, 3)))
    torch.testing.assert_close(stats.std.flatten(), z.transpose(0, 1).flatten(1).std(1))


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    stats = LatentStats(torch.randn(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5)
    stats.save(tmp_path / "latents_stats.pt")
    loaded = LatentStats.load(tmp_path / "latents_stats.pt", CHANNELS, multiplier=2.0)
    torch.testing.assert_close(loaded.mean, stats.mean, atol=0, rtol=0)
    torch.testing.assert_close(loaded.std, stats.std, atol=0, rtol=0)
    assert loaded.multiplier == 2.0
    assert diagnose(tmp_path / "latents_stats.pt", CHANNELS) == []


@pytest.mark.parametrize("shape", [(CHANNELS,), (CHANNELS, 1, 1), (1, CHANNELS, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_plain_shape_of_statistics_is_taken(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 4.0])
    path = write(tmp_path / "stats.pt", mean.to(dtype).view(shape), torch.nn.Parameter(std.to(dtype).view(shape)))
    stats = LatentStats.load(path, CHANNELS)
    torch.testing.assert_close(stats.mean, mean.view(1, -1, 1, 1), atol=0, rtol=0)
    torch.testing.assert_close(stats.std, std.view(1, -1, 1, 1), atol=0, rtol=0)
    assert not stats.std.requires_grad
    assert diagnose(path) == []


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        ("[", "carries no"),
        ("[" * 100_000, "carries no"),
        ('{"a": 1}', "carries no"),
        ("[[1.0], [1.0, 2.0]]", "carries no"),
        ('["a"]', "carries no"),
        ("[1" + "0" * 400 + "]", "carries no|not finite"),
        ("null", "carries no"),
        ("[]", "shape"),
        ("7.5", "shape"),
        ("[true, false]", "mean is bool; real"),
        ("[NaN, 1.0]", "mean is not finite in 1 of 2"),
        ("[1e999, 1.0]", "mean is not finite in 1 of 2"),
    ],
)
def test_odd_statistics_of_a_tokenizer_file_are_named(mean: str, message: str) -> None:
    with pytest.raises(LightningDiTError, match=message):
        LatentStats.from_metadata({"latents_mean": mean, "latents_std": "[1.0, 2.0]"}, "file")


def test_a_tokenizer_file_carries_its_statistics(tmp_path: Path) -> None:
    stats = LatentStats(torch.randn(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5)
    copied = LatentStats.from_metadata(stats.as_metadata(), "file")
    torch.testing.assert_close(copied.mean, stats.mean, atol=0, rtol=0)
    torch.testing.assert_close(copied.std, stats.std, atol=0, rtol=0)
    with pytest.raises(LightningDiTError, match="carries no latent statistics"):
        LatentStats.from_metadata({}, "file")


class Hostile:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def damage(path: Path, kind: str) -> Path:
    """Write a statistics file that is damaged in the given way."""
    nan, good, zero, one = float("nan"), tensors(1.5), tensors(0.0), tensors(1.0)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a tensor")
    elif kind == "page":
        path.write_text("<!doctype html><title>404</title>")
    elif kind == "cut":
        write(path, good, good)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "hostile":
        path.write_bytes(pickle.dumps({"mean": Hostile()}, protocol=2))
    elif kind == "keys":
        torch.save({"average": good}, path)
    elif kind == "transposed":
        write(path, good.reshape(CHANNELS, 1), good)
    elif kind == "arrays":
        write(path, good.numpy(), good.numpy())
    elif kind == "lists":
        write(path, [1.5] * CHANNELS, [1.5] * CHANNELS)
    elif kind == "too many":
        write(path, torch.ones(1).expand(10**12), good)
    elif kind == "none":
        write(path, torch.zeros(0), good)
    elif kind == "scalar":
        write(path, torch.tensor(1.5), good)
    elif kind == "large":
        write(path, good.double() * 1e300, good)
    elif kind == "whole":
        write(path, good, one.long())
    elif kind == "sparse":
        write(path, good.to_sparse(), good)
    elif kind == "meta":
        write(path, good.to("meta"), good)
    elif kind == "complex":
        write(path, good * 1j, good)
    elif kind == "channels":
        write(path, tensors(1.5, 3), tensors(1.5, 3))
    elif kind == "nan":
        write(path, tensors(nan), good)
    elif kind == "std":
        write(path, good, zero)
    elif kind == "identity":
        write(path, zero, one)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder"),
        ("empty", r"empty \(0 bytes\)"),
        ("text", "cut short or no weights file"),
        ("page", "is a web page, not weights"),
        ("cut", "cut short or no weights file"),
        ("hostile", "is refused: opening it would run code"),
        ("keys", r"entries average \(Tensor\)"),
        ("transposed", r"mean has the shape \[4, 1\]; \[1, 4, 1, 1\] is expected"),
        ("arrays", r"entries mean .*tensors `mean` and `std` are expected|which torch 2\.\d"),
        ("lists", r"entries mean \(list\), std \(list\); tensors `mean` and `std` are expected"),
        ("too many", r"mean has the shape \[1000000000000\]"),
        ("none", r"mean has the shape \[0\]"),
        ("scalar", r"mean has the shape \[\]"),
        ("large", "mean is not finite in 4 of 4"),
        ("whole", "std is whole; real numbers are expected"),
        ("sparse", "mean is sparse or nested; real numbers are expected"),
        ("meta", "mean is without values; real numbers are expected"),
        ("complex", "mean is complex; real numbers are expected"),
        ("channels", r"shape \[1, 3, 1, 1\]; \[1, 4, 1, 1\] is expected"),
        ("nan", "mean is not finite in 4 of 4"),
        ("std", "std is not positive in 4 of 4"),
        ("identity", "placeholder numbers"),
    ],
)
def test_damage_is_named_with_the_fix(
    kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = damage(tmp_path / "latents_stats.pt", kind)
    with pytest.raises(LightningDiTError, match=message) as caught:
        LatentStats.load(path, CHANNELS)
    assert "python fix_latents_stats.py" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(diagnose(path, CHANNELS)) == 1
    assert "code ran" not in capfd.readouterr().out


def test_invalid_statistics_are_not_written(tmp_path: Path) -> None:
    good = LatentStats(tensors(1.0), tensors(2.0))
    good.save(tmp_path / "latents_stats.pt")
    with pytest.raises(LightningDiTError, match="not written"):
        LatentStats(tensors(1.0), tensors(0.0)).save(tmp_path / "latents_stats.pt")
    assert LatentStats.load(tmp_path / "latents_stats.pt").std[0, 0, 0, 0] == 2.0


def test_statistics_in_a_weights_file_are_no_statistics_file(tmp_path: Path) -> None:
    save_weights({"mean": torch.zeros(2)}, tmp_path / "latents_stats.pt")
    assert "cut short or no weights file" in diagnose(tmp_path / "latents_stats.pt")[0]
