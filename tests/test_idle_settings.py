"""Settings without effect are named, and those with one are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from LightningDiT.config import load_config
from LightningDiT.idle_settings import ADAPTIVE, sampling_notes, training_notes
from LightningDiT.tokenizer.config import idle_tokenizer_settings, load_tokenizer_config
from LightningDiT.transport import ADAPTIVE_METHODS, FIXED_METHODS
from tests.conftest import BUNDLED, PACKAGE


def notes(folder: Path, text: str) -> list[str]:
    (folder / "config.yaml").write_text(text)
    config = load_config(folder / "config.yaml")
    return list(dict.fromkeys(training_notes(config) + sampling_notes(config)))  # some are said by both commands


@pytest.mark.parametrize(
    ("idle", "acts", "note"),
    [
        (
            "train: {lognorm_until_step: 5}",
            "train: {lognorm_until_step: 5}\ntransport: {use_lognorm: true}",
            "train.lognorm_until_step: no effect without transport.use_lognorm",
        ),
        (
            "train: {lognorm_until_step: 9, max_steps: 9}\ntransport: {use_lognorm: true}",
            "train: {lognorm_until_step: 8, max_steps: 9}\ntransport: {use_lognorm: true}",
            "train.lognorm_until_step: no effect at or beyond train.max_steps",
        ),
        (
            "data: {valid_path: x}\ntrain: {valid_samples: 9}",
            "data: {valid_path: x}\ntrain: {valid_samples: 9, valid_every: 5}",
            "data.valid_path, train.valid_samples: no effect without train.valid_every",
        ),
        (
            "data: {valid_path: x}\ntrain: {valid_every: 5, valid_share: 0.5}",
            "train: {valid_every: 5, valid_share: 0.5}",
            "train.valid_share: no effect with data.valid_path",
        ),
        (
            "data: {fold: 1}",
            "data: {fold: 1, split_file: x}",
            "data.fold: no effect without data.split_file",
        ),
        (
            "train: {lora_rank: 4, lora_targets: [qkv], trainable: bias}",
            "train: {lora_rank: 4, lora_targets: [qkv], trainable: lora}",
            "train.lora_rank, train.lora_targets: no effect without train.trainable: lora",
        ),
        (
            "train: {new_classes: random}",
            "train: {new_classes: random, weight_init: x}",
            "train.new_classes: no effect without train.weight_init",
        ),
        (
            "train: {trainable: bias}\noptimizer: {weight_decay: 0.1}",
            "train: {trainable: lora}\noptimizer: {weight_decay: 0.1}",
            "optimizer.weight_decay: no effect with train.trainable: bias, without matrices",
        ),
        (
            "train: {sample_count: 4}",
            "train: {sample_count: 4, sample_every: 5}",
            "train.sample_count: no effect without train.sample_every",
        ),
        (
            "train: {judge_samples: 4}\ndata: {levels_path: x}",
            "train: {judge_samples: 4, judge_every: 5}\ndata: {levels_path: x}",
            "train.judge_samples, data.levels_path: no effect without train.judge_every",
        ),
        (
            "train: {judge_every: 9, max_steps: 8}",
            "train: {judge_every: 8, max_steps: 8}",
            "train.judge_every: no effect beyond train.max_steps",
        ),
        (
            "train: {patience: 4}",
            "train: {patience: 4, judge_every: 5}",
            "train.patience: no effect with the last weights, which train.choose keeps: nothing is compared",
        ),
        (
            "train: {patience: 4, valid_every: 5, judge_every: 5, choose: last}",
            "train: {patience: 4, valid_every: 5, choose: valid_loss}",
            "train.patience: no effect with the last weights, which train.choose keeps: nothing is compared",
        ),
        (
            "train: {keep_every: 30, ckpt_every: 20, max_steps: 50}",
            "train: {keep_every: 30, ckpt_every: 20, max_steps: 60}",
            "train.keep_every: no effect at this train.ckpt_every and train.max_steps, which save no such step",
        ),
        (
            "sample: {cfg_interval_start: 0.1}",
            "sample: {cfg_interval_start: 0.1, cfg_scale: 2}",
            "sample.cfg_interval_start: no effect with the guidance scale 1",
        ),
        (
            "train: {label_dropout: 0.0}\nsample: {cfg_scale: 2}",
            "sample: {cfg_scale: 2}",
            "sample.cfg_scale guides by the null class, which train.label_dropout 0 never trains",
        ),
        (
            "model: {model_type: UNet-S, use_rope: false, use_checkpoint: true}",
            "model: {model_type: LightningDiT-XS/2, use_rope: false, use_checkpoint: true}",
            "model.use_rope, model.use_checkpoint: no effect with a U-Net, only with a transformer",
        ),
        (
            "sample: {last_step: None}",
            "sample: {mode: SDE, last_step: None}",
            "sample.last_step: no effect with sample.mode ODE",
        ),
        (
            "sample: {atol: 1.0e-3}",
            "sample: {atol: 1.0e-3, sampling_method: dopri5}",
            "sample.atol: no effect with a solver that does not adapt its steps",
        ),
        (
            "sample: {timestep_shift: 0.3, sampling_method: fast}",
            "sample: {timestep_shift: 0.3, sampling_method: published}",
            "sample.timestep_shift: no effect with this sample.sampling_method, which has a grid of its own",
        ),
    ],
)
def test_a_setting_without_effect_is_named_once(idle: str, acts: str, note: str, tmp_path: Path) -> None:
    assert notes(tmp_path, idle) == [note]
    assert notes(tmp_path, acts) == []


@pytest.mark.parametrize("path", [*sorted((PACKAGE / "configs").glob("*.yaml")), BUNDLED / "config.yaml"], ids=str)
def test_the_shipped_configurations_have_none(path: Path) -> None:
    config = load_config(path)
    assert training_notes(config) + sampling_notes(config) == []


def test_the_adaptive_solvers_are_these() -> None:
    assert all(name.startswith(ADAPTIVE) for name in ADAPTIVE_METHODS)
    assert not any(name.startswith(ADAPTIVE) for name in FIXED_METHODS)


def test_settings_of_a_tokenizer_without_effect_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.yaml"
    text = "model: {params: {embed_dim: 4, ddconfig: {ch: 32}}}\ntrain: "
    for train, expected in (
        ("{disc_layers: 2}", ["train.disc_layers: no effect with train.disc_weight 0"]),
        ("{disc_layers: 2, disc_weight: 1.0}", []),
        ("{vision_size: 224}", ["train.vision_size: no effect with train.vf_weight 0"]),
        ("{epochs: 2, max_steps: 5}", ["train.max_steps: no effect with train.epochs"]),
        (
            "{disc_weight: 1.0, disc_start: 9, max_steps: 8}",
            ["train.disc_weight: no effect, since disc_start 9 is beyond max_steps"],
        ),
    ):
        path.write_text(text + train)
        assert idle_tokenizer_settings(load_tokenizer_config(path)) == expected
    assert idle_tokenizer_settings(load_tokenizer_config(BUNDLED / "tokenizer.yaml")) == []
