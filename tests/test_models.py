"""The transformer against the published implementation's outputs, and its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from LightningDiT.loading import model_differences
from LightningDiT.models.layers import LayerNorm, RMSNorm, attend
from LightningDiT.models.lightningdit import (
    PRESETS,
    LightningDiT,
    LightningDiT_models,
    added,
    preset_name,
    preset_settings,
    settings_from_shapes,
)
from tests.conftest import seed_weights

PACKAGE = Path(__file__).parent.parent / "LightningDiT"
VARIANTS = ["default", "qknorm", "wo_shift", "plain_dit_patch2", "learn_sigma"]
Build = Callable[..., LightningDiT]
HALF = [torch.bfloat16, torch.float16]


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
    assert model_differences(expected, found) == []


def test_a_difference_names_both_values() -> None:
    wanted, found = preset_settings("LightningDiT-B/1"), preset_settings("LightningDiT-B/1", num_classes=31)
    assert model_differences(wanted, found) == ["num_classes: 31 in the file, 1000 in the configuration"]


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


def plain_forward(model: LightningDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The forward of one image after another, with the SiLU of its condition taken in every layer."""
    made, rope = [], (model.feat_rope, model.feat_rope.signed_sines())
    for image, time, label in zip(x, t, y, strict=True):
        tokens = model.x_embedder(image[None]) + model.pos_embed
        condition = model.t_embedder(time[None]) + model.y_embedder(label[None])
        for block in model.blocks:
            parts = block.adaLN_modulation[1](F.silu(condition)).unsqueeze(1)
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=2)
            tokens = tokens + gate1 * block.attn(block.norm1(tokens) * (1 + scale1) + shift1, rope)
            tokens = tokens + gate2 * block.mlp(block.norm2(tokens) * (1 + scale2) + shift2)
        last = model.final_layer
        shift, scale = last.adaLN_modulation[1](F.silu(condition)).unsqueeze(1).chunk(2, dim=2)
        patches = last.linear(last.norm_final(tokens) * (1 + scale) + shift)
        side = model.settings.side
        made.append(patches.view(1, side, side, -1).permute(0, 3, 1, 2))
    return torch.cat(made)


def test_a_time_that_all_share_is_embedded_once(unit_model: Build, golden: dict[str, Tensor]) -> None:
    model, seen = unit_model("default"), []
    model.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x, y = golden["x"], golden["y"]
    t = torch.full((len(x),), 0.37)
    with torch.no_grad():
        shared, apart = model(x, t[:1], y), model(x, t, y)
        assert seen == [1, len(x)]
        expected = plain_forward(model, x, t, y)
    torch.testing.assert_close(shared, apart, atol=1e-6, rtol=0)
    torch.testing.assert_close(shared, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_for_the_products_alone(variant: str, dtype: torch.dtype, unit_model: Build) -> None:
    model = unit_model(variant).to(dtype)
    products, wide = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(lambda layer, x, out: products.append((x[0].dtype, out.dtype)))
        elif name.endswith(("norm1", "norm2", "norm_final")):
            layer.register_forward_hook(lambda layer, x, out: wide.append((x[0].dtype, out.dtype)))
        elif name.endswith("adaLN_modulation"):
            layer.register_forward_hook(lambda layer, x, out: wide.extend((part.dtype, part.dtype) for part in out))
    with torch.no_grad():
        model(torch.randn(1, 8, 8, 8), torch.tensor([0.5]), torch.tensor([1]))
    assert products and set(products) == {(dtype, dtype)}
    assert wide and set(wide) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_stays_near_the_published_output(
    variant: str, dtype: torch.dtype, unit_model: Build, golden: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        out = unit_model(variant).to(dtype)(golden["x"], golden["t"], golden["y"])
    expected = golden[f"forward.{variant}"]
    error = (out.float() - expected).norm() / expected.norm()
    assert 0 < error < 8 * torch.finfo(dtype).eps


def test_tokens_beyond_the_range_of_fp16_do_no_harm(unit_model: Build, golden: dict[str, Tensor]) -> None:
    model, largest = unit_model("default"), []
    with torch.no_grad():
        for block in model.blocks:
            gates = block.adaLN_modulation[1].bias.chunk(6)
            gates[2].fill_(30_000.0)
            gates[5].fill_(30_000.0)
        expected = model(golden["x"], golden["t"], golden["y"])
        model.blocks[-1].register_forward_hook(lambda block, x, out: largest.append(float(added(*out).abs().max())))
        out = model.half()(golden["x"], golden["t"], golden["y"]).float()
    assert largest[0] > torch.finfo(torch.float16).max
    assert out.isfinite().all()
    assert (out - expected).norm() / expected.norm() < 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", HALF)
def test_norms_compute_in_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([[300.0, -400.0, 500.0, 600.0]])  # squares beyond 65504; exact in both
    mean, eps = x.double().mean(), 1e-6
    rms = (x.double().square().mean() + eps).sqrt()
    deviation = (x.double().var(unbiased=False) + eps).sqrt()
    for norm, expected in ((RMSNorm(4), x / rms), (LayerNorm(4), (x - mean) / deviation)):
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
            out = norm.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out, (expected * norm.weight).to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1, 8, 60])
def test_attention_keeps_large_logits_in_float32(dtype: torch.dtype, size: int) -> None:
    """Queries and keys of size 60 have products beyond 65504, where fp16 ends."""
    generator = torch.Generator().manual_seed(0)
    q, k = (size * torch.randn(2, 3, 32, 64, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(2, 3, 32, 64, generator=generator).to(dtype)
    products = q.double() @ k.double().transpose(-2, -1)
    if dtype == torch.float16 and not torch_writes_products_in_float32():
        pytest.skip("this torch has no fused attention for fp16 on the CPU")
    assert (products.abs().max() > torch.finfo(torch.float16).max) == (size == 60)
    expected = (products / 8).softmax(-1) @ v.double()
    difference = (attend(q, k, v).double() - expected).abs().max()
    assert difference < 4 * torch.finfo(dtype).eps


def torch_writes_products_in_float32() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5)


def test_attention_without_a_fused_kernel_scales_before_the_product() -> None:
    q = torch.zeros(1, 1, 2, 64, dtype=torch.float16)
    q[..., 0, :32], q[..., 1, 32:] = 60.0, 60.0  # 60^2 * 32 = 115200 is beyond 65504; over 8 it is 14400
    v = torch.tensor([[1.0, 2.0]]).half().view(1, 1, 2, 1).expand(1, 1, 2, 64)
    with math_kernel():
        out = attend(q, q, v)
    torch.testing.assert_close(out, v, atol=0, rtol=0)  # each token sees itself alone


def math_kernel() -> AbstractContextManager[object]:
    """Allow only the kernel that writes q k^T out."""
    if hasattr(nn, "attention"):
        return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)


def test_in_float32_nothing_is_converted(unit_model: Build, golden: dict[str, Tensor]) -> None:
    class Conversions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is torch.ops.aten._to_copy.default
            return function(*args, **(kwargs or {}))

    counts = []
    for dtype in (torch.float32, torch.bfloat16):
        model = unit_model("qknorm").to(dtype)
        with torch.no_grad(), Conversions() as conversions:
            model(golden["x"], golden["t"], golden["y"])
        counts.append(conversions.count)
    assert counts[0] == 0 < counts[1]


# ---- a second label, augmentation and dropout


def labelled(manifest: dict[str, Any], **changes: Any) -> LightningDiT:
    """The small model of the golden values with three conditions and two values of augmentation."""
    given = {"num_conditions": 3, "augmentation": 2, "class_dropout_prob": 0.0, **changes}
    return LightningDiT(**{**manifest["common_kwargs"], **given})


def test_further_labels_leave_the_other_tensors_and_their_draws(manifest: dict[str, Any]) -> None:
    states = []
    for settings in ({"num_conditions": 0, "augmentation": 0}, {}):
        torch.manual_seed(3)
        states.append(labelled(manifest, **settings).state_dict())
    plain, more = states
    assert [name for name in more if name not in plain] == ["c_embedder.embedding_table.weight", "a_embedder.weight"]
    assert all(torch.equal(value, more[name]) for name, value in plain.items())
    table = more["c_embedder.embedding_table.weight"]
    assert table.shape == (4, plain["y_embedder.embedding_table.weight"].shape[1])
    assert abs(float(table.std()) / 0.02 - 1) < 0.2 and not more["a_embedder.weight"].any()
    found = settings_from_shapes({name: tuple(value.shape) for name, value in more.items()})
    assert (found.num_conditions, found.augmentation) == (3, 2)


def test_all_labels_add_to_the_embedding_of_the_time(manifest: dict[str, Any], golden: dict[str, Tensor]) -> None:
    """A model of one label whose class rows are the sums gives the same prediction."""
    both, one = seed_weights(labelled(manifest)), seed_weights(labelled(manifest, num_conditions=0, augmentation=0))
    x, t, a = golden["x"][:2], golden["t"][:2], torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    y = torch.tensor([[3, 1], [7, 3]])
    with torch.no_grad():
        added = both.c_embedder.embedding_table.weight[y[:, 1]] + a @ both.a_embedder.weight.T
        one.y_embedder.embedding_table.weight[y[:, 0]] += added
        torch.testing.assert_close(both(x, t, y, a), one(x, t, y[:, 0]), atol=1e-5, rtol=0)
        assert torch.equal(both(x, t, y), both(x, t, y, torch.zeros(2, 2)))
        assert not torch.equal(both(x, t, y), both(x, t, y, a))


def test_null_labels_have_the_shape_of_the_labels(manifest: dict[str, Any], unit_model: Build) -> None:
    assert labelled(manifest).null_labels(torch.tensor([[1, 2], [5, 3]])).tolist() == [[10, 3], [10, 3]]
    assert unit_model("default").null_labels(torch.tensor([1, 2, 3])).tolist() == [10, 10, 10]


@pytest.mark.parametrize(
    ("settings", "labels", "augmentation", "message"),
    [
        ({}, (2,), None, r"labels have the shape \[2\]; \[2, 2\] is expected, class and condition of each latent"),
        ({}, (2, 3), None, r"labels have the shape \[2, 3\]; \[2, 2\] is expected"),
        ({"num_conditions": 0}, (2, 2), None, r"labels have the shape \[2, 2\]; \[2\] is expected, the class of each"),
        ({}, (2, 2), (2, 3), r"the augmentation has the shape \[2, 3\]; \[2, 2\] is expected"),
        ({"augmentation": 0}, (2, 2), (2, 2), r"the augmentation has the shape \[2, 2\]; none is expected"),
    ],
)
def test_labels_of_a_wrong_shape_are_named(
    settings: dict[str, int],
    labels: tuple[int, ...],
    augmentation: tuple[int, ...] | None,
    message: str,
    manifest: dict[str, Any],
    golden: dict[str, Tensor],
) -> None:
    a = None if augmentation is None else torch.zeros(augmentation)
    with pytest.raises(ValueError, match=message):
        labelled(manifest, **settings)(golden["x"][:2], golden["t"][:2], torch.zeros(labels, dtype=torch.long), a)


def test_dropout_zeroes_its_share_after_attention_and_mlp_in_training_alone(
    manifest: dict[str, Any], golden: dict[str, Tensor], unit_model: Build
) -> None:
    """With gates of 1 and attention and MLP that give ones, a token gains 0, 1/0.75 or 2/0.75."""
    x, t, y = golden["x"], golden["t"], golden["y"]
    model = seed_weights(labelled(manifest, num_conditions=0, augmentation=0, dropout=0.25))
    with torch.no_grad():
        assert torch.equal(model(x, t, y), unit_model("default")(x, t, y))
        model.train()
        block, tokens = model.blocks[0], torch.zeros(8, 16, model.settings.hidden_size)
        for layer in (block.attn.proj, block.mlp.w3 if hasattr(block.mlp, "w3") else block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.fill_(1.0)
        modulation = block.adaLN_modulation[1]
        modulation.weight.zero_()
        modulation.bias.fill_(1.0)
        condition = torch.zeros(8, model.settings.hidden_size)
        gained = added(*block(tokens, condition, tokens, condition, None)) * 0.75
        counts = [int((gained - value).abs().lt(1e-5).sum()) for value in (0, 1, 2)]
    assert sum(counts) == gained.numel()
    shares = [count / gained.numel() for count in counts]
    for share, expected in zip(shares, (0.0625, 0.375, 0.5625), strict=True):
        assert abs(share - expected) < 4 * (expected * (1 - expected) / gained.numel()) ** 0.5


def test_recomputed_activations_drop_the_same(manifest: dict[str, Any], golden: dict[str, Tensor]) -> None:
    gradients = []
    for use_checkpoint in (False, True):
        model = labelled(manifest, num_conditions=0, augmentation=0, dropout=0.5, use_checkpoint=use_checkpoint)
        seed_weights(model).train()
        torch.manual_seed(1)
        model(golden["x"], golden["t"], golden["y"]).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


def test_the_work_of_a_forward_is_that_of_its_products() -> None:
    """Counted by torch; the smaller rest is patches, time, and modulation once a latent."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = LightningDiT(input_size=16, patch_size=1, hidden_size=192, depth=2, num_heads=3).eval()
        x = torch.zeros(1, 256, 192)
    with torch.no_grad(), math_kernel(), FlopCounterMode(display=False) as counter:
        model.blocks[0].mlp(model.blocks[0].attn(x, None))
    assert 2 * counter.get_total_flops() / 1e9 == pytest.approx(model.settings.gflop, rel=1e-9)
    assert model.attention_shape == (3, 256, 64)
