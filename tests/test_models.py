"""The transformer against the published implementation's outputs, and its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from LightningDiT.models.lightningdit import (
    PRESETS,
    LightningDiT,
    LightningDiT_models,
    differences,
    preset_name,
    preset_settings,
    settings_from_shapes,
)
from tests.conftest import seed_weights

PACKAGE = Path(__file__).parent.parent / "LightningDiT"
VARIANTS = ["default", "qknorm", "wo_shift", "plain_dit_patch2", "learn_sigma"]
Build = Callable[..., LightningDiT]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_meets_the_published_output(variant: str, unit_model: Build, golden: dict[str, Tensor]) -> None:
    with torch.no_grad():
        out = unit_model(variant)(golden["x"], golden["t"], golden["y"])
    torch.testing.assert_close(out, golden[f"forward.{variant}"], atol=1e-4, rtol=0)


def test_forward_with_cfg_meets_the_published_output(
    unit_model: Build, golden: dict[str, Tensor], manifest: dict[str, Any]
) -> None:
    model = unit_model("default")
    for case, settings in manifest["cfg"].items():
        t = torch.full((4,), settings["t"])
        with torch.no_grad():
            out = model.forward_with_cfg(
                golden["cfg.x"],
                t,
                golden["cfg.y"],
                settings["cfg_scale"],
                settings["cfg_interval"],
                settings["cfg_interval_start"],
            )
        torch.testing.assert_close(out, golden[f"cfg.{case}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("preset", "parameters"), [("B/1", 130_556_192), ("XL/1", 675_256_736)])
def test_names_shapes_and_size_are_the_published_ones(preset: str, parameters: int) -> None:
    published = json.loads((PACKAGE / "checkpoint_keys.json").read_text())[f"LightningDiT-{preset}"]
    with torch.device("meta"):
        model = LightningDiT_models[f"LightningDiT-{preset}"](
            input_size=16, use_swiglu=True, use_rope=True, use_rmsnorm=True
        )
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published
    # the published count leaves out what is computed: the rotary tables
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_are_read_back_from_shapes(variant: str, unit_model: Build) -> None:
    model = unit_model(variant)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = settings_from_shapes(shapes)
    # a model without rotary tables keeps no trace of its heads
    expected = model.settings if model.settings.use_rope else replace(model.settings, num_heads=1)
    assert differences(expected, found) == []


def test_a_difference_names_both_values() -> None:
    wanted, found = preset_settings("LightningDiT-B/1"), preset_settings("LightningDiT-B/1", num_classes=31)
    assert differences(wanted, found) == ["num_classes is 31 in the file and 1000 in the configuration"]


def test_every_preset_is_found_by_its_sizes() -> None:
    for name in LightningDiT_models:
        assert preset_name(preset_settings(name)) == name
    assert PRESETS["S"] == (12, 384, 6)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'LightningDiT-XXL/1' is unknown; .*LightningDiT-XL/1"):
        preset_settings("LightningDiT-XXL/1")


def test_a_new_model_predicts_zero(manifest: dict[str, Any]) -> None:
    model = LightningDiT(**manifest["common_kwargs"]).eval()
    out = model(torch.randn(2, 8, 8, 8), torch.rand(2), torch.tensor([1, 10]))
    assert out.shape == (2, 8, 8, 8)
    assert out.abs().max() == 0  # adaLN-Zero


def test_recomputed_activations_give_the_same_gradients(manifest: dict[str, Any], golden: dict[str, Tensor]) -> None:
    gradients = []
    for use_checkpoint in (False, True):
        model = LightningDiT(**manifest["common_kwargs"], use_checkpoint=use_checkpoint, class_dropout_prob=0.0)
        seed_weights(model).train()
        model(golden["x"], golden["t"], golden["y"]).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_the_null_class_is_the_number_of_classes(unit_model: Build) -> None:
    model = unit_model("default")
    assert model.null_class == 10
    dropped = model.y_embedder(torch.tensor([3, 4]), dropped=torch.tensor([True, False]))
    table = model.y_embedder.embedding_table.weight
    torch.testing.assert_close(dropped, table[[10, 4]], atol=0, rtol=0)
