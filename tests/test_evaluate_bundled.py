"""The evaluation of the bundled model: its figures on sets whose answer is known, and the whole on a tiny model."""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import load_config
from LightningDiT.data.fashion_mnist import pad_to_32
from LightningDiT.images import to_uint8
from LightningDiT.loading import model_settings
from LightningDiT.metrics.judge import Judge
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings
from studies.evaluate_bundled import main, reconstructed, reconstruction_figures
from studies.judged import ImageSet, judged
from studies.train_judge import save_judge
from tests.conftest import seed_weights

TOKENIZER = """
ckpt_path: tokenizer.safetensors
model:
  params:
    embed_dim: 4
    ddconfig: {z_channels: 4, resolution: 32, ch: 32, ch_mult: [1, 1, 1], num_res_blocks: 1, attn_resolutions: []}
"""
CONFIG = """
ckpt_path: transformer.safetensors
data: {data_path: ., image_size: 32, num_classes: 10}
vae: {model_name: tokenizer.yaml, downsample_ratio: 4}
model: {model_type: LightningDiT-XS/2, in_chans: 4}
sample: {num_sampling_steps: 50, cfg_scale: 2.0, guided_channels: all}
"""
PER_CLASS = 2


def grey_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (count, 28, 28), generator=generator, dtype=torch.uint8)


def image_set(count: int) -> ImageSet:
    """Return random photographs, PER_CLASS of each class in turn, as an untrained judge sees them."""
    pixels = to_uint8(pad_to_32(grey_images(count)))
    return judged(Judge().eval(), pixels, torch.arange(count) % 10)


class Copier:
    """A tokenizer whose latents are the images and which decodes them through `change`."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def encode_images(self, images: Tensor, sample: bool) -> Tensor:
        assert not sample
        return images

    def decode_to_images(self, latents: Tensor) -> np.ndarray:
        return to_uint8(self.change(latents)).numpy()


def brighter_inside(images: Tensor) -> Tensor:
    """Return images with the photograph brighter by 10 grey values and the border as it was."""
    changed = images.clone()
    changed[..., 2:-2, 2:-2] += 10 / 127.5
    return changed


def test_a_perfect_tokenizer_has_infinite_psnr_and_changes_no_answer() -> None:
    originals = image_set(20)
    judge = Judge().eval()
    originals = judged(judge, originals.pixels, originals.labels)
    copies = reconstructed(Copier(lambda images: images), judge, originals)
    assert torch.equal(copies.pixels, originals.pixels)
    assert torch.equal(copies.seen, originals.seen)
    assert reconstruction_figures(originals, copies)["psnr_28x28_mean"] == math.inf


def test_the_black_border_does_not_flatter_the_photograph() -> None:
    originals = image_set(20)
    copies = reconstructed(Copier(brighter_inside), Judge().eval(), originals)
    figures = reconstruction_figures(originals, copies)
    inside = 10 * math.log10(255**2 / 10**2)  # every pixel of the photograph is 10 of 255 off
    border = 10 * math.log10(32**2 / 28**2)  # 1.16 dB that a border without errors adds
    for kind in ("mean", "pooled"):
        assert figures[f"psnr_28x28_{kind}"] == pytest.approx(inside, abs=1e-4)
        assert figures[f"psnr_32x32_{kind}"] == pytest.approx(inside + border, abs=1e-4)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_photographs(folder: Path, count: int) -> Path:
    """Write a data set whose test images are its training images, the classes in turn, and return its folder."""
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", grey_images(count).numpy())
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 2 images a class whose test images are its training images."""
    return write_photographs(tmp_path_factory.mktemp("data"), 20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, tokenizer and judge with seeded weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    (folder / "config.yaml").write_text(CONFIG)
    settings = autoencoder_settings(load_tokenizer_config(folder / "tokenizer.yaml"))
    save_weights(seed_weights(AutoencoderKL(settings)).state_dict(), folder / "tokenizer.safetensors")
    model = seed_weights(LightningDiT(model_settings(load_config(folder / "config.yaml"))))
    save_weights(model.state_dict(), folder / "transformer.safetensors")
    LatentStats(torch.full((1, 4, 1, 1), 0.3), torch.full((1, 4, 1, 1), 1.7)).save(folder / "latents_stats.pt")
    save_judge(seed_weights(Judge()), folder / "judge.safetensors", {"test_accuracy": 0.1})
    return folder


def test_the_whole_evaluation(
    data_root: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data-root", str(data_root), "--model", str(model_folder), "--output", str(tmp_path / "out")]
    assert main([*options, "--count", "20", "--seed", "4"]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    settings = {"count": 20, "seed": 4, "num_sampling_steps": 50, "evaluations": 49, "cfg_scale": 2.0}
    assert settings.items() <= report["settings"].items()
    # training and test images are the same ones here
    frechet = report["frechet_distance_to_test_images"]
    assert frechet["real_training_images"] == pytest.approx(0.0, abs=1e-6)
    assert frechet["generated"] > 0
    distances = report["distance_to_training_set"]
    assert distances["test"] == {"median": 0.0, "percentile_1": 0.0, "minimum": 0.0}
    assert distances["generated"]["minimum"] > 0
    assert 0 <= report["generated"]["accuracy"] <= 1
    assert report["reconstruction"]["psnr_28x28_pooled"] < 20  # seeded weights reconstruct nothing
    assert "psnr_28x28_mean" in capsys.readouterr().out
    sizes = {name: Image.open(tmp_path / "out" / f"{name}.png").size for name in ("samples", "reconstructions")}
    cell = 128 + 4
    assert sizes["samples"] == (PER_CLASS * cell + 4, 10 * cell + 4)
    assert sizes["reconstructions"] == (10 * cell + 4, 4 * cell + 4)
    assert (tmp_path / "out" / "neighbours.png").exists()
