"""The repair of latents_stats.pt: every kind of damage, every source, and nothing lost."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fix_latents_stats
from LightningDiT import console
from LightningDiT.checkpoint import save_weights
from LightningDiT.config import load_config
from LightningDiT.data.fashion_mnist import pad_to_32
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import centre_crop
from LightningDiT.loading import load_stats
from LightningDiT.tokenizer.latents import LatentStats, diagnose
from LightningDiT.tokenizer.vavae import VA_VAE
from setup_steps import downloads, stats_repair, weights
from setup_steps.project import PROJECT
from tests.conftest import write_idx
from tests.hub_server import Hub, running_hub
from tests.project_copy import PYTHON, copy_project, run_script
from tests.published import good_stats

CHANNELS = 8
GOOD = LatentStats(torch.linspace(-1, 1, CHANNELS).view(1, -1, 1, 1), torch.linspace(1, 2, CHANNELS).view(1, -1, 1, 1))


def save(mean: torch.Tensor, std: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: torch.save({"mean": mean, "std": std}, path)


class Hostile:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch was-run",)


MEAN, STD = GOOD.mean, GOOD.std
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: path.touch(), "is empty (0 bytes)"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "cut short": (lambda path: path.write_bytes(b"PK\x03\x04half"), "cut short or no weights file"),
    "a web page": (lambda path: path.write_bytes(b"<!doctype html>"), "is a web page"),
    "hostile": (lambda path: path.write_bytes(pickle.dumps(Hostile(), 2)), "would run code"),
    "a broken link": (lambda path: path.symlink_to("/detached/latents_stats.pt"), "does not exist"),
    "other bytes": (lambda path: path.write_bytes(b"second"), "no weights file"),
    "no mean": (lambda path: torch.save({"std": STD}, path), "tensors `mean` and `std` are expected"),
    "wrong shape": (save(MEAN.view(2, 4, 1, 1), STD.view(2, 4, 1, 1)), "has the shape [2, 4, 1, 1]"),
    "wrong channels": (save(MEAN[:, :4], STD[:, :4]), "has the shape [1, 4, 1, 1]"),
    "not finite": (save(MEAN / 0, STD), "mean is not finite"),
    "std not positive": (save(MEAN, STD * 0), "std is not positive"),
    "mean 0 and std 1": (save(MEAN * 0, STD * 0 + 1), "mean is 0 and std is 1"),
}


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled model's folder: a tokenizer file that carries the statistics, and none beside it."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    save_file({"w": torch.zeros(1)}, folder / "tokenizer.safetensors", metadata=GOOD.as_metadata())
    monkeypatch.setattr(weights, "BUNDLED", folder)
    return folder


def repair(path: Path, *options: str) -> int:
    return fix_latents_stats.main(["--stats", str(path), *options])


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_is_named_kept_aside_and_repaired(
    kind: str, bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = DAMAGE[kind]
    path = bundled / "latents_stats.pt"
    make(path)
    there = path.is_file()
    before = path.read_bytes() if there else b""

    assert repair(path, "--check") == 1
    *_, fault, fix = capsys.readouterr().out.splitlines()
    assert fault.startswith("  wrong: ")
    assert words in fault
    assert fix == f"  fix: {PYTHON} fix_latents_stats.py --stats {path}"
    assert (path.read_bytes() if path.is_file() else b"") == before

    assert repair(path) == 0
    loaded = LatentStats.load(path, CHANNELS)
    torch.testing.assert_close(loaded.mean, GOOD.mean)
    torch.testing.assert_close(loaded.std, GOOD.std)
    assert not Path("was-run").exists()
    kept = path.with_name("latents_stats.pt.bad-1")
    assert (kept.exists() or kept.is_symlink()) == (kind != "missing")
    if there:
        assert kept.read_bytes() == before
    said = capsys.readouterr().out
    assert "8 channels, means -1.000 to 1.000, standard deviations 1.000 to 2.000" in said
    assert repair(path, "--check") == 0


def test_a_good_file_is_not_touched(bundled: Path) -> None:
    path = bundled / "latents_stats.pt"
    GOOD.save(path)
    before = path.stat().st_mtime_ns
    for options in ([], ["--check"], ["--identity"], ["--source", "hub"]):
        assert repair(path, *options) == 0
    assert path.stat().st_mtime_ns == before
    assert [item.name for item in bundled.glob("latents*")] == ["latents_stats.pt"]


def test_a_second_bad_file_gets_a_second_name(bundled: Path) -> None:
    path = bundled / "latents_stats.pt"
    for content in (b"first", b"2nd"):
        path.write_bytes(content)
        repair(path)
    assert (bundled / "latents_stats.pt.bad-1").read_bytes() == b"first"
    assert (bundled / "latents_stats.pt.bad-2").read_bytes() == b"2nd"


def test_torch_cat_expected_a_non_empty_list_of_tensors_is_recognised_and_fixed(
    bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published code reads the shards beside a statistics file that it cannot use; there are none,
    and torch says this.
    """
    path = bundled / "latents_stats.pt"
    with pytest.raises((RuntimeError, ValueError)) as published:
        torch.cat([torch.load(shard, weights_only=True) for shard in sorted(bundled.glob("latents_*.safetensors"))])
    text = str(published.value)
    assert f'"{text}"' in " ".join((fix_latents_stats.__doc__ or "").split())
    with pytest.raises(SystemExit):
        fix_latents_stats.parse(["--help"])
    assert text in capsys.readouterr().out
    for make in (lambda: path.unlink(missing_ok=True), lambda: path.write_bytes(b"")):
        make()
        assert repair(path, "--check") == 1
        assert repair(path) == 0
        torch.testing.assert_close(LatentStats.load(path, CHANNELS).std, GOOD.std)


def test_torch_cat_expected_a_non_empty_list_of_tensors_where_data_path_names_the_file(
    bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published code looks for shards below the file, and finds an empty list."""
    path, config = bundled / "latents_stats.pt", bundled / "config.yaml"
    config.write_text(f"data: {{data_path: '{path}'}}\nmodel: {{in_chans: {CHANNELS}}}\n")
    with pytest.raises((RuntimeError, ValueError), match=r"expected a non-empty list of Tensors"):
        torch.cat([torch.load(shard, weights_only=True) for shard in sorted(path.glob("*.safetensors"))])
    named, step3 = ["--config", str(config)], f"{PYTHON} step3_setup_configs.py --output {config}"
    words = f"wrong: data.data_path in config.yaml names the file {path}; its folder {bundled} is expected"
    path.touch()
    for options, code, last in (
        (["--check"], 1, f"  fix: {PYTHON} fix_latents_stats.py --config {config}"),
        ([], 0, f"Next: {step3}"),
        (["--check"], 1, f"  fix: {step3}"),  # a good file, the path still wrong
        ([], 0, f"Next: {step3}"),
    ):
        assert fix_latents_stats.main([*named, *options]) == code
        said = capsys.readouterr().out
        assert words in said
        assert said.splitlines()[-1] == last
    with pytest.raises(LightningDiTError, match=f"fix: set data_path: {bundled}"):
        load_stats(load_config(config))
    config.write_text(config.read_text().replace(str(path), str(bundled)))  # what the message says
    torch.testing.assert_close(load_stats(load_config(config)).mean, GOOD.mean)
    assert fix_latents_stats.main([*named, "--check"]) == 0


def test_a_bad_source_changes_nothing(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer's copy is damaged too: the file that was there stays where it was."""
    path = bundled / "latents_stats.pt"
    path.write_bytes(b"mine")
    save_file({"w": torch.zeros(1)}, bundled / "tokenizer.safetensors")
    with pytest.raises(LightningDiTError, match=f"no source has good statistics for {path}; fix: .* --images FOLDER"):
        stats_repair.repair(
            stats_repair.Target(path, "bundled", CHANNELS, ""), stats_repair.Request(), stats_repair.ORDER["bundled"]
        )
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["  bundled", "  latents", "  images"]
    assert "carries no latent statistics" in said[0]
    with pytest.raises(LightningDiTError, match="carries no latent statistics"):
        stats_repair.repair(stats_repair.Target(path, "bundled", CHANNELS, ""), stats_repair.Request(), ["bundled"])
    assert path.read_bytes() == b"mine"
    assert [item.name for item in bundled.glob("latents*")] == ["latents_stats.pt"]


def write_shards(folder: Path) -> torch.Tensor:
    """Two shards of latents far from zero, where float32 sums would lose the variance."""
    generator = torch.Generator().manual_seed(0)
    latents = 300 + torch.randn(50, 4, 2, 2, generator=generator)
    for index, part in enumerate(latents.split(30)):
        write_shard(shard_path(folder, 0, index), part, torch.zeros(len(part), dtype=torch.long), flipped=part * 0)
    return latents


def test_statistics_of_shards_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = write_shards(tmp_path).double()
    path = tmp_path / "out" / "latents_stats.pt"
    assert repair(path, "--latents", str(tmp_path)) == 0
    assert "computed from 50 latents" in capsys.readouterr().out
    stats = LatentStats.load(path)
    expected_mean = latents.mean(dim=(0, 2, 3)).float().view(1, 4, 1, 1)
    expected_std = latents.transpose(0, 1).flatten(1).std(dim=1).float().view(1, 4, 1, 1)
    torch.testing.assert_close(stats.mean, expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.std, expected_std, rtol=1e-5, atol=0)


def test_shards_of_another_tokenizer_are_refused(bundled: Path, tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = bundled / "latents_stats.pt"
    with pytest.raises(
        LightningDiTError, match=r"either: .* \[1, 8, 1, 1\] is expected; fix: .* --images FOLDER"
    ) as caught:
        repair(path, "--latents", str(tmp_path))
    assert f"--stats {path} " in (caught.value.fix or "")
    assert not path.exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a good statistics file of 32 channels."""
    with running_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", "")
        yield running


def test_the_hubs_file_comes_to_the_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = torch.arange(1.0, 33.0).view(1, 32, 1, 1)
    torch.save({"mean": stats, "std": stats}, tmp_path / "published")
    content = (tmp_path / "published").read_bytes()
    hub.put(weights.STATS.repo, weights.STATS.name, content)
    monkeypatch.setattr(weights, "MODELS", tmp_path)
    (tmp_path / "latents_stats.pt").touch()
    assert repair(tmp_path) == 0  # a folder stands for the file in it
    assert (tmp_path / "latents_stats.pt").read_bytes() == content
    assert (tmp_path / "latents_stats.pt.bad-1").stat().st_size == 0


def test_without_a_hub_the_bad_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path = tmp_path / "latents_stats.pt"
    path.touch()
    with pytest.raises(LightningDiTError, match=r"cannot be reached .*; fix: "):
        repair(path, "--source", "hub")
    assert [item.name for item in tmp_path.iterdir()] == ["latents_stats.pt"]


def test_nothing_is_invented_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latents_stats.pt"
    with pytest.raises(
        LightningDiTError, match=r"no source has good .*; fix: .* --stats \S+ --images FOLDER \(or --latents"
    ):
        repair(path)
    with pytest.raises(LightningDiTError, match=r"is not known; fix: add --channels N"):
        repair(path, "--identity")
    assert not path.exists()
    assert repair(path, "--identity", "--channels", "4") == 0
    assert "WARNING: mean 0 and std 1 are INVENTED numbers for 4 channels" in capsys.readouterr().out
    assert diagnose(path, 4) == ["mean is 0 and std is 1 in every channel: placeholder numbers, which ruin every image"]


def test_dry_run_says_the_source_and_changes_nothing(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repair(bundled / "latents_stats.pt", "--dry-run") == 0
    assert "get good ones from: bundled, else latents, else images\n" in capsys.readouterr().out
    assert not (bundled / "latents_stats.pt").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--source", "images"],
        ["--source", "x"],
        ["--source", "hub", "--images", "x"],
        ["--source", "images", "--images", "x", "--latents", "x"],
        ["--channels", "0"],
        ["--images", "x", "--max-images", "0"],
        ["--max-images", "5"],
        ["--tokenizer", "x.yaml"],
        ["--checkpoint", "x.pt"],
    ],
)
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        fix_latents_stats.parse(options)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("data_path", "found"),
    [("stats", "stats/latents_stats.pt"), ("stats/latents_stats.pt", "stats/latents_stats.pt")],
)
def test_the_configuration_names_the_file(tmp_path: Path, data_path: str, found: str) -> None:
    """`data_path` is a folder; naming the file in its place is the second cause of torch.cat()."""
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "latents_stats.pt").touch()
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  data_path: {data_path}\n")
    target = stats_repair.locate(None, config)
    path, fault = tmp_path / found, None
    if data_path.endswith(".pt"):
        fault = f"data.data_path in config.yaml names the file {path}; its folder {path.parent} is expected"
    assert target == stats_repair.Target(path, "published", 32, "config.yaml uses it", fault)


@pytest.mark.parametrize("model", ["lightningdit-xl-imagenet256-64ep.fp16.safetensors", "mine.safetensors"])
def test_published_weights_that_moved_are_repaired_where_they_are(tmp_path: Path, model: str) -> None:
    """Step 4 takes them from there too; a model of one's own has statistics of its own."""
    config, old, new = tmp_path / "c.yaml", tmp_path / "old", tmp_path / "new"
    new.mkdir()
    (new / weights.VAVAE.name).touch()
    config.write_text(f"ckpt_path: {old / model}\ndata:\n  data_path: {old}\n")
    target = stats_repair.locate(None, config, new)
    place, reason = (new, f"c.yaml names {old}, which is not there")
    if model.startswith("mine"):
        place, reason = old, "c.yaml uses it"
    assert target == stats_repair.Target(place / "latents_stats.pt", "published", 32, reason)


@pytest.mark.parametrize("text", [None, "data:\n  num_classes: 10\n"])
def test_without_a_configuration_it_is_that_of_the_model_that_is_here(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """The bundled model's file, unless models/ holds a published one; so too where the YAML is silent."""
    monkeypatch.setattr(weights, "MODELS", tmp_path)
    config, lack = tmp_path / "c.yaml", "there is no c.yaml"
    if text:
        config.write_text(text)
        lack = "c.yaml names no data.data_path"
    target = stats_repair.locate(None, config)
    reason = f"{lack} and no published file in {tmp_path}: the bundled model's"
    assert target == stats_repair.Target(bundled / "latents_stats.pt", "bundled", CHANNELS, reason)
    for name in (weights.DIT["64ep"].name, "latents_stats.pt"):
        (tmp_path / name).touch()
        target = stats_repair.locate(None, config)
        reason = f"{lack}, and {tmp_path} holds {name}"
        assert target == stats_repair.Target(tmp_path / "latents_stats.pt", "published", 32, reason)
        (tmp_path / name).unlink()


def test_the_bare_command_repairs_the_bundled_model_and_says_why(tmp_path: Path) -> None:
    """In a fresh clone, whose path has a space."""
    project = copy_project(tmp_path / "my project")
    folder = project / "models" / "fashion-mnist"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, folder / "tokenizer.safetensors", metadata=GOOD.as_metadata())
    done = run_script(project / "fix_latents_stats.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(LatentStats.load(folder / "latents_stats.pt", CHANNELS).mean, GOOD.mean)
    assert done.stdout.splitlines()[0] == (
        f"Repair of {folder / 'latents_stats.pt'} (there is no kaggle_inference_config.yaml and no published file in "
        f"{project / 'models'}: the bundled model's)"
    )


def test_a_path_with_spaces_in_the_bundled_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a person pastes it: relative, quoted, through a link, or as the folder."""
    folder = tmp_path / "my project 图像" / "fashion-mnist"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, folder / "tokenizer.safetensors", metadata=GOOD.as_metadata())
    (tmp_path / "a link").symlink_to(folder)
    monkeypatch.setattr(weights, "BUNDLED", folder)
    monkeypatch.chdir(tmp_path)
    path = folder / "latents_stats.pt"
    for given in (path, path.relative_to(tmp_path), folder, Path("a link") / path.name):
        path.write_bytes(b"bad")
        assert repair(given) == 0
        torch.testing.assert_close(LatentStats.load(path, CHANNELS).std, GOOD.std)
    assert stats_repair.locate(path).reason == "named by --stats"


@pytest.mark.parametrize("option", [True, False])
def test_the_folder_of_the_weights_may_be_elsewhere(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: bool
) -> None:
    monkeypatch.setattr(fix_latents_stats.project, "CONFIG", tmp_path / "none.yaml")
    folder, other = tmp_path / "temp" / "models", tmp_path / "other"
    monkeypatch.setenv(weights.MODELS_VARIABLE, str(other if option else folder))
    folder.mkdir(parents=True)
    (folder / weights.VAVAE.name).touch()
    torch.save({"mean": torch.zeros(1, 32, 1, 1) + 1, "std": torch.ones(1, 32, 1, 1) * 2}, tmp_path / "good")
    hub.put(weights.STATS.repo, weights.STATS.name, (tmp_path / "good").read_bytes())
    assert fix_latents_stats.main(["--source", "hub", *(["--models-dir", str(folder)] if option else [])]) == 0
    assert (folder / weights.STATS.name).read_bytes() == (tmp_path / "good").read_bytes()


def test_statistics_beside_published_weights_are_the_published_ones(tmp_path: Path) -> None:
    """Weights in another folder, as a data set that is attached on Kaggle."""
    path = tmp_path / "latents_stats.pt"
    path.touch()
    assert stats_repair.locate(path).kind == "other"
    (tmp_path / weights.VAVAE.name).touch()
    assert stats_repair.locate(path) == stats_repair.Target(path, "published", 32, "named by --stats")


def posterior_stats(tokenizer: Path, images: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the latents, from the tokenizer's definition and torch's own formulas."""
    encoder, generator = VA_VAE(tokenizer), torch.Generator().manual_seed(0)
    latents = torch.cat([encoder.encode_images(part, generator=generator) for part in images.split(batch)])
    return latents.mean(dim=(0, 2, 3)), latents.transpose(0, 1).flatten(1).std(dim=1)


@pytest.mark.parametrize("at_most", [None, 5])
def test_statistics_from_fashion_mnist_through_the_bundled_tokenizer(
    at_most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small tokenizer with seeded weights: the repair equals mean and deviation of its latents."""
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.config import load_tokenizer_config
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    yaml = tmp_path / "tokenizer.yaml"
    yaml.write_text(
        "ckpt_path: tokenizer.safetensors\nmodel:\n  params:\n    embed_dim: 4\n    ddconfig:\n"
        "      {z_channels: 4, resolution: 32, ch: 32, ch_mult: [1, 1], num_res_blocks: 1,"
        " attn_resolutions: []}\n"
    )
    torch.manual_seed(0)
    model = AutoencoderKL(autoencoder_settings(load_tokenizer_config(yaml)))
    stats = LatentStats(torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1))
    save_weights(model.state_dict(), tmp_path / "tokenizer.safetensors", stats.as_metadata())
    monkeypatch.setattr(weights, "BUNDLED", tmp_path)
    images = torch.randint(0, 256, (12, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images.numpy())
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(12))
    monkeypatch.setattr(stats_repair, "ENCODED_PIXELS", 5 * 32 * 32)

    options = ["--max-images", str(at_most)] if at_most else []
    assert repair(tmp_path / "latents_stats.pt", "--images", str(tmp_path), *options) == 0
    chosen = images[[0, 2, 4, 7, 9]] if at_most else images  # 12 in 5 equal steps, rounded down
    mean, std = posterior_stats(yaml, pad_to_32(chosen), 5)
    made = LatentStats.load(tmp_path / "latents_stats.pt")
    torch.testing.assert_close(made.mean.flatten(), mean)
    torch.testing.assert_close(made.std.flatten(), std)
    said = capsys.readouterr().out
    assert f"encoding {'5 of 12 images, evenly spaced,' if at_most else '12 images'} by {yaml} on cpu" in said
    assert f"computed from {len(chosen)} images in {tmp_path}" in said
    assert f"WARNING: computed from {len(chosen)} latents only" in said


def write_pictures(folder: Path) -> list[Path]:
    """Seven images of several kinds and sizes, in subfolders and beside them, and two that are none."""
    generator = torch.Generator().manual_seed(1)
    names = ["a/1.png", "a/2.JPEG", "b/deep/3.bmp", "b/4.webp", "5.gif", "6.tif", "7.png"]
    modes = ["RGB", "RGB", "L", "RGBA", "P", "CMYK", "LA"]
    for index, (name, mode) in enumerate(zip(names, modes, strict=True)):
        pixels = torch.randint(0, 256, (20 + index, 33 - index, 3), generator=generator, dtype=torch.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).convert(mode).save(folder / name)
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n half of it")
    (folder / "page.jpg").write_text("<!doctype html>")
    (folder / "notes.txt").write_text("no image")
    return sorted(folder / name for name in names)


def cropped(files: list[Path]) -> torch.Tensor:
    """Images as the small tokenizer takes them: (N, 3, 16, 16) in [-1, 1]."""
    crops = [np.asarray(centre_crop(Image.open(file).convert("RGB"), 16)) for file in files]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("options", [[], ["--checkpoint"]])
def test_statistics_from_a_folder_of_images(
    options: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any kind Pillow reads, cut to the tokenizer's 16x16; what is no image is listed and counted."""
    folder, path, yaml = tmp_path / "images", tmp_path / "latents_stats.pt", tiny_folder / "tokenizer.yaml"
    files = write_pictures(folder)
    if options:
        other = (tiny_folder / "tokenizer.safetensors").rename(tiny_folder / "other.safetensors")
        options = ["--checkpoint", str(other)]
    assert repair(path, "--images", str(folder), "--tokenizer", str(yaml), *options) == 0
    if options:
        other.rename(tiny_folder / "tokenizer.safetensors")
    mean, std = posterior_stats(yaml, cropped(files), 7)
    made = LatentStats.load(path, 4)
    torch.testing.assert_close(made.mean.flatten(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.std.flatten(), std, atol=1e-5, rtol=1e-5)
    said = capsys.readouterr().out
    assert f"passed over 2 files that could not be read: {Path('a/broken.png')}, page.jpg\n" in said
    assert f"computed from 7 images in {folder}" in said
    assert "float64" in said


def test_the_tokenizer_of_the_images_is_the_one_that_the_configuration_names(tiny_folder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "images")
    target = stats_repair.locate(None, tiny_folder / "config.yaml")
    assert (target.kind, target.channels) == ("other", 4)
    request = stats_repair.Request(images=tmp_path / "images", config=tiny_folder / "config.yaml")
    assert stats_repair.from_images(target, request).latents == 7
    elsewhere = stats_repair.Target(tmp_path / "latents_stats.pt", "other", None, "")
    with pytest.raises(LightningDiTError, match=r"nothing tells which tokenizer .*; fix: add --tokenizer YAML"):
        stats_repair.from_images(elsewhere, request)


def test_a_configuration_of_another_name_says_which_file_is_meant(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the file, and the tokenizer that encodes for it; a name with nothing behind it is an error."""
    monkeypatch.chdir(tiny_folder)
    files = write_pictures(tmp_path / "images")
    path = tiny_folder / "latents_stats.pt"
    path.unlink()
    assert fix_latents_stats.main(["--config", "config.yaml", "--images", str(tmp_path / "images")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"Repair of {path} (config.yaml uses it)"
    mean, _ = posterior_stats(tiny_folder / "tokenizer.yaml", cropped(files), 7)
    torch.testing.assert_close(LatentStats.load(path, 4).mean.flatten(), mean, atol=1e-5, rtol=1e-5)
    with pytest.raises(LightningDiTError, match=rf"--config .*no.yaml is no file, .*; fix: {PYTHON} step3_.* no.yaml"):
        fix_latents_stats.main(["--config", "no.yaml"])


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("source", ["latents", "images"])
def test_a_failure_ends_the_moving_line(
    source: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard does not fit, or Ctrl-C comes at the second image: the line is wiped for what is said next."""
    terminal, calls = Terminal(), itertools.count()

    def encode_images(self: VA_VAE, images: torch.Tensor, **_: object) -> torch.Tensor:
        if next(calls):
            raise KeyboardInterrupt
        return torch.zeros(len(images), 4, 2, 2)

    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "MOVING_INTERVAL", 0.0)
    monkeypatch.setattr(stats_repair, "ENCODED_PIXELS", 1)
    monkeypatch.setattr(VA_VAE, "encode_images", encode_images)
    folder = tmp_path / source
    options = [f"--{source}", str(folder)]
    if source == "images":
        write_pictures(folder)
        options += ["--tokenizer", str(tiny_folder / "tokenizer.yaml")]
    else:
        for index, channels in enumerate((4, 5)):
            write_shard(shard_path(folder, 0, index), torch.randn(3, channels, 2, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises((LightningDiTError, KeyboardInterrupt)) as kept:  # it keeps the frames of the failure, too
        repair(tmp_path / "latents_stats.pt", *options)
    assert kept.value
    *_, shown, blank, end = terminal.getvalue().split("\r")
    assert shown.strip().startswith(("reading: ", "encoding: "))
    assert (blank, end) == (" " * len(shown), "")


def test_images_for_the_published_file_need_the_published_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, bytes]
) -> None:
    """Named by --checkpoint, by the configuration, in models/, or attached; else step 2 gets it."""
    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    target = stats_repair.Target(tmp_path / "models" / "latents_stats.pt", "published", 32, "")
    config, name = tmp_path / "config.yaml", weights.VAVAE.name
    wanted = {"models": tmp_path / "models" / name, "attached": tmp_path / "input" / "x" / name}
    wanted |= {"config": tmp_path / "named.pt", "checkpoint": tmp_path / "option.pt"}

    def request(checkpoint: Path | None = None) -> stats_repair.Request:
        return stats_repair.Request(attached=tmp_path / "input", config=config, checkpoint=checkpoint)

    with pytest.raises(
        LightningDiTError, match=f"{name}, which encodes .*; fix: {PYTHON} step2_download_models.py --only vavae"
    ):
        stats_repair._tokenizer_for(target, request())
    wanted["config"].write_bytes(published["vavae"])
    config.write_text(f"vae: {{model_name: own, ckpt_path: '{wanted['config']}'}}\n")  # a tokenizer of another name
    with pytest.raises(LightningDiTError, match=f"{name}, which encodes the images, is not in"):
        stats_repair._tokenizer_for(target, request())
    wanted["config"].unlink()
    config.write_text(f"vae: {{ckpt_path: '{wanted['config']}'}}\n")
    opened: list[Path] = []
    monkeypatch.setattr("LightningDiT.tokenizer.vavae.VA_VAE", lambda yaml, ckpt_path: opened.append(Path(ckpt_path)))
    for place in ("attached", "models", "config", "checkpoint"):  # each before those that were there already
        wanted[place].parent.mkdir(parents=True, exist_ok=True)
        wanted[place].write_bytes(published["vavae"])
        stats_repair._tokenizer_for(target, request(wanted[place] if place == "checkpoint" else None))
        assert opened[-1] == wanted[place]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no images in .*: it is not there"),
        (lambda folder: folder.mkdir(), "no images in .*: no file there is called like an image"),
        (lambda folder: folder.touch(), "is a file, a folder of images was expected"),
        (lambda folder: (folder.mkdir(), (folder / "x.png").touch()), "statistics of 0 latents"),
    ],
)
def test_folders_without_images_are_named(
    make: Callable[[Path], object], words: str, tiny_folder: Path, tmp_path: Path
) -> None:
    make(tmp_path / "images")
    path, yaml = tmp_path / "latents_stats.pt", tiny_folder / "tokenizer.yaml"
    with pytest.raises(LightningDiTError, match=words):
        repair(path, "--images", str(tmp_path / "images"), "--tokenizer", str(yaml))
    assert not path.exists()


def test_ctrl_c_while_images_are_encoded_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "images", tmp_path / "latents_stats.pt"
    folder.mkdir()
    for index in range(3000):
        Image.new("RGB", (400, 400), (index % 256, 0, 0)).save(folder / f"{index}.bmp") if index < 8 else (
            folder / f"{index}.bmp"
        ).symlink_to(folder / f"{index % 8}.bmp")
    path.write_bytes(b"mine")
    command = [sys.executable, PROJECT / "fix_latents_stats.py", "--stats", path, "--images", folder]
    command += ["--tokenizer", tiny_folder / "tokenizer.yaml"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as running:
        for line in running.stdout:
            if "encoding" in line:
                running.send_signal(signal.SIGINT)
                break
        rest = running.stdout.read()
    assert running.returncode == 130, rest
    assert "stopped;" in rest
    assert path.read_bytes() == b"mine"
    assert [item.name for item in tmp_path.glob("*latents*")] == ["latents_stats.pt"]


@pytest.fixture
def attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Attached data sets: a damaged file, one of other channels, a good one and one beside weights."""
    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    (tmp_path / "models").mkdir()
    folder = tmp_path / "input"
    for name in ("a-damaged", "b-other", "c-good/deep", "d-beside"):
        (folder / name).mkdir(parents=True)
    (folder / "a-damaged" / "latents_stats.pt").touch()
    torch.save(good_stats(16), folder / "b-other" / "latents_stats.pt")
    torch.save(good_stats(), folder / "c-good" / "deep" / "latents_stats.pt")
    torch.save(good_stats(), folder / "d-beside" / "latents_stats.pt")
    (folder / "d-beside" / weights.VAVAE.name).touch()
    return folder


def test_attached_statistics_are_found_checked_and_preferred_beside_weights(
    attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models" / "latents_stats.pt"
    good = attached / "d-beside" / "latents_stats.pt"
    alone = attached / "c-good" / "deep" / "latents_stats.pt"
    doubt = f"  WARNING: nothing beside {alone} shows which tokenizer it belongs to\n"
    for found in (good, alone):
        path.write_bytes(b"")
        assert repair(path, "--source", "attached", "--attached", str(attached)) == 0
        said = capsys.readouterr().out
        assert f"good ones from the attached {found}\n" in said
        assert (doubt in said) == ("WARNING" in said) == (found == alone)
        assert path.read_bytes() == found.read_bytes()
        found.write_bytes(b"")
    path.write_bytes(b"")
    with pytest.raises(
        LightningDiTError, match=r"no good latents_stats.pt below .*is empty.*\[1, 32, 1, 1\] is expected"
    ):
        repair(path, "--source", "attached", "--attached", str(attached))


def test_the_order_of_the_sources_and_why_each_is_passed_over(
    attached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hub, attached data sets, shards beside the file; one line for each that has nothing."""
    monkeypatch.setattr(stats_repair, "HURRIED", downloads.Patience(timeout=2, attempts=2, backoff=0.01))
    monkeypatch.setenv("HF_TOKEN", "")
    path = tmp_path / "models" / "latents_stats.pt"
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        torch.save(good_stats(), tmp_path / "published")
        hub.put(weights.STATS.repo, weights.STATS.name, (tmp_path / "published").read_bytes())
        assert repair(path, "--attached", str(attached)) == 0
        assert f"good ones from {weights.STATS.repo} on the hub" in capsys.readouterr().out
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    path.unlink()
    assert repair(path, "--attached", str(attached)) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  hub: passed over, .*127.0.0.1:9 cannot be reached", said, re.MULTILINE)
    assert "good ones from the attached" in said
    path.unlink()
    latents = torch.randn(30, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    write_shard(shard_path(path.parent, 0, 0), latents, torch.zeros(30, dtype=torch.long))
    assert repair(path) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  attached: passed over, no data sets are attached here$", said, re.MULTILINE)
    assert f"computed from 30 latents in {path.parent}" in said
    torch.testing.assert_close(LatentStats.load(path, 32).mean.flatten(), latents.mean(dim=(0, 2, 3)))


def test_a_hub_with_statistics_of_other_channels_is_passed_over(
    hub: Hub, attached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(good_stats(16), tmp_path / "other")
    hub.put(weights.STATS.repo, weights.STATS.name, (tmp_path / "other").read_bytes())
    path = tmp_path / "models" / "latents_stats.pt"
    assert repair(path, "--attached", str(attached)) == 0
    said = capsys.readouterr().out
    assert "  hub: passed over, the new statistics are not good either: mean has the shape [1, 16, 1, 1]" in said
    assert LatentStats.load(path, 32).std.shape == (1, 32, 1, 1)


def test_shards_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    for index, channels in enumerate((4, 5)):
        write_shard(shard_path(tmp_path, 0, index), torch.randn(3, channels, 2, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(LightningDiTError, match=r"shape \[3, 5, 2, 2\]; \[N, 4, h, w\] is expected"):
        repair(tmp_path / "latents_stats.pt", "--latents", str(tmp_path))


@pytest.mark.parametrize(
    ("mean", "std", "latents", "words"),
    [
        (0.5, 2.0, None, []),
        (0.5, 2.0, 1000, []),
        (0.5, 2.0, 999, ["computed from 999 latents only"]),
        (0.5, 0.009, None, ["standard deviations from 0.01 to 100 were expected"]),
        (0.5, 101.0, None, ["standard deviations from 0.01 to 100 were expected"]),
        (-101.0, 2.0, None, ["means within 100 of 0 were expected"]),
    ],
)
def test_numbers_that_are_hard_to_believe_are_doubted(
    mean: float, std: float, latents: int | None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = LatentStats(torch.full((1, 4, 1, 1), mean), torch.full((1, 4, 1, 1), std))
    doubts = stats_repair.doubts(stats, latents)
    assert [doubt[: len(word)] for doubt, word in zip(doubts, words, strict=True)] == words
    if latents is None:
        stats.save(tmp_path / "latents_stats.pt")
        assert repair(tmp_path / "latents_stats.pt") == 0
        assert capsys.readouterr().out.count("WARNING") == len(words)


def test_a_place_that_takes_no_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attached data set is read-only: the repaired file belongs into models/. Here a file stands in
    the folder's place, which stops root too.
    """
    (tmp_path / "input").touch()
    target = stats_repair.Target(tmp_path / "input" / "set" / "latents_stats.pt", "published", 32, "")
    own = weights.MODELS / "latents_stats.pt"
    with pytest.raises(LightningDiTError, match=f"fix: .*--stats {own}, then .*step3.* --stats {own}"):
        stats_repair.require_writable_target(target, weights.MODELS)


def test_another_part_of_a_model_is_not_taken_for_statistics(tmp_path: Path) -> None:
    path = tmp_path / weights.VAVAE.name
    path.write_bytes(b"a tokenizer of 800 MB")
    with pytest.raises(
        LightningDiTError, match=r"is another part of a model, latent statistics were expected; fix: name a"
    ):
        repair(path)
    assert path.read_bytes() == b"a tokenizer of 800 MB"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX file system")
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_keeps_its_name(kind: str, tmp_path: Path) -> None:
    """As root, who might rename /dev/null."""
    path = tmp_path / "latents_stats.pt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("makes a device")
    with pytest.raises(LightningDiTError, match=f"latents_stats.pt cannot be written .it is a {kind}"):
        fix_latents_stats.main(["--stats", str(path), "--identity", "--channels", "4"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert not path.is_file()
