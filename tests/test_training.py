"""Training: the order of the data, the average, and that a stopped run goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from LightningDiT import train, train_tokenizer
from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import TokenizerTrainConfig
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.training import BatchOrder, Ema, RunFolder, learning_rate
from tests.test_data import fashion_folder  # noqa: F401 - a fixture


def test_an_epoch_sees_every_sample_once_and_needs_no_history() -> None:
    order = BatchOrder(count=12, batch_size=4, seed=1)
    epoch = [order.indices(step).tolist() for step in range(3)]
    assert sorted(index for batch in epoch for index in batch) == list(range(12))
    fresh = BatchOrder(count=12, batch_size=4, seed=1)
    assert fresh.indices(2).tolist() == epoch[2]
    assert fresh.indices(3).tolist() != epoch[0]
    with pytest.raises(LightningDiTError, match="a batch of 20 is asked of 12 samples"):
        BatchOrder(count=12, batch_size=20, seed=1)


def test_the_average_is_the_weighted_sum() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema = Ema(module, decay=0.5)
    expected = 1.0
    for step, value in enumerate((3.0, 5.0, 7.0), 1):
        module.weight.data.fill_(value)
        ema.update(module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert math.isclose(float(ema.weights["weight"]), expected, rel_tol=1e-6)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [learning_rate(step, 1.0, warmup=10, decay=40, total=100) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[30] == rates[60] == 1.0
    assert math.isclose(rates[80], 0.5)  # the middle of the cosine
    assert rates[99] < 0.002
    assert math.isclose(rates[70], 0.5 + 0.5 * math.sqrt(0.5))  # a cosine and no line
    assert learning_rate(200, 1.0, warmup=10, decay=40, total=100) == 0.0  # it never rises again
    assert learning_rate(5, 2.0, 0, 0, 10) == 2.0


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.latest() is None
    for step in (5, 50, 500):
        run.save(step, {"value": torch.tensor(step)})
    assert [path.name for path in run.checkpoints()] == ["checkpoint-0000050.pt", "checkpoint-0000500.pt"]
    latest = run.latest()
    assert latest is not None
    assert (latest["step"], int(latest["value"])) == (500, 500)


@pytest.fixture
def training_config(tiny_folder: Path) -> Path:
    """A configuration whose folder holds 16 latents of three classes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 4, 8, 8, generator=generator)
    write_shard(shard_path(tiny_folder / "latents", 0, 0), latents, torch.arange(16) % 3, latents.flip(-1))
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.ones(1, 4, 1, 1)).save(
        tiny_folder / "latents" / "latents_stats.pt"
    )
    text = (tiny_folder / "config.yaml").read_text().replace("data_path: .", "data_path: latents")
    text += "train: {max_steps: 6, global_batch_size: 4, output_dir: runs, log_every: 2, ckpt_every: 2}\n"
    text += "optimizer: {lr: 1.0e-3, max_grad_norm: 1.0}\ntransport: {use_cosine_loss: true, use_lognorm: true}\n"
    (tiny_folder / "config.yaml").write_text(text)
    return tiny_folder / "config.yaml"


def test_a_stopped_run_ends_with_the_same_weights(training_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> dict[str, torch.Tensor]:
        arguments = ["--config", str(training_config), "--output", str(training_config.parent / name)]
        assert train.main(arguments) == 0
        return load_weights(training_config.parent / name / "transformer.safetensors")

    whole = run("whole")
    real_step = train.Trainer.step

    def step_until_stopped(self: train.Trainer, step: int) -> object:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the middle of a step, which is then finished
        return real_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step_until_stopped)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert RunFolder(training_config.parent / "stopped").checkpoints()[-1].name == "checkpoint-0000004.pt"
    resumed = run("stopped")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    rows = [json.loads(line) for line in (training_config.parent / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(0 < row["cos_loss"] < 2 and row["loss"] > 0 for row in rows)


def test_training_lowers_the_loss_on_one_batch(training_config: Path) -> None:
    trainer = train.Trainer(train.load_config(training_config))
    losses = [float(trainer.step(0)["loss"].detach()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_of_other_settings_is_refused(training_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(training_config), "--output", str(training_config.parent / "run")]
    assert train.main(arguments) == 0
    text = training_config.read_text()
    training_config.write_text(text.replace("use_lognorm: true", "use_lognorm: false"))
    with pytest.raises(LightningDiTError, match="holds a run of other settings .transport: "):
        train.main(arguments)
    training_config.write_text(text.replace("max_steps: 6", "max_steps: 8, resume: false"))
    with pytest.raises(LightningDiTError, match="holds checkpoints and train.resume is false"):
        train.main(arguments)
    training_config.write_text(text.replace("max_steps: 6", "max_steps: 8"))
    assert train.main(arguments) == 0
    assert "going on from step 6" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    training_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_batch = train.Trainer.batch

    def batch_with_nan(self: train.Trainer, step: int) -> object:
        latents, labels, generator = real_batch(self, step)
        return latents * (float("nan") if step == 3 else 1.0), labels, generator

    monkeypatch.setattr(train.Trainer, "batch", batch_with_nan)
    run = training_config.parent / "run"
    with pytest.raises(LightningDiTError, match="the loss of step 3 is not finite"):
        train.main(["--config", str(training_config), "--output", str(run)])
    latest = RunFolder(run).latest()
    assert latest is not None
    assert latest["step"] == 2
    assert all(value.isfinite().all() for value in latest["ema"].values())


def test_fine_tuning_starts_from_half_precision_weights(training_config: Path) -> None:
    source = training_config.parent / "half.safetensors"
    weights = load_weights(training_config.parent / "transformer.safetensors")
    save_weights({name: value.half() for name, value in weights.items()}, source)
    training_config.write_text(
        training_config.read_text().replace("max_steps: 6", "max_steps: 6, weight_init: half.safetensors")
    )
    trainer = train.Trainer(train.load_config(training_config))
    parameters = dict(trainer.model.named_parameters())
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    assert not parameters["pos_embed"].requires_grad
    torch.testing.assert_close(
        parameters["blocks.0.attn.qkv.weight"].half(), weights["blocks.0.attn.qkv.weight"].half()
    )
    assert float(trainer.step(0)["loss"].detach()) > 0


def test_the_average_goes_on_where_it_was() -> None:
    module = nn.Linear(2, 2)
    first, second = Ema(module, 0.9), Ema(nn.Linear(2, 2), 0.9)
    second.load_state_dict(first.state_dict())
    first.weights["weight"].add_(1)  # the copy has tensors of its own
    torch.testing.assert_close(second.weights["weight"], module.weight.detach())


def test_latents_of_another_shape_or_class_are_named(training_config: Path) -> None:
    text = training_config.read_text()
    training_config.write_text(text.replace("image_size: 16", "image_size: 32"))
    with pytest.raises(LightningDiTError, match=r"have the shape \(4, 8, 8\); .* expects \(4, 16, 16\)"):
        train.main(["--config", str(training_config)])
    names = 'num_classes: 3, class_names: ["cat, house cat", dog, "sea lion"]'
    training_config.write_text(text.replace(names, "num_classes: 2"))
    with pytest.raises(LightningDiTError, match="the label 2; data.num_classes is 2"):
        train.main(["--config", str(training_config)])


def test_the_reconstruction_loss_is_the_sum_of_its_terms() -> None:
    class Shift(nn.Module):
        """A tokenizer that moves every value by a half and knows its posterior."""

        def encode(self, images: torch.Tensor) -> object:
            from LightningDiT.tokenizer.autoencoder import DiagonalGaussian

            return DiagonalGaussian(images, torch.full_like(images, -30.0))

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents + 0.5

    images = torch.zeros(2, 3, 4, 4)
    config = TokenizerTrainConfig(l1_weight=2.0, l2_weight=4.0, kl_weight=0.01)
    terms = train_tokenizer.reconstruction_loss(Shift(), images, config, torch.Generator().manual_seed(0))
    kl = 0.5 * (math.exp(-30) - 1 + 30) * 48
    assert math.isclose(float(terms["l1"]), 0.5, rel_tol=1e-4)
    assert math.isclose(float(terms["l2"]), 0.25, rel_tol=1e-4)
    assert math.isclose(float(terms["loss"]), 2 * 0.5 + 4 * 0.25 + 0.01 * kl, rel_tol=1e-3)


def test_the_tokenizer_trains_and_goes_on(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "tokenizer.yaml").write_text(
        "model: {params: {embed_dim: 4, ddconfig: {z_channels: 4, resolution: 32, ch: 32, ch_mult: [1, 1],"
        " num_res_blocks: 1, attn_resolutions: []}}}\n"
        "train: {max_steps: 4, batch_size: 4, log_every: 1, ckpt_every: 2, warmup_steps: 0}\n"
    )

    def run(name: str, *more: str) -> int:
        command = ["--config", str(tmp_path / "tokenizer.yaml"), "--data-root", str(fashion_folder)]
        return train_tokenizer.main([*command, "--output", str(tmp_path / name), *more])

    assert run("whole") == 0
    assert run("parts", "--max-steps", "2") == 0
    assert run("parts") == 0
    whole, parts = (load_weights(tmp_path / name / "tokenizer.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
