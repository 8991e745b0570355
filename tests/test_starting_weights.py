"""A tokenizer of one channel from the weights of three: exactly the network on replicated levels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import load_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, TokenizerTrainConfig, load_tokenizer_config
from LightningDiT.tokenizer.criterion import Criterion
from LightningDiT.tokenizer.starting_weights import one_channel, read_starting_weights, start_from
from LightningDiT.tokenizer.vavae import autoencoder_settings, load_autoencoder
from tests.conftest import BUNDLED


@pytest.mark.parametrize("shape", [(32, 32), (64, 64)])
@torch.no_grad()
def test_one_channel_starts_as_the_bundled_network_on_replicated_levels(shape: tuple[int, int]) -> None:
    """`sum_c W_c * x = W * (x, x, x)`: the same latents; and the mean of the three outputs."""
    colours = load_autoencoder(load_tokenizer_config(BUNDLED / "tokenizer.yaml"), BUNDLED / "tokenizer.safetensors")
    model = AutoencoderKL(autoencoder_settings(load_tokenizer_config(TOKENIZER_CONFIGS / "levels_f4d6.yaml"))).eval()
    lines = start_from(read_starting_weights(BUNDLED), model, Criterion(TokenizerTrainConfig(), 6))
    assert (
        "one channel from several: first kernel summed over its 3 inputs, last layer averaged over its 3 outputs"
        in lines
    )
    levels = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model, colours, levels = model.double(), colours.double(), levels.double()
    ours, theirs = model.encode(levels).mean, colours.encode(levels.repeat(1, 3, 1, 1)).mean
    assert float((ours - theirs).abs().max()) < 1e-6
    decoded = model.decode(theirs)
    assert decoded.shape == (2, 1, *shape)
    torch.testing.assert_close(decoded, colours.decode(theirs).mean(1, keepdim=True), atol=1e-6, rtol=0)


def test_weights_of_as_many_channels_are_left_as_they_are() -> None:
    weights = load_weights(BUNDLED / "tokenizer.safetensors")
    model = AutoencoderKL(autoencoder_settings(load_tokenizer_config(BUNDLED / "tokenizer.yaml")))
    tensors, plan = one_channel(weights, model)
    assert plan == []
    assert all(tensors[name] is weights[name] for name in weights)
    grey = AutoencoderKL(replace(model.settings, in_channels=1, out_ch=1))
    again, plan = one_channel(one_channel(weights, grey)[0], grey)  # of one channel already
    assert plan == []
    assert again["decoder.conv_out.bias"].shape == (1,)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"tokenizer.safetensors"):
        read_starting_weights(tmp_path)
