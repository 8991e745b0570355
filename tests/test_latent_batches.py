"""Batches with a second label and with augmented latents, what is dropped of them, and a training on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from LightningDiT import train
from LightningDiT.checkpoint import inspect, save_weights
from LightningDiT.config import Config, load_config
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.distributed import ALONE
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import build_transport
from LightningDiT.models import lightningdit
from LightningDiT.models.adapters import matrix_names
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.training.latent_batches import LatentBatches, dropped_labels, not_augmented
from LightningDiT.training.monitors import Validation
from LightningDiT.training.transformer_training import settings_text, weights_metadata

CONFIG = """
data: {data_path: latents, image_size: 16, num_classes: 4, num_conditions: 3}
vae: {downsample_ratio: 4}
model: {model_type: LightningDiT-XXS/2, in_chans: 4, augmentation: 2}
train: {max_steps: 40, global_batch_size: 6, precision: fp32}
optimizer: {lr: 1.0e-2}
"""
WINDOWS = torch.arange(40) // 2  # two latents of each window


def write_latents(folder: Path, conditions: bool = True, names: list[str] | None = None) -> None:
    """Write 40 latents of 4 classes and 3 conditions; every second one is augmented."""
    draws = torch.Generator().manual_seed(3)
    latents, told = torch.randn(40, 4, 4, 4, generator=draws), torch.rand(40, 2, generator=draws)
    extras = {"augmentation": told * (torch.arange(40) % 2)[:, None], "windows": WINDOWS}
    if conditions:
        extras["conditions"] = torch.arange(40) % 3
    write_shard(shard_path(folder, 0, 0), latents, torch.arange(40) % 4, extras=extras)
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.ones(1, 4, 1, 1)).save(folder / "latents_stats.pt")
    if names:
        (folder / LATENTS_MANIFEST).write_text(json.dumps({"condition_names": names}))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", (2, 16, 2))
    write_latents(tmp_path / "latents")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return load_config(tmp_path / "config.yaml")


def changed(config: Config, section: str, **values: object) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def test_one_draw_of_a_row_says_which_labels_are_dropped(config: Config) -> None:
    """Below p both, up to 2p the condition, up to 3p the class; without conditions the bits are those of before."""
    draws = torch.tensor([0.0, 0.0999, 0.1001, 0.1999, 0.2001, 0.2999, 0.3001, 0.9999])
    labels = torch.tensor([[1, 2]]).repeat(8, 1)
    both, condition, person, neither = [4, 3], [1, 3], [4, 2], [1, 2]
    expected = [both, both, condition, condition, person, person, neither, neither]
    assert dropped_labels(config, labels, draws).tolist() == expected
    plain = changed(config, "data", num_conditions=0)
    assert dropped_labels(plain, labels[:, 0], draws).tolist() == [4, 4, 1, 1, 1, 1, 1, 1]
    none = changed(config, "train", label_dropout=0.0)
    assert torch.equal(dropped_labels(none, labels, draws), labels)


def test_a_batch_has_both_labels_and_the_augmentation_of_its_rows(config: Config) -> None:
    data = LatentBatches(changed(config, "train", label_dropout=0.0), build_transport(config))
    batch = data.make(2)
    assert torch.equal(batch.labels, torch.stack([batch.samples % 4, batch.samples % 3], 1))
    assert torch.equal(batch.augmentation, data.shards.augmentation[batch.samples])
    parts = batch.micro_batches(4)
    assert [part.augmentation.shape for part in parts] == [(4, 2), (2, 2)]
    assert torch.equal(torch.cat([part.augmentation for part in parts]), batch.augmentation)
    dropping = LatentBatches(config, build_transport(config))
    labels = torch.cat([dropping.make(step).labels for step in range(60)])  # 360 rows
    nulls = [float((labels[:, column] == null).float().mean()) for column, null in ((0, 4), (1, 3))]
    assert nulls == pytest.approx([0.2, 0.2], abs=0.06)  # three standard deviations


def test_windows_are_held_out_whole_and_validated_on_as_they_are(config: Config) -> None:
    held = changed(config, "train", valid_share=0.25, valid_every=1)
    data = LatentBatches(held, build_transport(config))
    trained, held_out = set(WINDOWS[data.samples].tolist()), set(WINDOWS[data.held_out].tolist())
    assert (len(held_out), len(data.held_out), trained & held_out) == (5, 10, set())
    trainer = train.Trainer(held)
    validation = Validation(held, data, trainer.averaged_model(), ALONE)
    own = data.held_out[data.held_out % 2 == 0]  # the others are augmented
    assert torch.equal(validation.labels, torch.stack([own % 4, own % 3], 1))


def test_a_latent_is_augmented_if_one_of_its_values_says_so() -> None:
    shards = SimpleNamespace(augmentation=torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.3, 0.0]]))
    assert not_augmented(shards, torch.tensor([2, 1, 0])).tolist() == [1]


def test_the_network_learns_from_both_labels_and_the_augmentation(config: Config) -> None:
    trainer = train.Trainer(config)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for step in range(4):
        trainer.step(step)
    for name in ("y_embedder.embedding_table.weight", "c_embedder.embedding_table.weight", "a_embedder.weight"):
        assert not torch.equal(trainer.model.state_dict()[name], start[name]), name


def test_conditions_of_validation_latents_count_by_name(config: Config) -> None:
    folder = Path(config.source).parent
    write_latents(folder / "latents", names=["bag", "free", "line"])
    write_latents(folder / "held", names=["line", "bag", "free"])
    valid = changed(changed(config, "data", valid_path=str(folder / "held")), "train", valid_every=1)
    trainer = train.Trainer(valid)
    labels = Validation(valid, trainer.data, trainer.averaged_model(), ALONE).labels
    own = torch.arange(0, 40, 2)
    assert labels[:, 1].tolist() == [(2, 0, 1)[number % 3] for number in own.tolist()]
    assert json.loads(trainer.metadata["condition_names"]) == ["bag", "free", "line"]
    write_latents(folder / "held", names=["line", "bag", "coat"])
    with pytest.raises(LightningDiTError, match="have the condition 'coat', which latents in"):
        Validation(valid, trainer.data, trainer.averaged_model(), ALONE)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "model",
            {"augmentation": 0},
            "tell their augmentation in 2 values; model.augmentation is 0; fix: set model.aug",
        ),
        ("model", {"augmentation": 3}, "tell their augmentation in 2 values; model.augmentation is 3"),
        (
            "data",
            {"num_conditions": 2},
            "have the condition 2; data.num_conditions is 2; fix: set data.num_conditions: 3",
        ),
        ("train", {"label_dropout": 0.34}, "label_dropout is 0.34; with data.num_conditions a third is the most"),
    ],
)
def test_latents_and_settings_that_differ_are_refused(
    section: str, values: dict[str, object], message: str, config: Config
) -> None:
    other = changed(config, section, **values)
    with pytest.raises(LightningDiTError, match=message):
        LatentBatches(other, build_transport(config))


def test_latents_without_conditions_are_refused_or_said(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(config.data.data_path or "")
    write_latents(folder, conditions=False)
    with pytest.raises(LightningDiTError, match="have no conditions; data.num_conditions is 3"):
        LatentBatches(config, build_transport(config))
    write_latents(folder, names=["bag", "free", "line"])
    plain = changed(config, "data", num_conditions=0)
    assert "condition_names" not in train.Trainer(plain).metadata
    assert f"note: the 3 conditions of latents in {folder} are not learnt" in capsys.readouterr().out


def test_weight_decay_is_that_of_adamw_on_matrices_alone(config: Config) -> None:
    """Beside torch's AdamW with a group for the matrices: the same weights, up to the rounding of a product.

    The learning rate rises meanwhile, and the decay with it; the second moment has a decay of its own.
    """
    config = changed(changed(config, "train", warmup_steps=8), "optimizer", beta2=0.5)
    ours = train.Trainer(changed(config, "optimizer", weight_decay=0.3))
    theirs, plain = train.Trainer(config), train.Trainer(config)
    names = matrix_names(theirs.model)
    groups = [
        {"params": [value for name, value in theirs.model.named_parameters() if (name in names) == decays]}
        | {"weight_decay": 0.3 if decays else 0.0}
        for decays in (True, False)
    ]
    theirs.optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=(0.9, 0.5))
    for step in range(4):
        for trainer in (ours, theirs, plain):
            trainer.step(step)
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name], rtol=0, atol=1e-7)
    moved = [
        name
        for name, value in ours.model.state_dict().items()
        if not torch.equal(value, plain.model.state_dict()[name])
    ]
    assert set(names) <= set(moved)
    assert len(ours.optimizer.param_groups) == 1  # so that checkpoints go on with any decay


def test_dropout_depends_on_seed_step_and_process_alone(config: Config) -> None:
    def norms(rank: int, dropout: float = 0.5) -> list[float]:
        trainer = train.Trainer(changed(config, "model", dropout=dropout))
        for value in trainer.model.parameters():  # else no branch has an effect yet
            value.data += 0.05
        trainer.processes = replace(ALONE, rank=rank)
        torch.rand(rank + 3)  # what others draw in between
        return [float(trainer.step(step)["gradient_norm"]) for step in range(2)]

    first = norms(0)
    torch.rand(5)
    assert norms(0) == first
    assert norms(1) != first
    assert norms(0, 0.0) == norms(1, 0.0) != first


def test_parameters_without_a_part_are_found(config: Config) -> None:
    trainer = train.Trainer(config)
    assert not trainer._leaves_out_parameters()
    trainer.model.idle = nn.Linear(2, 2)
    assert trainer._leaves_out_parameters()
    assert all(value.grad is None for value in trainer.model.parameters())


def test_whether_the_null_class_is_trained_is_kept(config: Config, tmp_path: Path) -> None:
    def told(label_dropout: float, weights: str | None = None) -> str | None:
        path = weights and str(tmp_path / weights)
        own = changed(config, "train", label_dropout=label_dropout, weight_init=path)
        return weights_metadata(own, None, None).get("null_trained")

    for name, metadata in (("yes", {"null_trained": "true"}), ("no", {"null_trained": "false"}), ("unsaid", {})):
        save_weights({"value": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata)
    assert [told(0.1), told(0.0), told(0.1, "no.safetensors")] == ["true", "false", "true"]
    found = [told(0.0, f"{name}.safetensors") for name in ("yes", "no", "unsaid", "gone")]
    assert found == ["true", "false", "true", None]
    assert inspect(tmp_path / "no.safetensors").metadata == {"null_trained": "false"}


def test_a_run_that_ends_within_its_rise_says_so(config: Config) -> None:
    rising = changed(config, "train", warmup_steps=20)
    assert "ends the run within that rise, at a learning rate of 0.0025" in settings_text(rising, False, 5)
    assert "that rise" not in settings_text(rising, False, 20)


def test_a_unet_trains_in_the_same_loop(config: Config) -> None:
    pytest.importorskip("diffusers")
    from LightningDiT.models import unet

    unet.UNET_PRESETS["XXS"] = ((32, 64), 1, (False, True))
    try:
        trainer = train.Trainer(changed(config, "model", model_type="UNet-XXS", dropout=0.1))
        losses = [trainer.step(step)["loss"] for step in range(12)]
        assert sum(losses[-4:]) < sum(losses[:4])
        assert not trainer._leaves_out_parameters()
        averaged = trainer.averaged_model().state_dict()
        assert all(torch.equal(value, averaged[name]) for name, value in trainer.ema.weights.items())
    finally:
        del unet.UNET_PRESETS["XXS"]
