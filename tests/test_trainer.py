"""One step of the transformer's training: what each setting does to it, and what a resumed run must share."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from LightningDiT import train
from LightningDiT.config import load_config, setting_differences
from LightningDiT.errors import LightningDiTError
from LightningDiT.training import loop
from LightningDiT.training.guard import NotFiniteError
from tests.test_train import configured, rows_of, run, spike_at, with_training
from tests.test_train import small as small


def trainer_of(folder: Path, **changes: object) -> train.Trainer:
    """Return the trainer of a small run in float32, unless its settings of the training say otherwise."""
    return train.Trainer(with_training(load_config(configured(folder, "one")), **{"precision": "fp32"} | changes))


def with_scale(trainer: train.Trainer, scale: float) -> train.Trainer:
    """Give a trainer in half precision another loss scale."""
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": scale})
    return trainer


def test_an_average_with_a_decay_of_zero_is_the_model(small: Path) -> None:
    trainer = trainer_of(small, ema_decay=0.0)
    for step in range(3):
        trainer.step(step)
    own = trainer.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in trainer.ema.weights.items())


def test_the_averaged_model_drops_nothing(small: Path) -> None:
    assert not trainer_of(small).averaged_model().training


def test_a_gradient_is_clipped_to_its_largest_norm_and_its_own_norm_is_told(small: Path) -> None:
    config = load_config(configured(small, "one"))
    trainer = train.Trainer(replace(config, optimizer=replace(config.optimizer, max_grad_norm=1e-3)))
    assert trainer.step(0)["gradient_norm"] > 1e-2
    gradients = [value.grad.flatten() for value in trainer.model.parameters() if value.grad is not None]
    assert float(torch.cat(gradients).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_micro_batches_count_by_their_samples(small: Path) -> None:
    """Three samples and one have the mean and the gradient of four."""
    whole, parts = (trainer_of(small, micro_batch_size=size).step(0) for size in (None, 3))
    for name in ("loss", "cos_loss", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_the_loss_scale_is_taken_out_of_the_gradient_before_it_is_clipped(small: Path) -> None:
    whole, half = trainer_of(small), with_scale(trainer_of(small, precision="fp16"), 256.0)
    assert half.step(0)["gradient_norm"] == pytest.approx(whole.step(0)["gradient_norm"], rel=0.02)


def test_the_loss_scale_goes_on_where_it_was(small: Path) -> None:
    first, second = (trainer_of(small, precision="fp16") for _ in range(2))
    second.load_state_dict(with_scale(first, 8.0).state_dict())
    assert second.scaler.scale == 8.0


def test_a_step_that_seeks_the_loss_scale_is_no_trouble(small: Path) -> None:
    with pytest.raises(NotFiniteError) as raised:
        with_scale(trainer_of(small, precision="fp16"), 2.0**40).step(0)
    assert not raised.value.counts


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("data", {"latent_norm": False}, "data.latent_norm: default there, false now"),
        ("train", {"global_seed": 1}, "seed: 0 there, 1 now"),
        ("train", {"global_batch_size": 6}, "batch: 4 there, 6 now"),
    ],
)
def test_a_resumed_run_keeps_the_scale_of_its_latents_its_seed_and_its_batch(
    section: str, change: dict[str, object], said: str, small: Path
) -> None:
    config = load_config(configured(small, "one"))
    other = replace(config, **{section: replace(getattr(config, section), **change)})
    assert setting_differences(train.Trainer(config).settings, train.Trainer(other).settings) == [said]


def test_an_average_that_is_not_finite_is_not_written(small: Path) -> None:
    trainer, path = trainer_of(small), small / "weights.safetensors"
    next(iter(trainer.ema.weights.values())).view(-1)[0] = math.nan
    with pytest.raises(LightningDiTError, match=r"1 tensors of the averaged weights are not finite"):
        loop._save_average(trainer.ema, path, {})
    assert not path.exists()


def test_a_lowered_rate_stays_lowered_when_the_run_goes_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the step that went back, where no later one does."""
    curves = SimpleNamespace(add=lambda row: None)  # to draw them takes longer than to train
    monkeypatch.setattr(loop, "LiveCurves", lambda folder: contextlib.nullcontext(curves))
    spike_at(small, 33)
    config = configured(small, "parts", 48, "ckpt_every: 16")
    assert train.main(["--config", str(config), "--max-steps", "44"]) == 0
    assert rows_of(config)[-1]["rate_scale"] == 0.5
    run(config)
    assert [row["rate_scale"] for row in rows_of(config) if row["step"] > 44] == [0.5, 0.5]
