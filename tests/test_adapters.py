"""A training of a part of a network: what is trained, its file, its checkpoints, and the way back into the weights."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from LightningDiT import train
from LightningDiT.checkpoint import inspect, load_training_state, load_weights, save_weights
from LightningDiT.config import Config, load_config
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import Network, load_transformer, make_model
from LightningDiT.models import lightningdit
from LightningDiT.models.adapters import base_digest, bias_names, matching_names, matrix_names, merged, product_names
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
from LightningDiT.models.unet import UNetSettings
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tools import merge_adapter
from LightningDiT.training import loop
from LightningDiT.training.trainable import add_adapters
from tests.conftest import seed_weights

SMALLEST = (2, 16, 2)  # layers, width and heads
SETTINGS = LightningDiTSettings(
    **{"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2},
    **{"num_classes": 5, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "num_conditions": 2},
)
UNET = UNetSettings(input_size=4, in_channels=4, num_classes=5, widths=(32, 64), layers=1, attends=(False, True))
CONFIG = """
ckpt_path: source.safetensors
{adapter}
data: {{data_path: latents, image_size: 16, num_classes: 3, num_conditions: 2}}
vae: {{downsample_ratio: 4}}
model: {{model_type: LightningDiT-XXS/2, in_chans: 4, augmentation: 3, dropout: 0.2}}
train: {{max_steps: 6, global_batch_size: 4, output_dir: runs, exp_name: {name}, log_every: 6, ckpt_every: 3,
  weight_init: source.safetensors, precision: fp32, lora_rank: 2, {more}}}
optimizer: {{lr: 1.0e-2, weight_decay: 0.1}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Latents with conditions and augmentation, and weights of five classes, without a second label."""
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", SMALLEST)
    curves = SimpleNamespace(add=lambda row: None)  # to draw them takes longer than to train
    monkeypatch.setattr(loop, "LiveCurves", lambda folder: contextlib.nullcontext(curves))
    draws = torch.Generator().manual_seed(0)
    latents, told = torch.randn(24, 4, 4, 4, generator=draws), torch.rand(24, 3, generator=draws)
    extras = {"conditions": torch.arange(24) % 2, "augmentation": told}
    write_shard(shard_path(tmp_path / "latents", 0, 0), latents, torch.arange(24) % 3, extras=extras)
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.ones(1, 4, 1, 1)).save(tmp_path / "latents" / "latents_stats.pt")
    source = seed_weights(LightningDiT(replace(SETTINGS, num_conditions=0)))
    save_weights(source.state_dict(), tmp_path / "source.safetensors", {"null_trained": "false"})
    return tmp_path


def configured(folder: Path, name: str, more: str, adapter: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.format(name=name, more=more, adapter=adapter and f"adapter_path: {adapter}"))
    return path


def adapter_of(folder: Path, name: str) -> dict[str, Tensor]:
    return load_weights(folder / "runs" / name / "adapter.safetensors")


def sampled(config: Config) -> Network:
    """Return the network that the pipeline would sample from."""
    return load_transformer(config)


def predictions(model: nn.Module) -> Tensor:
    """Return what a network of latents (4, 4, 4) with conditions predicts for two states."""
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([0.2, 0.7]), torch.tensor([[0, 1], [2, 0]]))


@pytest.mark.parametrize("settings", [SETTINGS, replace(UNET, num_conditions=2)], ids=["transformer", "unet"])
def test_merged_weights_predict_as_peft_does(settings: LightningDiTSettings | UNetSettings) -> None:
    """peft computes W x + B A x, and the merged network (W + B A) x; convolutions of the U-Net too."""
    pytest.importorskip("peft")
    if isinstance(settings, UNetSettings):
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain = seed_weights(make_model(settings)).double()
    base, products = {name: value.clone() for name, value in plain.state_dict().items()}, product_names(plain)
    before = predictions(plain.float())
    add_adapters(plain, products, 2)
    torch.testing.assert_close(predictions(plain), before, rtol=0, atol=1e-6)  # they start at zero
    for name, value in plain.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(value, std=0.1)
    adapter = {
        name.replace(".default", ""): value.detach() for name, value in plain.named_parameters() if ".lora_" in name
    }
    whole = make_model(settings)
    whole.load_state_dict(merged({name: value.float() for name, value in base.items()}, adapter, 1.0))
    after = predictions(plain)
    assert float((after - before).abs().max()) > 0.01
    torch.testing.assert_close(predictions(whole), after, rtol=0, atol=1e-5 * float(after.abs().max()))


def test_halves_that_do_not_fit_are_named() -> None:
    base = {"layer.weight": torch.zeros(3, 4)}
    down, up = {"layer.lora_A.weight": torch.ones(2, 4)}, {"layer.lora_B.weight": torch.ones(3, 2)}
    assert torch.equal(merged(base, down | up, 0.5)["layer.weight"], torch.full((3, 4), 1.0))  # 0.5 * (1 + 1)
    assert torch.equal(base["layer.weight"], torch.zeros(3, 4))
    for wrong in (down, up, {"layer.lora_A.weight": torch.ones(2, 5)} | up, {"other.lora_A.weight": down} | up):
        with pytest.raises(ValueError, match=r"adapter"):
            merged(base, wrong, 1.0)


def test_names_of_biases_norms_and_tables() -> None:
    model = make_model(SETTINGS)
    names = bias_names(model)
    tables = [f"{kind}_embedder.embedding_table.weight" for kind in "yc"]
    assert set(tables) < set(names)
    rest = [name for name in names if name not in tables]
    assert all(name.endswith(".bias") or "norm" in name for name in rest)
    assert "blocks.1.adaLN_modulation.1.bias" in rest and "pos_embed" not in rest
    # a block: norms 2 w, biases of qkv 3 w, proj w, SwiGLU 2 h + w with h = 2/3 4 w, modulation 6 w
    width, hidden = 16, int(2 / 3 * 64)
    block = 2 * width + 4 * width + 2 * hidden + width + 6 * width
    outside = width + 2 * width + 3 * width + 16  # patches, time, last norm and modulation, output
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert sum(sizes[name] for name in rest) == 2 * block + outside
    assert matching_names(model, ["blocks.0.mlp.*", "*.norm1.weight"]) == [
        *("blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "blocks.0.mlp.w12.bias", "blocks.0.mlp.w3.weight"),
        *("blocks.0.mlp.w3.bias", "blocks.1.norm1.weight"),
    ]
    assert product_names(model, ["qkv", "w3"]) == [
        f"blocks.{n}.{end}" for n in (0, 1) for end in ("attn.qkv", "mlp.w3")
    ]
    assert len(product_names(model)) == 2 * 5
    decayed = matrix_names(model)
    assert len(decayed) == 2 * 5 + 2  # also modulation and output of the last layer
    assert all(
        value.dim() == 2 and "embedder" not in name for name, value in model.named_parameters() if name in decayed
    )


def test_the_embedding_of_the_time_of_a_unet_has_no_weight_decay() -> None:
    pytest.importorskip("diffusers")
    model = make_model(UNET)
    matrices = {name for name, value in model.named_parameters() if value.dim() > 1}
    kept = {name for name in matrices if {"time_embedding", "y_embedder"} & {*name.split(".")}}
    assert len(kept) == 2 + 1  # two layers of the time, and the table of classes
    assert {*matrix_names(model)} == matrices - kept


def test_a_digest_sees_a_long_tensor_to_its_end() -> None:
    """20000 values, of which the first half, and so the first 4096, are the same."""
    half = torch.zeros(10_000)
    first, second = ({"weight": torch.cat([half, half + end])} for end in (0, 1))
    assert base_digest(first, [], ["weight"]) != base_digest(second, [], ["weight"])


KINDS = {"lora": "trainable: lora", "mlp": "trainable: [blocks.*.mlp.*, '*embedder*']"}


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_part_is_trained_saved_and_resumed(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    whole, parts = configured(folder, "whole", KINDS[kind]), configured(folder, "parts", KINDS[kind])
    assert train.main(["--config", str(whole)]) == 0
    said = capsys.readouterr().out
    assert train.main(["--config", str(parts), "--max-steps", "3"]) == 0
    torch.manual_seed(99)  # dropout depends on seed and step alone
    assert train.main(["--config", str(parts)]) == 0
    first, second = adapter_of(folder, "whole"), adapter_of(folder, "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    config = load_config(whole)
    trainer = train.Trainer(config)
    base, start = load_weights(folder / "source.safetensors"), trainer.model.state_dict()
    state = load_training_state(folder / "runs" / "whole" / "checkpoint-0000006.pt")
    assert state["model"].keys() == set(trainer.part.names.values())  # and none of the frozen parameters
    assert state["ema"].keys() == first.keys()
    moved = [name for name in trainer.part.trained if not torch.equal(state["model"][name], start[name])]
    assert len(moved) == len(trainer.part.trained)
    trainer.load_state_dict(state)
    for name, value in trainer.model.state_dict().items():
        own = name.replace(".base_layer", "")
        if name not in state["model"] and own in base:
            assert torch.equal(value, base[own]), name
    tables = {"y_embedder.embedding_table.weight", "c_embedder.embedding_table.weight", "a_embedder.weight"}
    expected = {
        "lora": {name for name in first if ".lora_" in name} | tables,
        "mlp": {name for name in first if ".mlp." in name or "embedder" in name},
    }[kind]
    assert set(first) == expected
    changed = sum(value.numel() for value in first.values())
    total = sum(value.numel() for name, value in trainer.model.named_parameters() if ".lora_" not in name)
    assert f"trains {changed:,} of {total:,} weights ({changed / total:.2%}, {changed * 4 / 1e6:.1f} MB): " in said
    metadata = inspect(folder / "runs" / "whole" / "adapter.safetensors").metadata
    ranks = {"lora_rank": "2", "lora_alpha": "2"} if kind == "lora" else {}
    named = {"adapter_kind": json.dumps("patterns" if kind == "mlp" else kind), "null_trained": "true", **ranks}
    assert {name: metadata[name] for name in named} == named
    assert f"adapter_path: {folder}/runs/whole/adapter.safetensors in {whole}, and python" in said

    adapted = load_config(configured(folder, "adapted", KINDS[kind], "runs/whole/adapter.safetensors"))
    found = predictions(sampled(adapted))
    torch.testing.assert_close(found, predictions(trainer.averaged_model()), rtol=1e-6, atol=1e-6)
    target = folder / "merged.safetensors"
    assert merge_adapter.main(["--config", adapted.source, "--output", str(target)]) == 0
    again = sampled(replace(adapted, ckpt_path=str(target), adapter_path=None))
    torch.testing.assert_close(predictions(again), found, rtol=0, atol=0)


def test_an_adapter_belongs_to_its_weights(folder: Path) -> None:
    run = configured(folder, "run", "trainable: bias")
    assert train.main(["--config", str(run)]) == 0
    config = load_config(configured(folder, "adapted", "trainable: bias", "runs/run/adapter.safetensors"))
    half = {name: value.bfloat16().float() for name, value in load_weights(folder / "source.safetensors").items()}
    save_weights(half, folder / "other.safetensors")
    with pytest.raises(
        LightningDiTError, match=r"was trained on other weights than .*other.safetensors; fix: set ckpt"
    ):
        sampled(replace(config, ckpt_path=str(folder / "other.safetensors")))
    with pytest.raises(
        LightningDiTError, match=r"source.safetensors is no adapter \(its metadata have no adapter_kind"
    ):
        sampled(replace(config, adapter_path=config.ckpt_path))
    with pytest.raises(LightningDiTError, match="names no adapter_path"):
        merge_adapter.main(["--config", str(run), "--output", str(folder / "x.safetensors")])
    save_weights(half, folder / "source.safetensors")
    with pytest.raises(LightningDiTError, match=r"holds a run of other settings \(trained.base_weights: "):
        train.main(["--config", str(run)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("trainable: some", "train.trainable is 'some'; all, lora, bias or a list of patterns of names is expected"),
        ("trainable: [blocks.*.mlpp.*]", r"train.trainable: 'blocks.\*.mlpp.\*' matches no tensor; .* like blocks.1"),
        (
            "trainable: lora, lora_targets: [qvk]",
            "train.lora_targets: 'qvk' is no end of a layer's name; they are like",
        ),
        (
            "trainable: bias, weight_init: null",
            "without train.weight_init the rest stays random; fix: set train.weight",
        ),
    ],
)
def test_what_no_training_could_change_is_refused(more: str, message: str, folder: Path) -> None:
    path = configured(folder, "wrong", more)
    if "weight_init" in more:
        path.write_text(re.sub("weight_init: source.safetensors, ", "", path.read_text()))
    with pytest.raises(LightningDiTError, match=message):
        train.Trainer(load_config(path))
    with pytest.raises(LightningDiTError, match=message):
        train.main(["--config", str(path), "--dry-run"])


def test_peft_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LightningDiTError, match="lora needs peft, which is missing; fix: pip install peft"):
        train.Trainer(load_config(configured(folder, "wrong", "trainable: lora")))


def test_what_the_weights_lack_is_trained_too(folder: Path) -> None:
    """Channels that start at zero would stay there, and with a frozen first layer nothing would show them."""
    path = configured(folder, "wider", "trainable: bias")
    path.write_text(path.read_text().replace("in_chans: 4", "in_chans: 5"))
    latents = torch.randn(24, 5, 4, 4)
    extras = {"conditions": torch.arange(24) % 2, "augmentation": torch.rand(24, 3)}
    write_shard(shard_path(folder / "latents", 0, 0), latents, torch.arange(24) % 3, extras=extras)
    LatentStats(torch.full((1, 5, 1, 1), 0.1), torch.ones(1, 5, 1, 1)).save(folder / "latents" / "latents_stats.pt")
    part = train.Trainer(load_config(path)).part
    assert {"x_embedder.proj.weight", "final_layer.linear.weight"} <= set(part.trained)
    assert "blocks.0.attn.qkv.weight" not in part.trained


def test_classes_that_the_null_condition_joined_are_in_the_adapter(folder: Path) -> None:
    """They are no longer those of the file, so an adapter without them would not lead to the trained network."""
    source = seed_weights(LightningDiT(replace(SETTINGS, num_classes=3)))
    save_weights(source.state_dict(), folder / "source.safetensors", {"null_trained": "true"})
    more = "trainable: [blocks.*.mlp.*]"
    path = configured(folder, "joined", more)
    path.write_text(path.read_text().replace(", num_conditions: 2", ""))
    extras = {"augmentation": torch.rand(24, 3)}
    write_shard(shard_path(folder / "latents", 0, 0), torch.randn(24, 4, 4, 4), torch.arange(24) % 3, extras=extras)
    assert train.main(["--config", str(path)]) == 0
    table = lightningdit.CLASS_TABLE
    assert table in adapter_of(folder, "joined")
    after = configured(folder, "after", more, "runs/joined/adapter.safetensors")
    after.write_text(after.read_text().replace(", num_conditions: 2", ""))
    joined = sampled(load_config(after)).state_dict()
    assert lightningdit.CONDITION_TABLE not in joined
    null = source.state_dict()[lightningdit.CONDITION_TABLE][-1]
    moved = joined[table] - source.state_dict()[table]
    assert float(null.norm()) > 2 * float((moved - null).norm(dim=1).max())  # six steps at the rate 0.01 are little
