"""The training of a tokenizer: its networks, what one step moves and what not, and what is drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.data.image_sets import ArrayImages
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import to_float
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import (
    TokenizerTrainConfig,
    idle_tokenizer_settings,
    load_tokenizer_config,
    tokenizer_training,
)
from LightningDiT.tokenizer.latent_space import encoder_values, same_latents
from LightningDiT.training import tokenizer_training as stage
from LightningDiT.training.guard import NotFiniteError
from LightningDiT.training.tokenizer_training import Networks, TokenizerTrainer, build_networks
from tests.test_perceptual import vgg_file  # noqa: F401 - a fixture
from tests.test_training import Waits
from tests.test_vision import VIT, vit_file  # noqa: F401 - a fixture

DDCONFIG = {"z_channels": 4, "resolution": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
SHORT = {"max_steps": 4, "batch_size": 4, "log_every": 1, "ckpt_every": 2, "warmup_steps": 0}
#: All terms; the networks' files are added.
EVERY_TERM = {
    **SHORT,
    **{"l2_weight": 0.5, "sum_values": True, "learn_logvar": True, "lpips_weight": 1.0, "flip": True},
    **{"disc_weight": 0.5, "disc_start": 2, "disc_layers": 2, "vf_weight": 0.5, "vision_model": VIT, "vision_size": 32},
}


def write_yaml(path: Path, train: dict[str, object], **params: object) -> Path:
    content = {"model": {"params": {"embed_dim": 4, "ddconfig": DDCONFIG, **params}}, "train": train}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def every_term(tmp_path: Path, vgg_file: Path, vit_file: Path) -> Path:  # noqa: F811
    """A YAML with every term of the loss."""
    files = {"lpips_weights": str(vgg_file), "vision_weights": str(vit_file)}
    return write_yaml(tmp_path / "every.yaml", EVERY_TERM | files)


def networks_of(path: Path) -> tuple[Networks, TokenizerTrainConfig]:
    tokenizer = load_tokenizer_config(path)
    config = tokenizer_training(tokenizer)
    return build_networks(tokenizer, config), config


def noise_images(count: int = 8) -> ArrayImages:
    """Random images in memory."""
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ArrayImages("noise", pixels.numpy())


def test_training_lowers_the_loss_on_one_batch(tmp_path: Path) -> None:
    networks, config = networks_of(write_yaml(tmp_path / "small.yaml", {**SHORT, "max_steps": 100}))
    trainer = TokenizerTrainer(config, networks, noise_images())
    losses = [float(trainer.step(0)["loss"]) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_discriminator_learns_and_the_frozen_networks_do_not(every_term: Path) -> None:
    networks, config = networks_of(every_term)
    trainer = TokenizerTrainer(config, networks, noise_images())
    frozen = [
        value.clone() for network in networks.criterion._frozen.values() for value in network.state_dict().values()
    ]
    judge = networks.criterion.discriminator.main[0].weight
    before, projection = judge.detach().clone(), networks.criterion.linear_proj.weight.detach().clone()
    assert "disc" not in trainer.step(0)
    assert torch.equal(judge, before)  # it starts with the second step
    assert not torch.equal(networks.criterion.linear_proj.weight, projection)
    losses = [float(trainer.step(1)["disc"]) for _ in range(12)]
    assert not torch.equal(judge, before)
    assert losses[-1] < losses[0]
    after = [value for network in networks.criterion._frozen.values() for value in network.state_dict().values()]
    assert all(torch.equal(old, new) for old, new in zip(frozen, after, strict=True))


def test_a_step_waits_for_its_device_once(every_term: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, config = networks_of(every_term)
    trainer = TokenizerTrainer(config, networks, noise_images())
    asked, real = list[int](), stage.fetched
    monkeypatch.setattr(stage, "fetched", lambda come: asked.append(len(come())) or real(come))
    for optimizer in (trainer.optimizer, trainer.disc_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda: None)  # its step counter lies on the CPU here
    with Waits() as waits:
        row = trainer.step(2)
    assert asked == [5 + len(row) - 1]  # five checks, and the terms without `data_seconds`
    assert waits.count == 0


def test_a_step_that_is_not_finite_changes_no_weight(every_term: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, config = networks_of(every_term)
    trainer = TokenizerTrainer(config, networks, noise_images())
    trainer.step(1)
    before = {name: value.clone() for name, value in trainer.weights().items()}
    with monkeypatch.context() as patch, pytest.raises(NotFiniteError, match="reconstruction of step 2 is not finite"):
        patch.setattr(trainer, "_batch", lambda step: torch.full((4, 3, 32, 32), torch.nan))
        trainer.step(2)
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights().items())
    with torch.no_grad():
        networks.criterion.discriminator.main[0].weight[0, 0, 0, 0] = float("inf")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NotFiniteError):
        trainer.step(2)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    networks, config = networks_of(write_yaml(tmp_path / "f.yaml", {**SHORT, "flip": True, "batch_size": 64}))
    images = noise_images(64)
    trainer = TokenizerTrainer(config, networks, images)
    batch, originals = trainer._batch(0), to_float(images.batch(trainer.order.indices(0).tolist()).pixels)
    mirrored = [torch.equal(seen, original.flip(-1)) for seen, original in zip(batch, originals, strict=True)]
    plain = [torch.equal(seen, original) for seen, original in zip(batch, originals, strict=True)]
    assert all(one != other for one, other in zip(mirrored, plain, strict=True))
    assert 16 < sum(mirrored) < 48


def levels_yaml(path: Path, train: dict[str, object]) -> Path:
    return write_yaml(path, train, ddconfig={**DDCONFIG, "in_channels": 1, "out_ch": 1})


def test_one_channel_is_trained_with_every_term(every_term: Path, tmp_path: Path) -> None:
    """Colours become their mean; levels stay floats."""
    train = {**yaml.safe_load(every_term.read_text())["train"], "texture_weight": 0.1}
    networks, config = networks_of(levels_yaml(tmp_path / "levels.yaml", train))
    images = noise_images()
    trainer = TokenizerTrainer(config, networks, images)
    trainer.step(1)
    row = trainer.step(2)
    assert {"l1", "l2", "texture", "lpips", "gan", "disc", "vf_cos"} <= row.keys()
    unflipped = TokenizerTrainer(replace(config, flip=False), networks, images)
    pixels = images.batch(unflipped.order.indices(0).tolist()).pixels
    torch.testing.assert_close(unflipped._batch(0), to_float(pixels).mean(1, keepdim=True))
    trainer.save_picture(tmp_path / "r.png")
    assert (tmp_path / "r.png").is_file()


def test_the_decoder_alone_is_trained_and_latents_stay(tmp_path: Path) -> None:
    whole, _ = networks_of(levels_yaml(tmp_path / "a.yaml", SHORT))
    save_weights(whole.model.state_dict(), tmp_path / "start.safetensors")
    train = {**SHORT, "trainable": "decoder", "weight_init": str(tmp_path / "start.safetensors")}
    networks, config = networks_of(levels_yaml(tmp_path / "b.yaml", train))
    trainer = TokenizerTrainer(config, networks, noise_images())
    losses = [float(trainer.step(0)["loss"]) for _ in range(6)]
    assert losses[-1] < losses[0]
    before = load_weights(tmp_path / "start.safetensors")
    for weights in (trainer.model.state_dict(), trainer.ema.weights):
        changed = {name.split(".")[0] for name, value in weights.items() if not torch.equal(value, before[name])}
        assert changed == {"decoder", "post_quant_conv"}
    assert same_latents(encoder_values(before), encoder_values(trainer.ema.weights))
    with pytest.raises(LightningDiTError, match="keeps an encoder, and no weights are named that have one; fix: give"):
        networks_of(levels_yaml(tmp_path / "c.yaml", {**SHORT, "trainable": "decoder"}))


def test_settings_that_the_decoder_alone_cannot_have(tmp_path: Path) -> None:
    path = levels_yaml(tmp_path / "a.yaml", {"trainable": "decoder", "kl_weight": 1e-3})
    [line] = idle_tokenizer_settings(load_tokenizer_config(path))
    assert line.startswith("train.kl_weight: no effect with train.trainable decoder")
    aligned = {"trainable": "decoder", "vf_weight": 0.5, "vision_model": "dinov2"}
    with pytest.raises(LightningDiTError, match="vf_weight is 0.5, but train.trainable: decoder leaves the latents"):
        tokenizer_training(load_tokenizer_config(levels_yaml(tmp_path / "b.yaml", aligned)))
    for train in ({"trainable": "encoder"}, {"texture_weight": -1.0}):
        with pytest.raises(LightningDiTError, match=rf"train.{next(iter(train))} is "):
            tokenizer_training(load_tokenizer_config(levels_yaml(tmp_path / "c.yaml", train)))


def test_windows_of_a_size_that_does_not_come_back_are_refused(tmp_path: Path) -> None:
    networks, config = networks_of(levels_yaml(tmp_path / "a.yaml", SHORT))
    settings = networks.model.settings

    def windows(height: int, width: int) -> ArrayImages:
        return ArrayImages("windows", np.zeros((2, height, width, 3), np.uint8))

    stage.check_windows(settings, config, windows(16, 32))
    with pytest.raises(LightningDiTError, match=r"57x64 pixels; sides that are multiples of 2 .* --size 56x64"):
        stage.check_windows(settings, config, windows(64, 57))
    with pytest.raises(LightningDiTError, match="the alignment needs those of ddconfig.resolution, 32"):
        stage.check_windows(settings, replace(config, vf_weight=1.0), windows(16, 16))
    with pytest.raises(
        LightningDiTError, match="images of 8 pixels are too small for the energies of texture, which needs 9"
    ):
        stage.check_windows(settings, replace(config, texture_weight=1.0), windows(8, 10))


def test_channels_go_together(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="in_channels is 1 and ddconfig.out_ch 3; both see the same images"):
        networks_of(write_yaml(tmp_path / "a.yaml", SHORT, ddconfig={**DDCONFIG, "in_channels": 1}))
    with pytest.raises(LightningDiTError, match="out_ch is 2; images have 3 channels, levels 1"):
        networks_of(write_yaml(tmp_path / "b.yaml", SHORT, ddconfig={**DDCONFIG, "out_ch": 2}))


def test_the_validation_is_the_mean_ratio_of_the_averaged_weights(tmp_path: Path) -> None:
    """By hand: the posterior's mode, clipped to the range, `10 log10(4 / mse)` of each image."""
    networks, config = networks_of(levels_yaml(tmp_path / "a.yaml", SHORT))
    images = noise_images(6)
    trainer = TokenizerTrainer(config, networks, images)
    trainer.step(0)
    model = AutoencoderKL(networks.model.settings).eval()
    model.load_state_dict(trainer.ema.weights)
    with torch.no_grad():
        originals = to_float(images.batch(range(6)).pixels).mean(1, keepdim=True)
        errors = (model.decode(model.encode(originals).mean).clamp(-1, 1) - originals).square().mean((1, 2, 3))
    assert math.isclose(trainer.validate(images), float((10 * torch.log10(4 / errors)).mean()), rel_tol=1e-5)


def test_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of 5, 7 and 6 dB: those of the second look stay, whatever a resumed run sees again."""
    networks, config = networks_of(levels_yaml(tmp_path / "a.yaml", SHORT))
    trainer = TokenizerTrainer(config, networks, noise_images())
    looks = stage._Looks(trainer, tmp_path, noise_images())
    assert looks.best() == (-math.inf, 0)
    seen = []
    for step, ratio in ((2, 5.0), (4, 7.0), (6, 6.0), (4, 7.0)):
        monkeypatch.setattr(trainer, "validate", lambda images, ratio=ratio: ratio)
        trainer.step(step)
        seen.append({name: value.clone() for name, value in trainer.ema.weights.items()})
        assert looks.observe(step) == {"valid_psnr": ratio}
    assert looks.best() == (7.0, 4)
    kept = load_weights(tmp_path / "best.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())


def test_a_published_checkpoint_gives_each_part_by_name(
    every_term: Path,
    vgg_file: Path,  # noqa: F811
    vit_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It holds LPIPS and the vision model too, so that no other file is needed."""
    networks, _ = networks_of(every_term)
    generator = torch.Generator().manual_seed(3)
    parts = {**networks.model.state_dict(), **networks.criterion.state_dict()}
    weights = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 5
        for name, value in parts.items()
    }
    vgg = load_weights(vgg_file)
    named = networks.criterion._frozen["perceptual"].model.state_dict()
    weights |= {f"loss.perceptual_loss.{name}": value for name, value in named.items()}
    weights |= {f"foundation_model.model.{name}": value for name, value in load_weights(vit_file).items()}
    torch.save({"state_dict": weights}, tmp_path / "published.pt")
    train = {**EVERY_TERM, "weight_init": "published.pt"}
    capsys.readouterr()
    started, config = networks_of(write_yaml(tmp_path / "tune.yaml", train))
    for name, value in {**started.model.state_dict(), **started.criterion.state_dict()}.items():
        assert torch.equal(value, weights[name]), name
    frozen = started.criterion._frozen
    assert torch.equal(frozen["perceptual"].model.net.slice1[0].weight, vgg["features.0.weight"])
    assert torch.equal(frozen["vision"].model.cls_token, load_weights(vit_file)["cls_token"])
    said = capsys.readouterr().out
    count = len(networks.model.state_dict())
    for line in (
        f"autoencoder: {count} tensors taken",
        "logarithm of the scale (loss.logvar): 1 tensors taken",
        f"LPIPS (loss.perceptual_loss): {len(named)} tensors taken",
        f"vision model (foundation_model): {len(load_weights(vit_file))} tensors taken",
    ):
        assert line in said, line
    assert math.isfinite(TokenizerTrainer(config, started, noise_images()).step(1)["loss"])


def test_what_has_no_place_is_listed(every_term: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks, _ = networks_of(every_term)
    weights = {
        **networks.model.state_dict(),
        **networks.criterion.state_dict(),
        "loss.perceptual_loss.x": torch.ones(1),
    }
    weights["foundation_model.model.y"] = torch.ones(1)
    save_weights(weights, tmp_path / "all.safetensors")
    capsys.readouterr()
    networks_of(write_yaml(tmp_path / "small.yaml", {**SHORT, "weight_init": "all.safetensors"}))
    said = capsys.readouterr().out
    assert "discriminator (loss.discriminator): 16 tensors left out, the training has no loss.discriminator" in said
    assert "projection (linear_proj): 1 tensors left out, the training has no linear_proj.weight" in said
    assert "LPIPS (loss.perceptual_loss): 1 tensors left out, the training needs none" in said
    assert "vision model (foundation_model): 1 tensors left out" in said
    weights["loss.discriminator.main.0.weight"] = torch.ones(64, 1, 4, 4)
    save_weights(weights, tmp_path / "all.safetensors")
    two = {**SHORT, "disc_weight": 1.0, "disc_layers": 2, "weight_init": "all.safetensors"}
    networks_of(write_yaml(tmp_path / "two.yaml", two))
    said = capsys.readouterr().out
    assert "left out, loss.discriminator.main.0.weight is [64, 1, 4, 4]; [64, 3, 4, 4] is expected" in said
    only = networks.model.state_dict()
    save_weights(only, tmp_path / "all.safetensors")
    networks_of(tmp_path / "two.yaml")
    assert "discriminator (loss.discriminator): not in the file, starts new" in capsys.readouterr().out
    save_weights({**only, "loss.sum": torch.ones(1)}, tmp_path / "all.safetensors")
    with pytest.raises(LightningDiTError, match="1 unknown: loss.sum"):
        networks_of(tmp_path / "small.yaml")
