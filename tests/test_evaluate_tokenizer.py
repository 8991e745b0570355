"""Scores of a tokenizer: each against its definition, and a report that says what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.evaluate_tokenizer import main
from LightningDiT.images import to_float
from LightningDiT.metrics import extractors
from LightningDiT.metrics.reconstruction import (
    Measures,
    ReconstructionScores,
    make_measures,
    normalised_positions,
    structural_similarity,
)
from LightningDiT.radar.split import load_split
from LightningDiT.tokenizer import perceptual
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.losses import high_pass
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from tests.conftest import BUNDLED, seed_weights
from tests.test_perceptual import vgg_file  # noqa: F401 - a fixture
from tests.walkers import prepared


def test_positions_are_normalised_by_channel() -> None:
    latents = (
        torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    )
    stats = LatentStats(latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True))
    vectors = normalised_positions(latents, stats)
    assert vectors.shape == (96, 3)
    torch.testing.assert_close(vectors.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.std(0), torch.ones(3), atol=1e-5, rtol=0)


def test_ssim_is_that_of_the_paper_for_flat_images() -> None:
    """Without variance only the means count: `(2 a b + c) / (a^2 + b^2 + c)`, c = (0.01 * 2)^2 (Wang et al., 2004)."""
    pytest.importorskip("torchmetrics")
    a, b = torch.full((1, 3, 24, 24), 0.5), torch.full((1, 3, 24, 24), -0.25)
    similarity = structural_similarity()
    c = (0.01 * 2.0) ** 2
    assert math.isclose(float(similarity(a, b)), (2 * 0.5 * -0.25 + c) / (0.25 + 0.0625 + c), rel_tol=1e-4)
    noise = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(similarity(noise, noise), torch.ones(2))


class Halving:
    """A tokenizer whose latents are the images, and whose decoder halves them."""

    device = torch.device("cpu")

    def encode_images(self, images: Tensor, sample: bool) -> Tensor:
        assert not sample
        return images

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents / 2


def test_psnr_is_of_the_pixels_of_a_file() -> None:
    """Grey values of 255 become `trunc(127.5 / 2 + 128) = 191`: an error of 64 steps of 2/255 in a range of 2."""
    scores = ReconstructionScores(Halving(), Measures())
    pixels = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    assert torch.equal(scores.add(pixels), torch.full((3, 3, 8, 8), 191, dtype=torch.uint8))
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, :, :4] = 255  # -1 and 1: 64 and 191
    scores.add(pixels)
    report = scores.report()
    one, two = 20 * math.log10(255 / 64), 10 * math.log10(255**2 / (64**2))
    assert report["images"] == 5
    assert math.isclose(report["psnr_mean"], (3 * one + 2 * two) / 5, rel_tol=1e-6)
    assert math.isclose(report["psnr_pooled"], 20 * math.log10(255 / 64), rel_tol=1e-6)
    assert (report["ssim"], report["lpips"], report["rfid"]) == (None, None, None)
    means = np.array([1.0] * 3 + [0.0] * 2)
    assert report["latents"]["channel_mean"] == pytest.approx([means.mean()] * 3)
    values = np.concatenate([np.ones(3 * 64), np.tile([1.0, -1.0], 64)])
    assert report["latents"]["std"] == pytest.approx(values.std(ddof=1), rel=1e-6)


def test_the_frechet_distance_is_that_of_two_gaussians() -> None:
    """Features that move by a constant: the squared length of the move (equal covariances)."""

    class Means:
        name = "means"

        def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"features": pixels.double().mean((2, 3))}

    scores = ReconstructionScores(Halving(), Measures(extractor=Means()))
    scores.tokenizer.decode_latents = lambda latents: latents - 20 / 127.5
    values = torch.randint(40, 200, (50, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scores.add(values.expand(50, 3, 8, 8).contiguous())
    report = scores.report()
    assert report["features"] == "means"
    moved = 19.5  # trunc(v - 20 + 0.5), which is v - 20 or v - 19 by rounding in float32
    assert math.sqrt(report["frechet_distance"] / 3) == pytest.approx(moved, abs=0.6)


class Grey:
    """A tokenizer of three channels whose latents are the levels, and whose channels are off by -0.02, 0 and 0.05."""

    device = torch.device("cpu")

    def encode_images(self, levels: Tensor, sample: bool) -> Tensor:
        return levels

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents + torch.tensor([-0.02, 0.0, 0.05]).view(1, 3, 1, 1)


def test_levels_are_compared_as_they_are() -> None:
    """The mean of the channels is off by 0.01, which 8 bits would not give: -20 log10(0.01 / 2) dB."""
    scores = ReconstructionScores(Grey(), Measures())
    levels = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    copies = scores.add(levels)
    assert (copies.shape, copies.dtype) == (levels.shape, torch.float32)
    torch.testing.assert_close(copies, levels + 0.01)
    report = scores.report()
    assert math.isclose(report["psnr_mean"], 20 * math.log10(2 / 0.01), rel_tol=1e-4)
    assert report["ridge_error"] == 0.0
    assert math.isclose(report["high_pass_ratio"], 1.0, rel_tol=1e-4)
    passed = high_pass(levels.double()) / 2  # in levels of 0 to 1
    assert math.isclose(report["high_pass_std_of_originals"], float(passed.square().mean().sqrt()), rel_tol=1e-5)
    scores = ReconstructionScores(Grey(), Measures())
    scores.tokenizer.decode_latents = lambda latents: 0.5 * latents.roll(2, dims=2)
    scores.add(levels)
    report = scores.report()
    assert report["high_pass_ratio"] == pytest.approx(0.5, abs=0.02)
    rows = levels.argmax(2).double()
    assert report["ridge_error"] == pytest.approx(float((rows - (rows + 2) % 16).abs().mean()))


def test_windows_of_step_five_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walkers = prepared(tmp_path / "walkers", {"1": [4, 4, 4], "2": [4, 4, 4]}, "--db-range", "-45", "0")
    config = TOKENIZER_CONFIGS / "levels_f4d6.yaml"
    model = AutoencoderKL(autoencoder_settings(load_tokenizer_config(config)))
    save_weights(seed_weights(model).state_dict(), tmp_path / "w.safetensors")
    split = walkers / "out" / "split.json"
    options = ["--levels", str(walkers / "levels"), "--split-file", str(split), "--part", "test", "--fold", "1"]
    report = evaluate(tmp_path / "out", "--config", str(config), "--weights", str(tmp_path / "w.safetensors"), *options)
    assert report["images"] == len(load_split(split).part("test", 1))
    assert report["source"].startswith("test windows of fold 1")
    assert report["ridge_error"] > 0
    assert (report["lpips"], report["rfid"]) == (None, None)
    assert sum("photographs" in note for note in report["notes"]) == 2  # nothing is downloaded for levels
    with pytest.raises(SystemExit):
        main(["--config", str(config), "--levels", "L"])
    assert "--levels and --split-file are given together" in capsys.readouterr().err


def evaluate(folder: Path, *more: str) -> dict[str, object]:
    assert main([*more, "--output", str(folder)]) == 0
    assert Image.open(folder / "reconstructions.png").width > 4 * 128
    return json.loads((folder / "evaluation.json").read_text())


def test_the_bundled_tokenizer_is_evaluated(
    fashion_folder: Path,
    vgg_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--config", str(BUNDLED / "tokenizer.yaml"), "--data-root", str(fashion_folder)]
    options += ["--lpips-weights", str(vgg_file)]
    report = evaluate(tmp_path / "out", *options)
    assert report["images"] == 12
    assert report["features"] == "judge"
    assert 5 < report["psnr_mean"] < 20  # the photographs are noise
    assert 0 < report["lpips"] < 1
    assert -1 < report["ssim"] < 1
    assert len(report["latents"]["channel_std"]) == 6
    assert report["latents"]["uniformity"] < 0
    said = capsys.readouterr().out
    assert "note: a Frechet distance of 12 images is biased" in said
    again = evaluate(tmp_path / "again", *options, "--batch-size", "5")
    for name in ("psnr_mean", "ssim", "lpips", "frechet_distance"):
        assert again[name] == pytest.approx(report[name], rel=2e-2), name


def test_what_cannot_be_had_is_left_out_and_said(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(perceptual, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens there
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 24), (40 * index, 100, 0)).save(images / f"{index}.png")
    monkeypatch.setattr(extractors, "INCEPTION_URL", "http://127.0.0.1:9/weights-0.pth")
    options = ["--config", str(tiny_folder / "tokenizer.yaml"), "--images", str(images)]
    report = evaluate(tmp_path / "out", *options)
    assert (report["lpips"], report["rfid"]) == (None, None)
    assert [note.split(":")[0] for note in report["notes"]] == ["LPIPS is left out", "the Frechet distance is left out"]
    said = capsys.readouterr().out
    assert "left out" in said
    assert "weights-0.pth does not exist and cannot be downloaded" in said
    assert "then give --inception-weights weights-0.pth, or --features judge for Fashion-MNIST" in said
    assert report["psnr_pooled"] <= report["psnr_mean"]
    for asked, message in (
        (("--features", "nothing"), "--features is 'nothing'"),
        (("--lpips-weights", str(tmp_path / "gone.pth")), r"gone.pth does not exist; fix: give --lpips-weights"),
        (("--output", str(images / "0.png")), "0.png cannot be written"),
    ):
        with pytest.raises(LightningDiTError, match=message):
            main([*options, *asked])
    assert main([*options, "--features", "judge", "--count", "1", "--output", str(tmp_path / "one")]) == 0
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert one["rfid"] is None
    assert "the Frechet distance is left out: one image has no covariance" in one["notes"]


def test_a_part_of_the_images_is_spread_over_all_of_them(tmp_path: Path) -> None:
    """Of 40 images in the order of their shades, and of 20 of these, eight in equal steps are shown."""
    for shade in range(40):
        Image.new("RGB", (32, 32), (6 * shade,) * 3).save(tmp_path / f"{shade:02d}.png")
    output = tmp_path / "out"
    options = ["--config", str(BUNDLED / "tokenizer.yaml"), "--images", str(tmp_path), "--features", "judge"]
    for more, shades in ((("--count", "20"), [0, 4, 10, 14, 20, 24, 30, 34]), ((), [0, 5, 10, 15, 20, 25, 30, 35])):
        assert main([*options, "--batch-size", "3", "--output", str(output), *more]) == 0
        with Image.open(output / "reconstructions.png") as picture:
            step = (picture.width - 4) // 8
            found = [picture.getpixel((4 + index * step + step // 2, 64)) for index in range(8)]
        assert found == [(6 * shade,) * 3 for shade in shades]


def test_images_that_are_too_small_for_a_network_are_noted() -> None:
    pytest.importorskip("torchmetrics")
    measures = make_measures(side=15, count=1, features="judge")
    assert measures.ssim is not None
    assert measures.notes[0] == "LPIPS is left out: it needs images of 16 pixels, these have 15"


def test_figures_agree_with_the_tokenizer_itself(tiny_folder: Path) -> None:
    """PSNR from pixels that `decode_to_images` gives, in NumPy."""
    tokenizer = VA_VAE(tiny_folder / "tokenizer.yaml", device="cpu")
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scores = ReconstructionScores(tokenizer, Measures())
    scores.add(pixels)
    latents = tokenizer.encode_images(to_float(pixels), sample=False)
    copies = tokenizer.decode_to_images(latents).astype(np.float64)
    errors = ((copies - pixels.permute(0, 2, 3, 1).numpy()) ** 2).mean((1, 2, 3))
    assert scores.report()["psnr_mean"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-6)
