"""The command that trains a tokenizer: stages, resuming, the published schema, folders of images, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from LightningDiT import train_tokenizer
from LightningDiT.checkpoint import load_training_state, load_weights
from LightningDiT.data.reading import ReadingProcesses
from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.split import load_split
from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, load_tokenizer_config
from LightningDiT.tokenizer.config import tokenizer_training as training_of
from LightningDiT.tokenizer.starting_weights import read_starting_weights
from LightningDiT.tokenizer.vavae import load_autoencoder
from LightningDiT.train_tokenizer import STAGES
from LightningDiT.training import tokenizer_training
from LightningDiT.training.curves import LiveCurves, read_log
from tests.conftest import BUNDLED, PROJECT
from tests.test_perceptual import vgg_file  # noqa: F401 - a fixture
from tests.test_tokenizer_training import (
    DDCONFIG,
    EVERY_TERM,
    SHORT,
    every_term,  # noqa: F401 - a fixture
    networks_of,
    write_yaml,
)
from tests.test_vision import vit_file  # noqa: F401 - a fixture
from tests.walkers import prepared


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take seconds to draw, and have tests of their own."""
    monkeypatch.setattr(LiveCurves, "_draw", lambda self: None)


def run(config: Path, data: Path, output: Path, *more: str) -> None:
    command = ["--config", str(config), "--data-root", str(data), "--output", str(output), *more]
    assert train_tokenizer.main(command) == 0


def equal(first: Path, second: Path) -> bool:
    left, right = load_weights(first), load_weights(second)
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


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


def test_the_small_recipe_needs_no_other_network(fashion_folder: Path, tmp_path: Path) -> None:
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
    config = training_of(load_tokenizer_config(BUNDLED / "tokenizer.yaml"))
    assert (config.l1_weight, config.l2_weight, config.kl_weight, config.lr) == (1.0, 1.0, 4e-6, 1e-3)
    assert (config.lpips_weight, config.disc_weight, config.vf_weight, config.sum_values) == (0.0, 0.0, 0.0, False)
    assert (config.beta1, config.beta2, config.max_grad_norm, config.decay_steps) == (0.9, 0.99, 1.0, None)


def test_stages_go_on_from_one_another(
    fashion_folder: Path,
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


def test_what_was_trained_decodes_as_it_is(fashion_folder: Path, tmp_path: Path) -> None:
    """training.safetensors has the layout of a published checkpoint, which inference reads."""
    config = write_yaml(tmp_path / "small.yaml", SHORT)
    run(config, fashion_folder, tmp_path / "run")
    path = tmp_path / "run" / "training.safetensors"
    model = load_autoencoder(load_tokenizer_config(config), path)
    assert torch.equal(model.quant_conv.weight, read_starting_weights(path).autoencoder["quant_conv.weight"])


def test_the_published_stages_are_the_published_ones() -> None:
    """Epochs, weight, margins and start of the discriminator (arXiv 2501.01423, and the published configurations)."""
    stages = [training_of(load_tokenizer_config(path)) for path in STAGES]
    rows = [(s.epochs, s.vf_weight, s.cos_margin, s.distmat_margin, s.disc_start) for s in stages]
    assert rows == [(100, 0.5, 0.0, 0.0, 5001), (15, 0.1, 0.0, 0.0, 1), (15, 0.1, 0.5, 0.25, 1)]
    for stage in stages:
        assert (stage.kl_weight, stage.disc_weight, stage.lpips_weight, stage.l1_weight) == (1e-6, 0.5, 1.0, 1.0)
        assert (stage.sum_values, stage.adaptive_vf, stage.vision_model, stage.l2_weight) == (True, True, "dinov2", 0.0)


def published(tmp_path: Path, train: dict[str, object] | None = None, target: str = "x.LPIPSWithDiscriminator", **keys):
    lossconfig = {"target": target, "params": keys}
    path = write_yaml(tmp_path / "p.yaml", train or {}, use_vf="mae", reverse_proj=False, lossconfig=lossconfig)
    return training_of(load_tokenizer_config(path))


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
        training_of(load_tokenizer_config(write_yaml(tmp_path / "v.yaml", {"vf_weight": 0.5})))


def test_lpips_that_is_not_there_is_an_error_or_left_out(
    fashion_folder: Path,
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


def test_sizes_that_cannot_be_are_named(fashion_folder: Path, tmp_path: Path) -> None:
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
def test_sizes_of_no_autoencoder_are_named(key: str, value: object, fashion_folder: Path, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "wrong.yaml", SHORT, ddconfig={**DDCONFIG, key: value})
    with pytest.raises(LightningDiTError, match=rf"{key} is .*; fix: "):
        run(config, fashion_folder, tmp_path / "out")


def test_a_run_of_another_loss_is_refused(fashion_folder: Path, tmp_path: Path) -> None:
    run(write_yaml(tmp_path / "a.yaml", SHORT), fashion_folder, tmp_path / "run", "--max-steps", "2")
    other = write_yaml(tmp_path / "b.yaml", {**SHORT, "l2_weight": 0.25})
    with pytest.raises(LightningDiTError, match="a run of other settings .training.l2_weight: default there, 0.25 now"):
        run(other, fashion_folder, tmp_path / "run")


def test_training_takes_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five images of one colour each, 40x36, of which one is none; read by threads and, as on a GPU, by processes."""
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for index in range(5):
        Image.new("RGB", (40, 36), (50 * index, 0, 255)).save(folder / "deep" / f"{index}.png")
    (folder / "deep" / "2.png").write_bytes(b"no image")
    config = write_yaml(tmp_path / "small.yaml", {**SHORT, "epochs": 2, "batch_size": 2})
    command = ["--config", str(config), "--images", str(folder), "--output", str(tmp_path / "run")]
    assert train_tokenizer.main(command) == 0
    assert (tmp_path / "run" / "checkpoint-0000004.pt").is_file()  # two passes of two batches of two
    assert f"passed over 1 images that cannot be read: {folder / 'deep' / '2.png'}" in capsys.readouterr().out
    asked, real = list[str](), ReadingProcesses.read
    monkeypatch.setattr(tokenizer_training, "default_workers", lambda device, processes: 2)
    monkeypatch.setattr(
        ReadingProcesses, "read", lambda self, file, *how: asked.append(file.name) or real(self, file, *how)
    )
    assert train_tokenizer.main([*command[:-1], str(tmp_path / "again")]) == 0
    assert set(asked) == {f"{index}.png" for index in range(5)}
    average = (tmp_path / "run" / "tokenizer.safetensors").read_bytes()
    assert (tmp_path / "again" / "tokenizer.safetensors").read_bytes() == average


@pytest.mark.skipif(
    torch.__version__.startswith("2.2") and sys.version_info >= (3, 12),
    reason="torchrun of torch 2.2 crashes on Python 3.12 before it starts anything",
)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one_with_the_same_batch(fashion_folder: Path, tmp_path: Path) -> None:
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


def test_a_dry_run_looks_at_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(BUNDLED / "tokenizer.yaml"), "--dry-run", "--output", str(tmp_path / "out")]
    images = tmp_path / "images"
    with pytest.raises(LightningDiTError, match="no images in .*images: it is not there"):
        train_tokenizer.main([*options, "--images", str(images)])
    images.mkdir()
    (images / "x.npy").touch()
    for number, size in enumerate(((64, 100), (32, 32), (40, 30))):
        Image.new("RGB", size).save(images / f"{number}.png")
    assert train_tokenizer.main([*options, "--images", str(images)]) == 0
    said = capsys.readouterr().out
    assert f"note: passed over 1 files that are no images: .npy 1\n3 images of {images}\n" in said
    assert (
        "note: 2 of 3 images looked at are not square: the crop leaves out both ends of their longer side, up" in said
    )
    (images / "1.png").write_bytes(b"")
    (images / "0.png").write_bytes(b"")
    (images / "2.png").write_bytes(b"")
    with pytest.raises(LightningDiTError, match="none of the 3 images"):
        train_tokenizer.main([*options, "--images", str(images)])
    assert train_tokenizer.main([*options, "--data-root", str(tmp_path)]) == 0
    assert "has no photographs of Fashion-MNIST yet" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("walkers"), {"1": [4, 4, 4], "2": [4, 4, 4]}, "--db-range", "-45", "0")


def levels_command(walkers: Path, config: Path, output: Path, *more: str) -> list[str]:
    where = ["--levels", str(walkers / "levels"), "--split-file", str(walkers / "out" / "split.json")]
    return ["--config", str(config), *where, "--output", str(output), *more]


def test_levels_are_trained_on_and_validated(walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the bundled weights; in parts and at once; the log has the PSNR of the validation windows."""
    config = TOKENIZER_CONFIGS / "levels_f4d6.yaml"
    short = write_yaml(tmp_path / "s.yaml", {**SHORT, "trainable": "decoder", "texture_weight": 0.05})
    content = yaml.safe_load(short.read_text()) | {"model": yaml.safe_load(config.read_text())["model"]}
    short.write_text(yaml.safe_dump(content))
    options = ("--init", str(BUNDLED))
    assert train_tokenizer.main(levels_command(walkers, short, tmp_path / "whole", *options)) == 0
    said = capsys.readouterr().out
    windows = load_split(walkers / "out" / "split.json")
    assert f"{len(windows.part('training', 0))} images of training windows of fold 0" in said
    assert "first kernel summed over its 3 inputs" in said
    before = float(said.split("validation PSNR before the training: ")[1].split()[0])
    assert train_tokenizer.main(levels_command(walkers, short, tmp_path / "parts", *options, "--max-steps", "2")) == 0
    assert train_tokenizer.main(levels_command(walkers, short, tmp_path / "parts")) == 0  # the checkpoint knows all
    for name in ("tokenizer.safetensors", "training.safetensors", "best.safetensors"):
        assert equal(tmp_path / "whole" / name, tmp_path / "parts" / name), name
    ratios = [row["valid_psnr"] for row in read_log(tmp_path / "whole" / "log.jsonl") if "valid_psnr" in row]
    assert len(ratios) == 2
    assert ratios[-1] > before
    first = load_weights(BUNDLED / "tokenizer.safetensors")["quant_conv.weight"]
    assert torch.equal(load_weights(tmp_path / "whole" / "tokenizer.safetensors")["quant_conv.weight"], first)


def test_a_mirrored_spectrogram_and_half_an_option_are_refused(
    walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_yaml(tmp_path / "s.yaml", {**SHORT, "flip": True})
    with pytest.raises(LightningDiTError, match="a mirrored spectrogram runs backwards in time; fix: set train.flip"):
        train_tokenizer.main(levels_command(walkers, config, tmp_path / "out"))
    for options in (["--levels", "L"], ["--split-file", "S"], ["--fold", "1"]):
        with pytest.raises(SystemExit):
            train_tokenizer.main(["--config", str(config), *options])
        assert "--levels" in capsys.readouterr().err


def test_a_dry_run_looks_at_the_windows(walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_yaml(tmp_path / "s.yaml", SHORT, ddconfig={**DDCONFIG, "ch_mult": [1, 1, 1, 1, 1, 1]})
    with pytest.raises(LightningDiTError, match="have 16x16 pixels; sides that are multiples of 32 are expected"):
        train_tokenizer.main(levels_command(walkers, config, tmp_path / "out", "--dry-run"))
    grey = write_yaml(tmp_path / "g.yaml", SHORT, ddconfig={**DDCONFIG, "in_channels": 1, "out_ch": 1})
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert train_tokenizer.main(["--config", str(grey), "--images", str(tmp_path), "--dry-run"]) == 0
    assert "note: colours are averaged, since the tokenizer has one channel" in capsys.readouterr().out
