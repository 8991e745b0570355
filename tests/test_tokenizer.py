"""The autoencoder against the published implementation, and VA-VAE around it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from LightningDiT.checkpoint import save_weights
from LightningDiT.compiling import CompiledForward
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import to_uint8
from LightningDiT.tokenizer import vavae
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings, Decoder, DiagonalGaussian
from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from tests.conftest import GOLDEN, PACKAGE, seed_weights

FILE = "tokenizer.safetensors"


@pytest.fixture(scope="module")
def published() -> AutoencoderKL:
    return seed_weights(AutoencoderKL(AutoencoderSettings()))


@pytest.fixture(scope="module")
def vae_golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "vavae_f16d32.safetensors")


def test_names_and_shapes_are_the_published_ones() -> None:
    keys = json.loads((PACKAGE / "checkpoint_keys.json").read_text())["vavae-f16d32"]
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderSettings())
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == keys


def test_the_shipped_yaml_gives_the_published_sizes() -> None:
    config = load_tokenizer_config(TOKENIZER_CONFIGS / "vavae_f16d32.yaml")
    assert autoencoder_settings(config) == AutoencoderSettings()


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@LAYOUTS
@torch.no_grad()
def test_encoding_meets_the_published_output(
    layout: torch.memory_format, published: AutoencoderKL, vae_golden: dict[str, Tensor]
) -> None:
    published.to(memory_format=layout)
    posterior = published.encode(vae_golden["image"])
    torch.testing.assert_close(posterior.mean, vae_golden["mean"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.logvar, vae_golden["logvar"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.kl(), vae_golden["kl"], atol=1e-4, rtol=1e-5)


@LAYOUTS
@torch.no_grad()
def test_decoding_meets_the_published_output(
    layout: torch.memory_format, published: AutoencoderKL, vae_golden: dict[str, Tensor]
) -> None:
    published.to(memory_format=layout)
    decoded = published.decode(vae_golden["latent"])
    torch.testing.assert_close(decoded, vae_golden["decoded"], atol=1e-4, rtol=0)
    difference = (to_uint8(decoded).int() - vae_golden["decoded_uint8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


def test_the_posterior_draws_with_its_mean_and_variance() -> None:
    posterior = DiagonalGaussian(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), math.log(4.0)))
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(drawn.mean() - 3.0) < 0.05  # five standard errors of 2 / 200
    assert abs(drawn.std() - 2.0) < 0.04
    again = posterior.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, again, atol=0, rtol=0)


def test_the_divergence_is_the_closed_form() -> None:
    mean, variance = 0.5, 4.0
    posterior = DiagonalGaussian(torch.full((2, 3, 1, 1), mean), torch.full((2, 3, 1, 1), math.log(variance)))
    one = 0.5 * (mean**2 + variance - 1 - math.log(variance))
    torch.testing.assert_close(posterior.kl(), torch.full((2,), 3 * one))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 40}, "ch is 40; a multiple of 32"),
        ({"double_z": False}, "double_z is false"),
        ({"resolution": 100}, "resolution is 100; a multiple of 16"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderSettings(**change)


def test_encode_and_decode_own_the_normalisation(tiny_tokenizer: Path) -> None:
    stats = LatentStats(torch.full((1, 4, 1, 1), 0.7), torch.full((1, 4, 1, 1), 2.5), multiplier=3.0)
    tokenizer = VA_VAE(tiny_tokenizer, stats=stats)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    raw = tokenizer.encode_images(images, sample=False)
    torch.testing.assert_close(tokenizer.encode(images), (raw - 0.7) / 2.5 * 3.0)
    torch.testing.assert_close(
        tokenizer.decode(tokenizer.encode(images)), tokenizer.decode_latents(raw), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_levels_are_seen_replicated_and_come_back_as_the_mean(tiny_tokenizer: Path) -> None:
    tokenizer = VA_VAE(tiny_tokenizer)
    levels = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tokenizer.encode_images(levels, sample=False)
    torch.testing.assert_close(latents, tokenizer.model.encode(levels.repeat(1, 3, 1, 1)).mean, atol=1e-6, rtol=1e-6)
    decoded = tokenizer.decode_latents(latents)
    assert decoded.shape == (2, 3, 16, 16)
    assert float((decoded - decoded.mean(1, keepdim=True)).abs().max()) > 0.01
    torch.testing.assert_close(tokenizer.decode_levels(latents)[:, 0], decoded.mean(1), atol=1e-6, rtol=0)


@pytest.fixture
def two_at_once(tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> VA_VAE:
    """The small tokenizer, which takes two of its images of 16x16 at once."""
    monkeypatch.setattr(vavae, "CHUNK_PIXELS", 2 * 16 * 16 + 100)
    return VA_VAE(tiny_tokenizer, device="cpu")


def counts_of(module: nn.Module) -> list[int]:
    """The images that each later call of `module` gets."""
    counts: list[int] = []
    module.register_forward_hook(lambda layer, inputs, output: counts.append(len(inputs[0])))
    return counts


@torch.no_grad()
def test_images_go_through_the_network_in_chunks(two_at_once: VA_VAE) -> None:
    """Five images, two at once: what comes out is what the network gives for all of them together."""
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    decoded, posterior = two_at_once.model.decode(latents), two_at_once.model.encode(images)
    for layer, function, given, whole in (
        ("decoder", two_at_once.decode_latents, latents, decoded),
        ("encoder", lambda x: two_at_once.encode_images(x, sample=False), images, posterior.mean),
    ):
        counts = counts_of(getattr(two_at_once.model, layer))
        made = function(given)
        assert counts == [2, 2, 1]
        assert made.is_contiguous()
        torch.testing.assert_close(made, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_chunks_change_no_draw(two_at_once: VA_VAE) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    drawn = two_at_once.encode_images(images, generator=torch.Generator().manual_seed(2))
    whole = two_at_once.model.encode(images).sample(torch.Generator().manual_seed(2))
    torch.testing.assert_close(drawn, whole, atol=1e-5, rtol=0)


def test_how_many_images_are_in_the_network_at_once() -> None:
    assert [vavae.images_at_once(side**2) for side in (16, 32, 128, 256, 512)] == [256, 64, 4, 1, 1]


def test_the_weights_lie_channels_last_and_are_saved_as_published(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = VA_VAE(tiny_tokenizer)
    weight = tokenizer.model.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    save_weights(tokenizer.model.state_dict(), tmp_path / "again.safetensors")
    again, before = (load_file(path) for path in (tmp_path / "again.safetensors", tiny_tokenizer.parent / FILE))
    torch.testing.assert_close(again, before, atol=0, rtol=0)


def test_the_first_stage_of_a_whole_ldm_is_the_tokenizer(tiny_tokenizer: Path, tmp_path: Path) -> None:
    config, weights = load_tokenizer_config(tiny_tokenizer), load_file(tiny_tokenizer.parent / FILE)
    whole = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": whole | {"model.diffusion_model.x": torch.zeros(1)}}, tmp_path / "ldm.ckpt")
    said = vavae.check_tokenizer_file(config, tmp_path / "ldm.ckpt")
    assert said.endswith(f"; took {len(weights)} tensors of first_stage_model. and passed over the other 1")
    with pytest.warns(UserWarning, match="passed over the other 1"):
        model = vavae.load_autoencoder(config, tmp_path / "ldm.ckpt")
    torch.testing.assert_close(dict(model.state_dict()), weights, atol=0, rtol=0)
    odd = weights | {"quant_conv.bias": weights["quant_conv.bias"].long()}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(LightningDiTError, match=r"tensor quant_conv\.bias is whole; real numbers are expected"):
        vavae.check_tokenizer_file(config, tmp_path / "odd.pt")


def has_half_upsampling() -> bool:
    """Whether this torch decodes in fp16 on the CPU; 2.2 does not."""
    try:
        torch.nn.functional.interpolate(torch.zeros(1, 1, 2, 2, dtype=torch.half), scale_factor=2.0)
    except RuntimeError:
        return False
    return True


needs_half = pytest.mark.skipif(not has_half_upsampling(), reason="this torch does not decode in fp16 on the CPU")


@needs_half
def test_half_precision_decodes_within_two_levels(
    published: AutoencoderKL, vae_golden: dict[str, Tensor], tiny_tokenizer: Path
) -> None:
    """The published decoder: below one level of 255 on average, and 2 at most."""
    tokenizer = VA_VAE(tiny_tokenizer, device="cpu")
    tokenizer.model = published
    half = tokenizer.decode_latents(vae_golden["latent"], half=True)
    assert half.dtype == torch.float32 and half.is_contiguous()
    levels = (half - vae_golden["decoded"]).abs() * 127.5
    assert 0.01 < levels.mean() < 1 and levels.max() <= 2
    exact = tokenizer.decode_latents(vae_golden["latent"], tf32=True)  # a CPU has none
    torch.testing.assert_close(exact, vae_golden["decoded"], atol=1e-4, rtol=0)


@needs_half
def test_images_that_half_precision_does_not_hold_are_decoded_in_float32(two_at_once: VA_VAE) -> None:
    """Numbers beyond 65504 in the second and the fourth of five images; they go through in twos, of one shape."""
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[[1, 3]] *= 1e7
    decoder, compiled = two_at_once.model.decoder, []
    counts = counts_of(decoder)
    decoder.forward = CompiledForward(lambda self, z: compiled.append(len(z)) or Decoder.forward(self, z), decoder)
    with pytest.warns(UserWarning, match=r"^decoding in fp16 gave 2 of 5 images that are not finite; they are made in"):
        images = two_at_once.decode_latents(latents, half=True)
    assert (counts, compiled) == ([2, 2, 2, 1, 1], [2, 2, 2])  # nothing is compiled for what is rare
    for index in (1, 3):
        assert torch.equal(images[index], two_at_once.decode_latents(latents[index : index + 1])[0])
    for index in (0, 2, 4):
        alone = two_at_once.decode_latents(latents[index : index + 1], half=True)[0]
        torch.testing.assert_close(images[index], alone, atol=4e-3, rtol=0)
        assert not torch.equal(images[index], two_at_once.decode_latents(latents[index : index + 1])[0])


def test_a_gpu_takes_more_images_at_once() -> None:
    assert [vavae.images_at_once(side**2, on_gpu=True) for side in (128, 256, 512, 2048)] == [64, 16, 4, 1]


def test_encode_without_statistics_says_what_to_pass(tiny_tokenizer: Path) -> None:
    with pytest.raises(LightningDiTError, match="has no latent statistics; encode and decode need them"):
        VA_VAE(tiny_tokenizer).encode(torch.zeros(1, 3, 16, 16))


def test_published_methods_give_pixels(tiny_tokenizer: Path) -> None:
    tokenizer = VA_VAE(tiny_tokenizer)
    transform = tokenizer.img_transform(p_hflip=0.0, img_size=16)
    image = transform(Image.new("RGB", (40, 30), (255, 0, 128)))
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]))
    pixels = tokenizer.decode_to_images(tokenizer.encode_images(image.unsqueeze(0)))
    assert pixels.shape == (1, 16, 16, 3)
    assert pixels.dtype == np.uint8
