"""Removing dead latent channels leaves what the tokenizer does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.tools import prune_latents


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    """A tokenizer whose channels 1 and 3 are constant: 0.5 and -2."""
    weights = {name: value.clone() for name, value in load_weights(tiny_folder / "tokenizer.safetensors").items()}
    for channel, constant in ((1, 0.5), (3, -2.0)):
        weights["quant_conv.weight"][channel] = 0
        weights["quant_conv.bias"][channel] = constant
    save_weights(weights, tiny_folder / "tokenizer.safetensors")
    mean = torch.tensor([0.1, 0.5, 0.3, -2.0]).view(1, 4, 1, 1)
    std = torch.tensor([1.0, 0.01, 0.8, 0.02]).view(1, 4, 1, 1)
    LatentStats(mean, std).save(tiny_folder / "latents_stats.pt")
    return tiny_folder


def run(folder: Path, *options: str) -> int:
    command = ["--weights", str(folder / "tokenizer.safetensors"), "--stats", str(folder / "latents_stats.pt")]
    return prune_latents.main([*command, "--output", str(folder / "pruned.safetensors"), *options])


def test_a_pruned_tokenizer_encodes_and_decodes_the_same(folder: Path) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before = VA_VAE(folder / "tokenizer.yaml")
    latents = before.encode_images(images, sample=False)
    assert run(folder) == 0
    text = (folder / "tokenizer.yaml").read_text()
    (folder / "pruned.yaml").write_text(
        text.replace("embed_dim: 4", "embed_dim: 2").replace("tokenizer.safetensors", "pruned.safetensors")
    )
    after = VA_VAE(folder / "pruned.yaml")
    kept = after.encode_images(images, sample=False)
    torch.testing.assert_close(kept, latents[:, [0, 2]])
    torch.testing.assert_close(after.decode_latents(kept), before.decode_latents(latents), atol=1e-5, rtol=1e-5)


def test_nothing_left_is_an_error(folder: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"no channel of .* reaches a std of 9"):
        run(folder, "--least-std", "9")
    assert run(folder, "--dry-run") == 0
    assert not (folder / "pruned.safetensors").exists()
