"""The repair of latents_stats.pt: every kind of damage, every source, and nothing lost."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fix_latents_stats
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.tokenizer.latents import LatentStats, diagnose
from setup_steps import stats_repair, weights
from setup_steps.console import StepError
from tests.hub_server import Hub, running_hub
from tests.project_copy import copy_project, run_script

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
    "other bytes": (lambda path: path.write_bytes(b"second"), "no weights file"),
    "no mean": (lambda path: torch.save({"std": STD}, path), "tensors `mean` and `std` are expected"),
    "wrong shape": (save(MEAN[0], STD[0]), "has the shape [8, 1, 1]"),
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
    """The torch.cat() error of an empty list comes from the kinds "missing" and "empty"."""
    make, words = DAMAGE[kind]
    path = bundled / "latents_stats.pt"
    make(path)
    there = path.is_file()
    before = path.read_bytes() if there else b""

    assert repair(path, "--check") == 1
    (fault,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wrong: ")]
    assert words in fault
    assert (path.read_bytes() if path.is_file() else b"") == before

    assert repair(path) == 0
    loaded = LatentStats.load(path, CHANNELS)
    torch.testing.assert_close(loaded.mean, GOOD.mean)
    torch.testing.assert_close(loaded.std, GOOD.std)
    assert not Path("was-run").exists()
    kept = path.with_name("latents_stats.pt.bad-1")
    assert kept.exists() == (kind != "missing")
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


def test_a_bad_source_changes_nothing(bundled: Path) -> None:
    """The tokenizer's copy is damaged too: the file that was there stays where it was."""
    path = bundled / "latents_stats.pt"
    path.write_bytes(b"mine")
    save_file({"w": torch.zeros(1)}, bundled / "tokenizer.safetensors")
    with pytest.raises(Exception, match="carries no latent statistics"):
        repair(path)
    assert path.read_bytes() == b"mine"
    assert [item.name for item in bundled.glob("latents*")] == ["latents_stats.pt"]


def write_shards(folder: Path) -> torch.Tensor:
    """Two shards of latents far from zero, where float32 sums would lose the variance."""
    generator = torch.Generator().manual_seed(0)
    latents = 300 + torch.randn(50, 4, 2, 2, generator=generator)
    for index, part in enumerate(latents.split(30)):
        write_shard(shard_path(folder, 0, index), part, torch.zeros(len(part)), flipped=part * 0)
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
    with pytest.raises(StepError, match=r"not good either: .* \[1, 8, 1, 1\] is expected"):
        repair(path, "--latents", str(tmp_path))
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
    with pytest.raises(StepError, match=r"cannot be reached .*; mend: "):
        repair(path, "--source", "hub")
    assert [item.name for item in tmp_path.iterdir()] == ["latents_stats.pt"]


def test_nothing_is_invented_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latents_stats.pt"
    with pytest.raises(StepError, match=r"nothing tells which tokenizer .*; mend: .* --stats \S+ --latents FOLDER"):
        repair(path)
    with pytest.raises(StepError, match=r"is not known; mend: add --channels N"):
        repair(path, "--identity")
    assert not path.exists()
    assert repair(path, "--identity", "--channels", "4") == 0
    assert "WARNING: mean 0 and std 1 are INVENTED numbers for 4 channels" in capsys.readouterr().out
    assert diagnose(path, 4) == ["mean is 0 and std is 1 in every channel: placeholder numbers, which ruin every image"]


def test_dry_run_says_the_source_and_changes_nothing(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repair(bundled / "latents_stats.pt", "--dry-run") == 0
    assert "get good ones from: bundled" in capsys.readouterr().out
    assert not (bundled / "latents_stats.pt").exists()


@pytest.mark.parametrize(
    "options", [["--source", "latents"], ["--source", "images"], ["--channels", "0"], ["--source", "x"]]
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
    assert target == stats_repair.Target(tmp_path / found, "published", 32, "config.yaml uses it")


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
    project = copy_project(tmp_path / "my project", "LightningDiT")
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


def test_statistics_beside_published_weights_are_the_published_ones(tmp_path: Path) -> None:
    """Weights in another folder, as a data set that is attached on Kaggle."""
    path = tmp_path / "latents_stats.pt"
    path.touch()
    assert stats_repair.locate(path).kind == "other"
    (tmp_path / weights.VAVAE.name).touch()
    assert stats_repair.locate(path) == stats_repair.Target(path, "published", 32, "named by --stats")


def write_idx(path: Path, values: torch.Tensor) -> None:
    """A gzipped IDX file of bytes, as Fashion-MNIST comes."""
    header = bytes([0, 0, 8, values.dim()])
    header += b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


def test_statistics_from_images_through_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tokenizer with seeded weights: the repair equals mean and deviation of its latents."""
    from LightningDiT.checkpoint import save_weights
    from LightningDiT.config import load_tokenizer_config
    from LightningDiT.data.images import pad_to_32
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings

    (tmp_path / "tokenizer.yaml").write_text(
        "ckpt_path: tokenizer.safetensors\nmodel:\n  params:\n    embed_dim: 4\n    ddconfig:\n"
        "      {z_channels: 4, resolution: 32, ch: 32, ch_mult: [1, 1], num_res_blocks: 1,"
        " attn_resolutions: []}\n"
    )
    torch.manual_seed(0)
    model = AutoencoderKL(autoencoder_settings(load_tokenizer_config(tmp_path / "tokenizer.yaml")))
    save_weights(model.state_dict(), tmp_path / "tokenizer.safetensors")
    monkeypatch.setattr(weights, "BUNDLED", tmp_path)
    images = torch.randint(0, 256, (12, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.zeros(12, dtype=torch.uint8))
    monkeypatch.setattr(stats_repair, "ENCODE_BATCH", 5)

    repaired = stats_repair.from_images(tmp_path)
    tokenizer, generator = VA_VAE(tmp_path / "tokenizer.yaml"), torch.Generator().manual_seed(0)
    latents = torch.cat([tokenizer.encode_images(pad_to_32(part), generator=generator) for part in images.split(5)])
    assert "12 images" in repaired.origin
    torch.testing.assert_close(repaired.stats.mean.flatten(), latents.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(repaired.stats.std.flatten(), latents.transpose(0, 1).flatten(1).std(dim=1))
