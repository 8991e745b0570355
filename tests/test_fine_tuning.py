"""Start from weights for other classes, channels or sizes: what is taken, and which predictions stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT import train
from LightningDiT.checkpoint import inspect, save_weights, without_values
from LightningDiT.errors import LightningDiTError
from LightningDiT.models import lightningdit
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
from LightningDiT.models.positions import sincos_table
from LightningDiT.models.unet import UNet, UNetSettings
from LightningDiT.training.fine_tuning import Plan, initialise, plan
from tests.conftest import seed_weights

SETTINGS = LightningDiTSettings(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=5,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
)
TIMES = torch.tensor([0.2, 0.7])


@pytest.fixture
def source(tmp_path: Path) -> tuple[LightningDiT, Path]:
    """A model with seeded weights, and the file of them in the published layout."""
    model = seed_weights(LightningDiT(SETTINGS))
    torch.save({"ema": model.state_dict(), "opt": {}}, tmp_path / "source.pt")
    return model, tmp_path / "source.pt"


def adapted(path: Path, new_classes: str = "null", **changes: object) -> tuple[LightningDiT, Plan]:
    torch.manual_seed(1)
    model = LightningDiT(replace(SETTINGS, **changes))
    made = initialise(model, path, new_classes=new_classes)
    return model.eval(), made


def kinds(made: Plan) -> dict[str, str]:
    return {change.name: change.kind for change in made.changes if change.kind != "taken"}


@torch.no_grad()
def test_the_same_shapes_are_loaded_strictly(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    model, made = adapted(source[1])
    assert kinds(made) == {}
    assert made.text() == f"weights of {source[1]}: {len(model.state_dict())} tensors taken as they are"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source[0].state_dict().items())
    damaged = dict(source[0].state_dict())
    damaged["pos_embed"] = torch.full_like(damaged["pos_embed"], float("nan"))
    save_weights(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(LightningDiTError, match="tensor pos_embed holds NaN"):
        adapted(tmp_path / "damaged.safetensors")


@torch.no_grad()
def test_another_class_count_keeps_the_null_class(source: tuple[LightningDiT, Path]) -> None:
    model, made = adapted(source[1], "random", num_classes=9)
    assert kinds(made) == {"y_embedder.embedding_table.weight": "resized"}
    assert "9 classes in place of 5; the rows are new, the null class is taken" in made.text()
    x = torch.randn(2, 4, 8, 8)
    old = source[0](x, TIMES, torch.tensor([5, 5]))  # without a class
    torch.testing.assert_close(model(x, TIMES, torch.tensor([9, 9])), old)
    rows = model.y_embedder.embedding_table.weight[:9]
    assert 0.015 < float(rows.std()) < 0.025  # drawn anew
    assert not torch.equal(rows[:5], source[0].y_embedder.embedding_table.weight[:5])


@torch.no_grad()
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_further_channels_change_nothing_at_the_start(tmp_path: Path, learn_sigma: bool) -> None:
    old = seed_weights(LightningDiT(replace(SETTINGS, learn_sigma=learn_sigma)))
    save_weights(old.state_dict(), tmp_path / "old.safetensors")
    wider, made = adapted(tmp_path / "old.safetensors", in_channels=6)
    assert set(kinds(made)) == {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    x, labels = torch.randn(2, 6, 8, 8), torch.tensor([0, 3])
    predicted = wider(x, TIMES, labels)
    torch.testing.assert_close(predicted[:, :4], old(x[:, :4], TIMES, labels))
    assert torch.equal(predicted[:, 4:], torch.zeros(2, 2, 8, 8))
    narrower, _ = adapted(tmp_path / "old.safetensors", in_channels=3)
    silent = torch.cat([x[:, :3], torch.zeros(2, 1, 8, 8)], dim=1)  # the channel that is cut out tells nothing
    torch.testing.assert_close(narrower(x[:, :3], TIMES, labels), old(silent, TIMES, labels)[:, :3])


@torch.no_grad()
def test_another_size_has_the_tables_of_that_size(source: tuple[LightningDiT, Path]) -> None:
    model, made = adapted(source[1], input_size=12)
    assert kinds(made) == {"pos_embed": "resized", "feat_rope.freqs_cos": "new", "feat_rope.freqs_sin": "new"}
    fresh = LightningDiT(replace(SETTINGS, input_size=12))
    for name in kinds(made):
        torch.testing.assert_close(model.state_dict()[name], fresh.state_dict()[name])


@torch.no_grad()
def test_a_learnt_table_is_interpolated(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    weights = dict(source[0].state_dict())
    ramp = torch.arange(4.0).repeat_interleave(4)  # the row number, 4 x 4
    weights["pos_embed"] = ramp.view(1, 16, 1).expand(1, 16, 16).contiguous()
    save_weights(weights, tmp_path / "learnt.safetensors")
    model, _ = adapted(tmp_path / "learnt.safetensors", input_size=16)
    rows = model.pos_embed.view(8, 8, 16)
    assert torch.allclose(rows, rows[:, :1, :1].expand_as(rows), atol=1e-5)

    def keys(x: float, a: float = -0.75) -> float:
        """The cubic kernel of Keys (1981) with torch's parameter."""
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    # new row 3 lies at (3 + 0.5) / 2 - 0.5 = 1.25 of the old ones, and row 4 at 1.75
    expected = [sum(row * keys(place - row) for row in range(4)) for place in (1.25, 1.75)]
    torch.testing.assert_close(rows[3:5, 0, 0], torch.tensor(expected))


@torch.no_grad()
def test_a_table_that_training_moved_a_little_is_a_learnt_one(
    source: tuple[LightningDiT, Path], tmp_path: Path
) -> None:
    """It is interpolated with what was learnt: a shift of 0.05 stays one."""
    moved = dict(source[0].state_dict())
    moved["pos_embed"] = moved["pos_embed"] + 0.05
    tables = []
    for name, weights in (("moved", moved), ("still", {**moved, "pos_embed": moved["pos_embed"] + 1})):
        save_weights(weights, tmp_path / f"{name}.safetensors")
        tables.append(adapted(tmp_path / f"{name}.safetensors", input_size=12)[0].pos_embed)
    torch.testing.assert_close(tables[0], tables[1] - 1, rtol=0, atol=1e-5)


def test_half_precision_tables_count_as_computed(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    computed = LightningDiT(SETTINGS)  # seeded weights leave the table as it is
    save_weights({name: value.half() for name, value in computed.state_dict().items()}, tmp_path / "half.safetensors")
    model, _ = adapted(tmp_path / "half.safetensors", input_size=12)
    assert torch.equal(model.pos_embed, sincos_table(16, 6))


def test_norms_of_queries_and_keys_come_and_go(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    model, made = adapted(source[1], use_qknorm=True)
    new = {f"blocks.{block}.attn.{part}_norm.weight": "new" for block in (0, 1) for part in "qk"}
    assert kinds(made) == new
    assert torch.equal(model.blocks[0].attn.q_norm.weight, torch.ones(8))
    save_weights(model.state_dict(), tmp_path / "normed.safetensors")
    _, back = adapted(tmp_path / "normed.safetensors")
    assert kinds(back) == dict.fromkeys(new, "left out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "depth: 2 in the file, 3 in the configuration"),
        ({"hidden_size": 32}, "hidden_size: 16 in the file, 32 in the configuration"),
        ({"use_swiglu": False}, "use_swiglu: true in the file, false in the configuration"),
        ({"mlp_ratio": 2.0}, r"tensor blocks.0.mlp.w12.weight is \[84, 16\] in the file and \[42, 16\]"),
    ],
)
def test_another_structure_is_refused(
    change: dict[str, object], message: str, source: tuple[LightningDiT, Path], tmp_path: Path
) -> None:
    with pytest.raises(LightningDiTError, match=message):
        adapted(source[1], **change)


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_weights({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(LightningDiTError, match="no LightningDiT: tensors .* name a transformer's weights"):
        adapted(tmp_path / "other.safetensors")


def test_a_plan_needs_no_values(source: tuple[LightningDiT, Path]) -> None:
    with without_values():
        model = LightningDiT(replace(SETTINGS, num_classes=2, input_size=4))
    assert set(kinds(plan(model, inspect(source[1])))) == {
        "y_embedder.embedding_table.weight",
        "pos_embed",
        "feat_rope.freqs_cos",
        "feat_rope.freqs_sin",
    }


def test_a_dry_run_prints_the_list(
    source: tuple[LightningDiT, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", (2, 16, 2))
    config = source[1].parent / "config.yaml"
    config.write_text(
        "data: {image_size: 16, num_classes: 7}\nvae: {downsample_ratio: 2}\n"
        "model: {model_type: LightningDiT-XXS/2, in_chans: 4}\ntrain: {weight_init: source.pt}\n"
    )
    assert train.main(["--config", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"weights of {source[1]}: " in said
    assert "  resized: y_embedder.embedding_table.weight: 7 classes in place of 5; the rows are new" in said


@torch.no_grad()
def test_rows_of_the_class_table_are_taken_by_name(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    """The same number of classes in another order, and a subset with a new class."""
    file, key = tmp_path / "named.safetensors", "y_embedder.embedding_table.weight"
    save_weights(source[0].state_dict(), file, {"class_names": '["a", "b", "c", "d", "e"]'})
    old = source[0].state_dict()[key]
    for names, rows in ((("a", "b", "c", "d", "e"), [0, 1, 2, 3, 4]), (("e", "b", "x"), [4, 1, None])):
        torch.manual_seed(1)
        model = LightningDiT(replace(SETTINGS, num_classes=len(names)))
        new = model.state_dict()[key].clone()
        made = initialise(model, file, names, new_classes="random")
        table = model.state_dict()[key]
        assert torch.equal(table[-1], old[-1])
        for index, row in enumerate(rows):
            assert torch.equal(table[index], new[index] if row is None else old[row])
    assert "the rows of 2 classes and the null class are taken by name, those of 1 are new" in made.text()
    assert kinds(plan(LightningDiT(SETTINGS), inspect(file), ["b", "a", "c", "d", "e"])) == {key: "resized"}
    assert kinds(plan(LightningDiT(SETTINGS), inspect(file), ["a", "b", "c", "d", "e"])) == {}


def test_tensors_of_another_kind_are_named_by_the_plan(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    name = "blocks.0.mlp.w3.bias"
    odd = source[0].state_dict() | {name: source[0].state_dict()[name].long()}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(LightningDiTError, match=rf"odd\.pt: tensor {name} is whole; real numbers are expected"):
        plan(LightningDiT(SETTINGS), inspect(tmp_path / "odd.pt"))


@torch.no_grad()
@pytest.mark.parametrize("start", ["null", "mean", "random"])
def test_new_classes_start_as_asked(start: str, source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    file, key = tmp_path / "named.safetensors", "y_embedder.embedding_table.weight"
    save_weights(source[0].state_dict(), file, {"class_names": '["a", "b", "c", "d", "e"]'})
    old = source[0].state_dict()[key]
    torch.manual_seed(1)
    model = LightningDiT(replace(SETTINGS, num_classes=3))
    own = model.state_dict()[key][:3].clone()
    made = initialise(model, file, ["x", "d", "y"], new_classes=start)
    table, new = model.state_dict()[key], [0, 2]
    assert torch.equal(table[1], old[3]) and torch.equal(table[-1], old[-1])
    expected = {"null": old[-1].expand(2, -1), "mean": old[:5].mean(0).expand(2, -1), "random": own[new]}[start]
    assert torch.equal(table[new], expected)
    words = {"null": "start from the null class", "mean": "the mean of the file's classes", "random": "at random"}
    assert words[start] in made.text()


@torch.no_grad()
def test_a_second_label_and_an_augmentation_change_nothing_at_the_start(source: tuple[LightningDiT, Path]) -> None:
    model, made = adapted(source[1], num_conditions=3, augmentation=2)
    assert kinds(made) == {"c_embedder.embedding_table.weight": "new", "a_embedder.weight": "new"}
    x, told = torch.randn(2, 4, 8, 8), torch.rand(2, 2)
    old = source[0](x, TIMES, torch.tensor([4, 1]))
    torch.testing.assert_close(model(x, TIMES, torch.tensor([[4, 0], [1, 2]]), told), old)


@torch.no_grad()
def test_without_conditions_the_model_is_that_of_the_null_condition(tmp_path: Path) -> None:
    file = tmp_path / "conditional.safetensors"
    old = seed_weights(LightningDiT(replace(SETTINGS, num_conditions=2))).eval()
    save_weights(old.state_dict(), file)
    model, made = adapted(file, num_conditions=0)
    assert kinds(made) == {lightningdit.CLASS_TABLE: "changed", lightningdit.CONDITION_TABLE: "left out"}
    assert "the model has no conditions; the null condition is added to every class" in made.text()
    x, classes = torch.randn(3, 4, 8, 8), torch.tensor([0, 4, SETTINGS.num_classes])  # the null class too
    labels = torch.stack([classes, torch.full_like(classes, 2)], dim=1)
    times = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(model(x, times, classes), old(x, times, labels), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_conditions_are_taken_by_name(tmp_path: Path) -> None:
    key, file = "c_embedder.embedding_table.weight", tmp_path / "named.safetensors"
    old = seed_weights(LightningDiT(replace(SETTINGS, num_conditions=2)))
    save_weights(old.state_dict(), file, {"condition_names": '["line", "bag"]'})
    table = old.state_dict()[key]
    for names, rows in ((("bag", "line"), [1, 0, 2]), (("coat", "line", "bag"), [2, 0, 1, 2])):
        model = LightningDiT(replace(SETTINGS, num_conditions=len(names)))
        made = initialise(model, file, None, names, "null")
        assert kinds(made) == {key: "resized"}
        assert torch.equal(model.state_dict()[key], table[rows])  # a new one starts from the null condition, row 2
    assert "2 conditions and the null class are taken by name, those of 1 are new" in made.text()


@torch.no_grad()
def test_a_unet_starts_from_a_unet(source: tuple[LightningDiT, Path], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    settings = UNetSettings(4, 4, 5, widths=(32, 64), layers=1, attends=(False, True))
    old, key = UNet(settings), "y_embedder.embedding_table.weight"
    save_weights(old.state_dict(), tmp_path / "unet.safetensors", {"class_names": '["a", "b", "c", "d", "e"]'})
    model = UNet(replace(settings, num_classes=2, input_size=8, num_conditions=1))
    made = initialise(model, tmp_path / "unet.safetensors", ["e", "new"], new_classes="null")
    assert kinds(made) == {key: "resized", "c_embedder.embedding_table.weight": "new"}
    assert torch.equal(model.state_dict()[key], old.state_dict()[key][[4, 5, 5]])
    taken = [name for name in old.state_dict() if name != key]
    assert all(torch.equal(model.state_dict()[name], old.state_dict()[name]) for name in taken)
    with pytest.raises(
        LightningDiTError, match=r"unet.safetensors holds .*; the configuration describes 2 layers of 16"
    ):
        adapted(tmp_path / "unet.safetensors")
    with pytest.raises(LightningDiTError, match=r"does not fit: layers: 1 in the file, 2 in the configuration"):
        initialise(UNet(replace(settings, layers=2)), tmp_path / "unet.safetensors")
