"""Which tokenizer made which latents: compared by values that a conversion keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.dry_run import verify_config
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.latent_space import KEY, check_tokenizer_of_latents, encoder_values, same_latents


def changed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name: value + 0.1 if name.startswith(prefix) else value for name, value in weights.items()}


def write_values(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({KEY: encoder_values(weights)}))


def test_the_values_survive_a_conversion_and_tell_encoders_apart(tiny_folder: Path) -> None:
    weights = load_weights(tiny_folder / "tokenizer.safetensors")
    values = encoder_values(weights)
    assert len(values) > 10
    for dtype in (torch.float16, torch.bfloat16):
        assert same_latents(values, encoder_values({name: value.to(dtype) for name, value in weights.items()}))
        both = {name: value.to(torch.float16).to(dtype) for name, value in weights.items()}
        assert same_latents(encoder_values(both), values)
    assert same_latents(values, encoder_values(changed(weights, "decoder.")))
    assert not same_latents(values, encoder_values(changed(weights, "encoder.")))
    assert not same_latents(values, values[1:])


def test_a_tokenizer_that_did_not_make_the_latents_is_refused(tiny_folder: Path) -> None:
    weights = load_weights(tiny_folder / "tokenizer.safetensors")
    path = tiny_folder / "config.yaml"
    verify_config(path)  # no manifest
    write_values(tiny_folder, weights)
    verify_config(path)
    save_weights({name: value.half() for name, value in weights.items()}, tiny_folder / "tokenizer.safetensors")
    verify_config(path)
    write_values(tiny_folder, changed(weights, "quant_conv."))
    message = rf"^latents in {tiny_folder} were made with another tokenizer than .*tokenizer.safetensors; fix: set vae"
    for open_it in (verify_config, LightningDiTPipeline.from_config):
        with pytest.raises(LightningDiTError, match=message):
            open_it(path)


def test_latents_of_two_tokenizers_are_not_validated_on(tiny_folder: Path) -> None:
    weights = load_weights(tiny_folder / "tokenizer.safetensors")
    path = tiny_folder / "config.yaml"
    path.write_text(path.read_text().replace("data_path: .", "data_path: ., valid_path: held"))
    write_values(tiny_folder, weights)
    for theirs, fits in ((weights, True), (changed(weights, "encoder."), False)):
        write_values(tiny_folder / "held", theirs)
        if fits:
            check_tokenizer_of_latents(load_config(path))
        else:
            with pytest.raises(
                LightningDiTError, match=r"and those in .*held were made with different tokenizers; fix"
            ):
                check_tokenizer_of_latents(load_config(path))
