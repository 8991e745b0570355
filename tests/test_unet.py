"""The U-Net: its cost and shapes, diffusers' own network as its counterpart, and a run from training to images."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from LightningDiT.checkpoint import load_weights, save_weights, without_values
from LightningDiT.config import Config, load_config
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import (
    Network,
    NetworkSettings,
    check_transformer_file,
    load_transformer,
    make_model,
    model_differences,
    model_settings,
    network_name,
    settings_from_shapes,
)
from LightningDiT.models import unet
from LightningDiT.models.lightningdit import preset_settings
from LightningDiT.models.unet import UNet, UNetSettings, unet_settings
from LightningDiT.sampling.memory_model import step_bytes
from LightningDiT.sampling.networks import padded
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tools import training_memory
from LightningDiT.training.memory import kept_bytes, training_need
from LightningDiT.training.transformer_training import Trainer
from tests.conftest import seed_weights

pytest.importorskip("diffusers", reason="the U-Net is diffusers'")

TINY = ((32, 64), 1, (False, True))  # a preset whose step takes milliseconds
PUBLISHED = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
SMALL = UNetSettings(8, 4, num_classes=3, num_conditions=2, augmentation=5, widths=TINY[0], layers=1, attends=TINY[2])


def seeded(settings: UNetSettings = SMALL) -> UNet:
    return seed_weights(UNet(settings)).requires_grad_(False)


def inputs(count: int, settings: UNetSettings = SMALL) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, times and labels of class and condition."""
    draws = torch.Generator().manual_seed(1)
    states = torch.randn(count, settings.in_channels, settings.input_size, settings.input_size, generator=draws)
    labels = torch.stack([torch.arange(count) % 4, torch.arange(count) % 3], 1)
    return states, torch.rand(count, generator=draws), labels


# ---- cost


def counted(model: Network, side: int) -> float:
    """Return 10^9 operations of one state as torch counts them; the model is on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        state = torch.zeros(1, model.settings.in_channels, side, side)
        model(state, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops() / 1e9


def on_meta(settings: NetworkSettings) -> Network:
    with without_values():
        return make_model(settings).to("meta")


def parameters(model: Network) -> str:
    return f"{sum(value.numel() for value in model.parameters()) / 1e6:.2f}"


def table() -> list[list[str]]:
    """Return the cells of the table of presets in the module's text."""
    rows = [line.strip("| ").split(" | ") for line in (unet.__doc__ or "").splitlines() if line.startswith("| UNet")]
    assert [row[0] for row in rows] == unet.unet_names()
    return rows


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_a_preset_costs_what_its_transformer_costs(row: list[str]) -> None:
    """The table's numbers, apart from times, are torch's own counts, and so is the property."""
    name, *cells = row
    sizes = {"in_channels": 4, "num_classes": 31}
    model = on_meta(unet_settings(name, input_size=8, **sizes))  # of all sides
    others = {side: on_meta(preset_settings(cells[3], input_size=side, **sizes, **PUBLISHED)) for side in (8, 16)}
    work = {side: counted(model, side) for side in others}
    ratios = [work[side] / counted(other, side) for side, other in others.items()]
    assert cells[:3] == [parameters(model), *(f"{work[side]:.3f}" for side in others)]
    assert cells[4:7] == [parameters(others[8]), *(f"{ratio:.2f}" for ratio in ratios)]
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios)
    for side, gflop in work.items():
        assert replace(model.settings, input_size=side).gflop == pytest.approx(gflop, rel=1e-9)


def test_the_work_of_another_shape_is_counted_too() -> None:
    settings = UNetSettings(12, 6, 10, widths=(32, 48, 64), layers=2, attends=(False, False, True))
    assert settings.gflop == pytest.approx(counted(on_meta(settings), 12), rel=1e-9)


# ---- the network


def counterpart(model: UNet) -> nn.Module:
    """Return diffusers' network with every size spelt out, and the same weights."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    reference = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=16,
        attn_norm_num_groups=16,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )
    reference.load_state_dict(model.unet.state_dict())
    return reference.eval().requires_grad_(False)


def test_it_is_diffusers_network_with_the_sum_of_the_embeddings() -> None:
    model, (x, t, y) = seeded(), inputs(6)
    a = torch.linspace(-1, 1, 30).view(6, 5)
    tables = [model.y_embedder.embedding_table.weight, model.c_embedder.embedding_table.weight]
    total = tables[0][y[:, 0]] + tables[1][y[:, 1]] + a @ model.a_embedder.weight.T
    wanted = counterpart(model)(x, 1000 * t, class_labels=total).sample
    torch.testing.assert_close(model(x, t, y, a), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model(x, t, y), model(x, t, y, torch.zeros(6, 5)), atol=0, rtol=0)
    assert float((model(x, t, y) - wanted).abs().max()) > 1e-3
    torch.testing.assert_close(model(x, t[:1], y), model(x, t[:1].expand(6), y), atol=0, rtol=0)


@pytest.mark.parametrize("attends", [(False, True), (True, False), (False, False)], ids=str)
def test_the_shape_of_attention_is_that_of_the_largest(
    attends: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without attention at a level the middle, at the last one, has some."""
    plain, shapes = nn.functional.scaled_dot_product_attention, []

    def noted(query: Tensor, *others: object, **options: object) -> Tensor:
        shapes.append(tuple(query.shape[1:]))
        return plain(query, *others, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    model = seeded(replace(SMALL, attends=attends))
    model(*inputs(2))
    assert model.attention_shape == max(shapes, key=lambda shape: shape[1])


def test_the_time_is_a_thousand_waves_long() -> None:
    """The embedding's angles are 1000 t / 10000^(k / 16), cosines first (arXiv 1706.03762)."""
    model, seen = seeded(), []
    model.unet.time_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    x, t, y = inputs(3)
    model(x, t, y)
    angles = 1000 * t[:, None] / 10_000 ** (torch.arange(16) / 16)
    torch.testing.assert_close(seen[0], torch.cat([angles.cos(), angles.sin()], 1), atol=2e-4, rtol=0)


def test_a_new_one_predicts_zero_and_learns_in_every_branch() -> None:
    """The output and each branch's last layer are zero; a gradient reaches the output alone."""
    torch.manual_seed(0)
    model, (x, t, y) = UNet(SMALL).eval(), inputs(3)
    for embedder in (model.y_embedder, model.c_embedder):
        assert float(embedder.embedding_table.weight.std()) == pytest.approx(0.02, rel=0.15)  # 4 deviations
    out = model(x, t, y, torch.ones(3, 5))
    assert torch.equal(out, torch.zeros_like(x)) and not model.a_embedder.weight.any()
    (out - x).square().sum().backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert reached == {"unet.conv_out.weight", "unet.conv_out.bias"}
    zero = [name for name, value in model.named_parameters() if name.endswith("weight") and not value.any()]
    assert len([name for name in zero if ".conv2." in name]) == 2 + 2 + 4  # down, middle, up
    assert len([name for name in zero if ".to_out.0." in name]) == 1 + 1 + 2


def test_null_labels_have_the_shape_of_the_labels() -> None:
    model = UNet(SMALL)
    assert model.null_labels(torch.tensor([[0, 1], [2, 0]])).tolist() == [[3, 2], [3, 2]]
    assert UNet(replace(SMALL, num_conditions=0)).null_labels(torch.tensor([0, 2])).tolist() == [3, 3]
    assert model.null_class == 3


def test_labels_of_another_shape_are_refused() -> None:
    x, t, y = inputs(3)
    for labels, told, message in (
        (y[:, 0], None, r"labels have the shape \[3\]; \[3, 2\]"),
        (y, torch.zeros(3, 4), r"augmentation has the shape \[3, 4\]; \[3, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(SMALL)(x, t, labels, told)


def test_dropout_acts_in_training_alone() -> None:
    """A share of 0.3 of the second convolutions' inputs is zero, and the others are as much larger."""
    model, (x, t, y) = seeded(replace(SMALL, dropout=0.3, class_dropout_prob=0.0)), inputs(6)
    seen = []
    model.unet.mid_block.resnets[0].dropout.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    torch.testing.assert_close(model(x, t, y), seeded()(x, t, y), atol=0, rtol=0)
    torch.manual_seed(0)
    model.train()(x, t, y)
    before, after = seen[1]
    kept = after != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.02)  # 6,144 draws: 3.4 deviations
    torch.testing.assert_close(after[kept], before[kept] / 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_states_bits_depend_on_no_other_row(dtype: torch.dtype) -> None:
    """As a deterministic run computes: every batch padded to one size."""
    model, (x, _, y) = seeded().to(dtype), inputs(7)
    t = torch.tensor([0.4])
    alone = [model(padded(x[k : k + 1], 4), t, padded(y[k : k + 1], 4))[0] for k in range(7)]
    for rows in ([0, 1, 2, 3], [6, 2, 5], [3, 6], [4, 0, 6, 5]):
        together = model(padded(x[rows], 4), t, padded(y[rows], 4))
        for place, row in enumerate(rows):
            assert torch.equal(together[place], alone[row])


@pytest.mark.parametrize("side", [8, 16, 32])
def test_latents_of_each_side_are_computed_by_the_same_weights(side: int) -> None:
    settings = replace(SMALL, input_size=side)
    model = UNet(settings)
    model.load_state_dict(seeded().state_dict())
    assert model.eval()(*inputs(2, settings)).shape == (2, 4, side, side)


def test_a_side_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="latent side 10 is no multiple of 4, which a U-Net of 3 levels needs"):
        unet_settings("UNet-S", input_size=10)


# ---- files


@pytest.mark.parametrize("changes", [{}, {"num_conditions": 0, "augmentation": 0, "in_channels": 6, "layers": 3}])
def test_the_settings_are_read_off_the_tensors(changes: dict[str, int]) -> None:
    settings = replace(SMALL, **changes)
    found = settings_from_shapes({name: tuple(value.shape) for name, value in UNet(settings).state_dict().items()})
    assert replace(found, input_size=8) == settings
    assert model_differences(settings, found) == []
    assert model_differences(replace(settings, widths=(32, 96)), found) == [
        "widths[1]: 64 in the file, 96 in the configuration"
    ]


def test_names_of_sizes() -> None:
    assert [network_name(unet_settings(name, input_size=8)) for name in unet.unet_names()] == ["UNet-S", "UNet-B"]
    assert network_name(SMALL) == "a U-Net of 32 and 64 channels"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path) -> Path:
    """A folder with latents of 3 classes and 2 conditions whose augmentation is told, for a tiny U-Net."""
    monkeypatch.setitem(unet.UNET_PRESETS, "XXS", TINY)
    draws = torch.Generator().manual_seed(0)
    latents, told = torch.randn(24, 4, 8, 8, generator=draws), torch.rand(24, 5, generator=draws)
    (tmp_path / "latents").mkdir()
    extras = {"conditions": torch.arange(24) % 2, "augmentation": told}
    write_shard(shard_path(tmp_path / "latents", 0, 0), latents, torch.arange(24) % 3, extras=extras)
    LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.full((1, 4, 1, 1), 0.9)).save(
        tmp_path / "latents" / "latents_stats.pt"
    )
    (tmp_path / "config.yaml").write_text(
        f"ckpt_path: unet.safetensors\nvae: {{model_name: {json.dumps(str(tiny_tokenizer))}, downsample_ratio: 2}}\n"
        "data: {data_path: latents, image_size: 16, num_classes: 3, num_conditions: 2}\n"
        "model: {model_type: UNet-XXS, in_chans: 4, augmentation: 5, dropout: 0.1}\n"
        "train: {max_steps: 4, global_batch_size: 8, micro_batch_size: 4, precision: fp32, label_dropout: 0.2}\n"
        "optimizer: {lr: 2.0e-3}\n"
        "sample: {num_sampling_steps: 2, cfg_scale: 3.0, guided_channels: all, per_proc_batch_size: 2}\n"
    )
    return tmp_path


def other_model(config: Config, model_type: str) -> Config:
    return replace(config, model=replace(config.model, model_type=model_type))


def test_a_file_of_another_network_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = load_config(folder / "config.yaml"), folder / "weights.safetensors"
    transformer, wide = other_model(config, "LightningDiT-XS/2"), other_model(config, "UNet-S")
    save_weights(make_model(model_settings(config)).state_dict(), path)
    assert check_transformer_file(config, path).startswith(f"U-Net {path}: ")
    with pytest.raises(LightningDiTError, match=r"holds UNet-XXS and does not fit .* model_type is LightningDiT-XS/2"):
        check_transformer_file(transformer, path)
    with pytest.raises(LightningDiTError, match=r"holds UNet-XXS and does not fit .*: widths: 2 in the file, 3 in"):
        check_transformer_file(wide, path)
    save_weights(make_model(model_settings(transformer)).state_dict(), path)
    assert check_transformer_file(transformer, path).startswith(f"transformer {path}: ")
    with pytest.raises(LightningDiTError, match="holds LightningDiT-XS/2 and does not fit .* is UNet-XXS"):
        check_transformer_file(config, path)


def test_an_unknown_model_names_both_kinds(folder: Path) -> None:
    for name in ("UNet-Q", "LightningDiT-Q/2"):
        with pytest.raises(LightningDiTError, match=rf"{name}.*LightningDiT-XS/2.*, or UNet-S, UNet-B"):
            model_settings(other_model(load_config(folder / "config.yaml"), name))


def test_without_diffusers_one_line_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model_settings(load_config(folder / "config.yaml"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LightningDiTError, match="a U-Net needs diffusers, which is not installed") as caught:
        make_model(settings)
    assert caught.value.fix == "pip install diffusers"


# ---- memory


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, function: Callable[..., object], types: object, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in (value for value in tree_leaves(out) if isinstance(value, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(tensor, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", ["UNet-S", "UNet-B"])
def test_a_step_takes_no_more_than_the_model_says(name: str) -> None:
    settings = unet_settings(name, input_size=16, num_classes=3)
    model, count = make_model(settings).eval().requires_grad_(False), 4
    x, t, y = inputs(count, settings)
    with _Living() as living:
        model(x, t, y[:, 0])
    assert living.most <= step_bytes(settings, count, 4) <= 3 * living.most


def test_a_training_keeps_what_autograd_keeps() -> None:
    """Its U-Net is counted whole, and the tool that says so offers no checkpointing."""
    need = training_need(SMALL, torch.float32, False)
    assert need.activations == kept_bytes(SMALL, torch.float32) + SMALL.working_values * 4
    assert need.parameters == sum(value.numel() for value in UNet(SMALL).parameters())
    assert need.framework == 720_000_000 + 180_000_000  # torch and diffusers
    assert training_need(SMALL, torch.float32, True).framework == 1_000_000_000


def test_the_report_of_memory_has_one_line_of_activations(folder: Path) -> None:
    text = training_memory.report(load_config(folder / "config.yaml"), 4.0, False, 1)
    assert text.count("activations") == 1 and "use_checkpoint" not in text and "which fits" in text


# ---- from latents to images


def trained(config: Config, steps: range, state: dict[str, object] | None = None) -> tuple[Trainer, list[float]]:
    trainer = Trainer(config, starts=state is None)
    if state is not None:
        trainer.load_state_dict(state)
    return trainer, [trainer.step(step)["loss"] for step in steps]


def test_a_run_from_latents_to_guided_images(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    whole, losses = trained(config, range(4))
    batch = Trainer(config).data.batch(0)
    velocity = batch.latents - batch.noise  # of the straight path; a new network predicts zero
    assert losses[0] == pytest.approx(float(velocity.square().mean()), rel=1e-5)
    assert batch.labels.shape == (8, 2) and batch.augmentation is not None

    half, first = trained(config, range(2))
    torch.save(half.state_dict(), folder / "state.pt")
    torch.manual_seed(7)
    resumed, last = trained(config, range(2, 4), torch.load(folder / "state.pt", weights_only=True))
    assert first + last == losses
    averages = [trainer.averaged_model().state_dict() for trainer in (whole, resumed)]
    assert [name for name, value in averages[0].items() if not torch.equal(value, averages[1][name])] == []
    assert resumed.model.a_embedder.weight.any()  # the augmentation was told

    save_weights(whole.model.state_dict(), folder / "unet.safetensors", whole.metadata)
    assert_guided(config, load_transformer(config))
    larger = replace(config, data=replace(config.data, image_size=32))
    with pytest.raises(LightningDiTError, match=r"was trained on latents of side 8; .* describes 16"):
        load_transformer(larger)


def assert_guided(config: Config, network: Network) -> None:
    """One Euler step from noise, written out, against the pipeline."""
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels, null = torch.tensor([[0, 1], [2, 0], [1, 1]]), torch.tensor([[3, 2]] * 3)
    known, unknown = (network(noise, torch.zeros(1), given) for given in (labels, null))
    assert float((known - unknown).abs().max()) > 1e-4
    pipe = LightningDiTPipeline.from_config(config, device="cpu")
    assert pipe.metadata()["latent_side"] == "8"
    out = pipe([0, 2, 1], conditions=[1, 0, 1], latents=noise, output_type="latent").images
    torch.testing.assert_close(out, noise + unknown + 3 * (known - unknown), atol=1e-5, rtol=1e-5)
    assert load_weights(config.ckpt_path or "").keys() == network.state_dict().keys()
    assert isinstance(network, nn.Module) and not network.training
