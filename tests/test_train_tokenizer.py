"""Training the tokenizer: every term at once, stages, resuming, starting weights, the published schema, photographs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from LightningDiT import train_tokenizer
from LightningDiT.checkpoint import load_training_state, load_weights, save_weights
from LightningDiT.data.photographs import Photographs
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.config import TokenizerTrainConfig, load_tokenizer_config, tokenizer_training
from LightningDiT.tokenizer.starting_weights import read_starting_weights
from LightningDiT.tokenizer.vavae import load_autoencoder
from LightningDiT.train_tokenizer import STAGES, Networks, TokenizerTrainer, build_networks
from LightningDiT.training.curves import LiveCurves
from LightningDiT.training.guard import NotFiniteError
from tests.conftest import BUNDLED, PROJECT
from tests.test_data import fashion_folder  # noqa: F401 - a fixture
from tests.test_perceptual import vgg_file  # noqa: F401 - a fixture
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


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take seconds to draw, and have tests of their own."""
    monkeypatch.setattr(LiveCurves, "_draw", lambda self: None)


@pytest.fixture
def every_term(tmp_path: Path, vgg_file: Path, vit_file: Path) -> Path:  # noqa: F811
    """A YAML with every term of the loss."""
    files = {"lpips_weights": str(vgg_file), "vision_weights": str(vit_file)}
    return write_yaml(tmp_path / "every.yaml", EVERY_TERM | files)


def run(config: Path, data: Path, output: Path, *more: str) -> None:
    command = ["--config", str(config), "--data-root", str(data), "--output", str(output), *more]
    assert train_tokenizer.main(command) == 0


def equal(first: Path, second: Path) -> bool:
    left, right = load_weights(first), load_weights(second)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def networks_of(path: Path) -> tuple[Networks, TokenizerTrainConfig]:
    tokenizer = load_tokenizer_config(path)
    config = tokenizer_training(tokenizer)
    return build_networks(tokenizer, config), config


class Noise:
    """Random images in memory."""

    def __init__(self, count: int = 8) -> None:
        self.images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int]) -> Tensor:
        return self.images[torch.as_tensor(indices)]

    def expect(self, indices: list[int]) -> None:
        """All are there."""


def test_a_run_in_parts_is_the_run_at_once(fashion_folder: Path, every_term: Path, tmp_path: Path) -> None:  # noqa: F811
    """Bit for bit, with both optimizers, the norms of the discriminator, the scale and the projection."""
    run(every_term, fashion_folder, tmp_path / "whole")
    run(every_term, fashion_folder, tmp_path / "parts", "--max-steps", "3")
    run(every_term, fashion_folder, tmp_path / "parts")
    for name in ("tokenizer.safetensors", "training.safetensors"):
        assert equal(tmp_path / "whole" / name, tmp_path / "parts" / name), name
    trained = load_weights(tmp_path / "whole" / "training.safetensors")
    assert int(trained["loss.discriminator.main.3.num_batches_tracked"]) == 3 * 3  # twice real or fake, once for both
    assert float(trained["loss.logvar"]) != 0.0
    assert (tmp_path / "whole" / "reconstructions.png").is_file()


def test_the_small_recipe_needs_no_other_network(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write_yaml(tmp_path / "small.yaml", SHORT)
    run(config, fashion_folder, tmp_path / "whole")
    run(config, fashion_folder, tmp_path / "parts", "--max-steps", "2")
    run(config, fashion_folder, tmp_path / "parts")
    assert equal(tmp_path / "whole" / "tokenizer.safetensors", tmp_path / "parts" / "tokenizer.safetensors")
    rows = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    terms = yaml.safe_load(rows[-1]).keys()
    assert {"loss", "l1", "l2", "kl"} <= terms
    assert not terms & {"lpips", "gan", "vf_cos"}


def test_the_bundled_recipe_is_what_it_was() -> None:
    config = tokenizer_training(load_tokenizer_config(BUNDLED / "tokenizer.yaml"))
    assert (config.l1_weight, config.l2_weight, config.kl_weight, config.lr) == (1.0, 1.0, 4e-6, 1e-3)
    assert (config.lpips_weight, config.disc_weight, config.vf_weight, config.sum_values) == (0.0, 0.0, 0.0, False)
    assert (config.beta1, config.beta2, config.max_grad_norm, config.decay_steps) == (0.9, 0.99, 1.0, None)


def test_training_lowers_the_loss_on_one_batch(tmp_path: Path) -> None:
    networks, config = networks_of(write_yaml(tmp_path / "small.yaml", {**SHORT, "max_steps": 100}))
    trainer = TokenizerTrainer(config, networks, Noise())
    losses = [float(trainer.step(0)["loss"]) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_discriminator_learns_and_the_frozen_networks_do_not(every_term: Path) -> None:
    networks, config = networks_of(every_term)
    trainer = TokenizerTrainer(config, networks, Noise())
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


def test_a_step_that_is_not_finite_changes_no_weight(every_term: Path) -> None:
    networks, config = networks_of(every_term)
    images = Noise()
    trainer = TokenizerTrainer(config, networks, images)
    trainer.step(1)
    before = {name: value.clone() for name, value in trainer.weights().items()}
    whole = images.images.clone()
    images.images[:] = float("nan")
    with pytest.raises(NotFiniteError, match="the reconstruction of step 2 is not finite"):
        trainer.step(2)
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights().items())
    images.images = whole
    with torch.no_grad():
        networks.criterion.discriminator.main[0].weight[0, 0, 0, 0] = float("inf")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(NotFiniteError):
        trainer.step(2)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_stages_go_on_from_one_another(
    fashion_folder: Path,  # noqa: F811
    vit_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one command and in pieces: the same weights."""
    train = {**EVERY_TERM, "lpips_weight": 0.0, "vision_weights": str(vit_file)}
    first = write_yaml(tmp_path / "first.yaml", train)
    second = write_yaml(tmp_path / "second.yaml", {**train, "vf_weight": 0.1, "cos_margin": 0.5})

    def stages(output: str, *more: str) -> None:
        command = ["--config", str(first), str(second), "--data-root", str(fashion_folder)]
        assert train_tokenizer.main([*command, "--output", str(tmp_path / output), *more]) == 0

    stages("whole")
    said = capsys.readouterr().out
    assert f"stage 2 of 2: {second}" in said
    assert f"starting from {tmp_path / 'whole' / 'stage1' / 'training.safetensors'}" in said
    assert "discriminator (loss.discriminator): 16 tensors taken" in said
    assert "projection (linear_proj): 1 tensors taken" in said
    run(first, fashion_folder, tmp_path / "parts" / "stage1", "--max-steps", "2")
    stages("parts")  # the first stage goes on from step 2
    assert "going on from step 2" in capsys.readouterr().out
    stages("parts")
    assert "it is finished" in capsys.readouterr().out
    with pytest.raises(LightningDiTError, match=r"stage1 holds a stage of other settings \(seed: 0 there, 1 now\)"):
        write_yaml(first, {**train, "seed": 1})
        stages("parts")
    for stage in ("stage1", "stage2"):
        name = f"{stage}/training.safetensors"
        assert equal(tmp_path / "whole" / name, tmp_path / "parts" / name), stage
    assert not equal(tmp_path / "whole/stage1/training.safetensors", tmp_path / "whole/stage2/training.safetensors")


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
    assert TokenizerTrainer(config, started, Noise()).step(1)["loss"].isfinite()


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
    assert "discriminator (loss.discriminator): 16 tensors left out, this training has no loss.discriminator" in said
    assert "projection (linear_proj): 1 tensors left out, this training has no linear_proj.weight" in said
    assert "LPIPS (loss.perceptual_loss): 1 tensors left out, this training uses none" in said
    assert "vision model (foundation_model): 1 tensors left out" in said
    weights["loss.discriminator.main.0.weight"] = torch.ones(64, 1, 4, 4)
    save_weights(weights, tmp_path / "all.safetensors")
    two = {**SHORT, "disc_weight": 1.0, "disc_layers": 2, "weight_init": "all.safetensors"}
    networks_of(write_yaml(tmp_path / "two.yaml", two))
    said = capsys.readouterr().out
    assert "left out, loss.discriminator.main.0.weight is [64, 1, 4, 4], here [64, 3, 4, 4]" in said
    only = networks.model.state_dict()
    save_weights(only, tmp_path / "all.safetensors")
    networks_of(tmp_path / "two.yaml")
    assert "discriminator (loss.discriminator): not in the file, starts new" in capsys.readouterr().out
    save_weights({**only, "loss.sum": torch.ones(1)}, tmp_path / "all.safetensors")
    with pytest.raises(LightningDiTError, match="1 unknown: loss.sum"):
        networks_of(tmp_path / "small.yaml")


def test_what_was_trained_decodes_as_it_is(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """training.safetensors has the layout of a published checkpoint, which inference reads."""
    config = write_yaml(tmp_path / "small.yaml", SHORT)
    run(config, fashion_folder, tmp_path / "run")
    path = tmp_path / "run" / "training.safetensors"
    model = load_autoencoder(load_tokenizer_config(config), path)
    assert torch.equal(model.quant_conv.weight, read_starting_weights(path).autoencoder["quant_conv.weight"])


def test_the_published_stages_are_the_published_ones() -> None:
    """Epochs, weight, margins and start of the discriminator (arXiv 2501.01423, and the published configurations)."""
    stages = [tokenizer_training(load_tokenizer_config(path)) for path in STAGES]
    rows = [(s.epochs, s.vf_weight, s.cos_margin, s.distmat_margin, s.disc_start) for s in stages]
    assert rows == [(100, 0.5, 0.0, 0.0, 5001), (15, 0.1, 0.0, 0.0, 1), (15, 0.1, 0.5, 0.25, 1)]
    for stage in stages:
        assert (stage.kl_weight, stage.disc_weight, stage.lpips_weight, stage.l1_weight) == (1e-6, 0.5, 1.0, 1.0)
        assert (stage.sum_values, stage.adaptive_vf, stage.vision_model, stage.l2_weight) == (True, True, "dinov2", 0.0)


def published(tmp_path: Path, train: dict[str, object] | None = None, target: str = "x.LPIPSWithDiscriminator", **keys):
    lossconfig = {"target": target, "params": keys}
    path = write_yaml(tmp_path / "p.yaml", train or {}, use_vf="mae", reverse_proj=False, lossconfig=lossconfig)
    return tokenizer_training(load_tokenizer_config(path))


def test_the_published_loss_section_is_read(tmp_path: Path) -> None:
    config = published(tmp_path, disc_start=7, disc_num_layers=2, vf_weight=0.2, adaptive_vf=True, logvar_init=0.5)
    assert (config.disc_start, config.disc_layers, config.vf_weight, config.logvar_init) == (7, 2, 0.2, 0.5)
    assert (config.vision_model, config.kl_weight, config.disc_weight) == ("mae", 1.0, 1.0)  # silent: as there
    assert not load_tokenizer_config(tmp_path / "p.yaml").reverse_proj
    for keys, words in (
        ({"disc_lose": "hinge"}, "unknown key 'disc_lose'; did you mean 'disc_loss'"),
        ({"disc_loss": "vanilla"}, "disc_loss is 'vanilla'; 'hinge' is expected"),
        ({"cos_margin": 3.0}, "train.cos_margin is 3.0; a margin from 0 to 2 is expected"),
        ({"train": {"kl_weight": 0.1}}, "train.kl_weight is set, but model.params.lossconfig decides it"),
        ({"target": "torch.nn.Identity"}, "lossconfig.target is 'torch.nn.Identity'"),
    ):
        with pytest.raises(LightningDiTError, match=words):
            published(tmp_path, **keys)
    assert load_tokenizer_config(tmp_path / "p.yaml").embed_dim == 4  # sampling does not read the loss


def test_an_alignment_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="train.vf_weight is 0.5 and no vision model is named"):
        tokenizer_training(load_tokenizer_config(write_yaml(tmp_path / "v.yaml", {"vf_weight": 0.5})))


def test_lpips_that_is_not_there_is_an_error_or_left_out(
    fashion_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_yaml(tmp_path / "lpips.yaml", {**SHORT, "lpips_weight": 1.0, "lpips_weights": "gone.pth"})
    with pytest.raises(LightningDiTError, match="gone.pth does not exist"):
        run(config, fashion_folder, tmp_path / "run")
    with pytest.raises(LightningDiTError, match="other.pth does not exist"):
        run(config, fashion_folder, tmp_path / "run", "--lpips-weights", str(tmp_path / "other.pth"))
    run(config, fashion_folder, tmp_path / "run", "--without-lpips", "--batch-size", "6", "--max-steps", "1")
    assert "batch': 6" in repr(load_training_state(tmp_path / "run" / "checkpoint-0000001.pt")["settings"])
    assert "note: training goes without LPIPS" in capsys.readouterr().out


def test_sizes_that_cannot_be_are_named(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write_yaml(tmp_path / "deep.yaml", {**SHORT, "disc_weight": 1.0, "disc_layers": 4})
    with pytest.raises(LightningDiTError, match="images of 32 pixels are too small for a discriminator of 4 layers"):
        run(config, fashion_folder, tmp_path / "run")
    small = write_yaml(tmp_path / "s.yaml", {**SHORT, "lpips_weight": 1.0}, ddconfig={**DDCONFIG, "resolution": 8})
    with pytest.raises(LightningDiTError, match="images of 8 pixels are too small for LPIPS, which needs 16"):
        networks_of(small)
    large = write_yaml(tmp_path / "large.yaml", SHORT, ddconfig={**DDCONFIG, "resolution": 64})
    with pytest.raises(LightningDiTError, match="is for images of 64 pixels, those of Fashion-MNIST have 32"):
        run(large, fashion_folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("resolution", 0), ("ch", 0), ("z_channels", 0), ("ch_mult", []), ("ch_mult", [1, 0])),
        *(("num_res_blocks", -1), ("dropout", 1.5), ("in_channels", 1), ("out_ch", 4)),
    ],
)
def test_sizes_of_no_autoencoder_are_named(key: str, value: object, fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write_yaml(tmp_path / "wrong.yaml", SHORT, ddconfig={**DDCONFIG, key: value})
    with pytest.raises(LightningDiTError, match=rf"{key} is .*; fix: "):
        run(config, fashion_folder, tmp_path / "out")


def test_a_run_of_another_loss_is_refused(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    run(write_yaml(tmp_path / "a.yaml", SHORT), fashion_folder, tmp_path / "run", "--max-steps", "2")
    other = write_yaml(tmp_path / "b.yaml", {**SHORT, "l2_weight": 0.25})
    with pytest.raises(LightningDiTError, match="a run of other settings .training.l2_weight: default there, 0.25 now"):
        run(other, fashion_folder, tmp_path / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of one colour each, 40x36, and a file that is none."""
    place = tmp_path / "images"
    (place / "deep").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (40, 36), (50 * index, 0, 255)).save(place / "deep" / f"{index}.png")
    (place / "deep" / "2.png").write_bytes(b"no image")
    return place


def test_photographs_come_by_number(folder: Path) -> None:
    photographs = Photographs(folder, lambda image: image.resize((8, 8)))
    photographs.expect([4, 0])  # what was prepared for another batch is not mistaken for this one
    batch = photographs.batch([3, 2, 4])
    assert batch.shape == (3, 3, 8, 8)
    reds = ((batch[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert reds == [150, 150, 200]  # the next one stands in for the file that is no image
    assert [path.name for path in photographs.unreadable] == ["2.png"]
    assert batch[:, 2].unique().tolist() == [1.0]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(LightningDiTError, match="none of 5 files is an image"):
        Photographs(folder, lambda image: image).batch([0])


def test_training_takes_a_folder_of_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_yaml(tmp_path / "small.yaml", {**SHORT, "epochs": 2, "batch_size": 2})
    command = ["--config", str(config), "--images", str(folder), "--output", str(tmp_path / "run")]
    assert train_tokenizer.main(command) == 0
    assert (tmp_path / "run" / "checkpoint-0000004.pt").is_file()  # two passes of two batches of two
    assert f"passed over 1 files that are no images: {folder / 'deep' / '2.png'}" in capsys.readouterr().out


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    networks, config = networks_of(write_yaml(tmp_path / "f.yaml", {**SHORT, "flip": True, "batch_size": 64}))
    images = Noise(64)
    batch = TokenizerTrainer(config, networks, images)._batch(0)
    order = TokenizerTrainer(config, networks, images)._indices(0)
    mirrored = [torch.equal(seen, images.images[index].flip(-1)) for seen, index in zip(batch, order, strict=True)]
    plain = [torch.equal(seen, images.images[index]) for seen, index in zip(batch, order, strict=True)]
    assert all(one != other for one, other in zip(mirrored, plain, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.skipif(
    torch.__version__.startswith("2.2") and sys.version_info >= (3, 12),
    reason="torchrun of torch 2.2 crashes on Python 3.12 before it starts anything",
)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one_with_the_same_batch(fashion_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = write_yaml(tmp_path / "small.yaml", {**SHORT, "lr": 1e-4, "precision": "fp32"})
    run(config, fashion_folder, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "LightningDiT.train_tokenizer", "--config", str(config), "--data-root", str(fashion_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launcher, *command, "--output", str(tmp_path / "two")],
        check=True,
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    one, two = (load_weights(tmp_path / name / "tokenizer.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        # a shift before a norm of its own channel has no gradient, and Adam turns rounding into steps of its rate
        torch.testing.assert_close(two[name], value, atol=1e-5 if value.dim() > 1 else 4 * 1e-4, rtol=0)
