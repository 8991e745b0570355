"""Latents of levels: what their shards and manifests say, one channel of 16 bits, and the same bytes on any way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import Config, DataConfig
from LightningDiT.console import run_main
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.data.shards import LatentShards, shard_path
from LightningDiT.extract_features import main
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.radar.level_images import load_windows, open_levels
from LightningDiT.radar.split import load_split
from LightningDiT.radar.written import levels_digest
from LightningDiT.tokenizer import vavae
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.training.parts import check_parts
from tests.conftest import seed_weights
from tests.test_extract_features import command, contents, interrupt_at
from tests.walkers import levels_of, prepared, render, scroll


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walkers")
    name = "Bag_line/ID_{person}/ID{person}_case2_1_Doppler{number}.jpg"
    render(root / "data", {"4": [3, 3]}, name=name)
    name = name.replace("Bag", "Normal").replace("case2", "case1")
    return prepared(root, {"1": [4, 3], "2": [4, 3, 3], "3": [4]}, name=name)


def levels(walkers: Path, *more: str | Path) -> tuple[str | Path, ...]:
    return ("--levels", walkers / "levels", "--split-file", walkers / "out" / "split.json", *more)


@pytest.fixture
def one_channel(tiny_folder: Path) -> Path:
    """The small pipeline's folder with a tokenizer of one channel."""
    text = (tiny_folder / "tokenizer.yaml").read_text()
    (tiny_folder / "tokenizer.yaml").write_text(text.replace("{z_channels", "{in_channels: 1, out_ch: 1, z_channels"))
    settings = autoencoder_settings(load_tokenizer_config(tiny_folder / "tokenizer.yaml"))
    save_weights(seed_weights(AutoencoderKL(settings)).state_dict(), tiny_folder / "tokenizer.safetensors")
    return tiny_folder


def test_shards_and_manifest_say_whose_each_latent_is(tiny_folder: Path, walkers: Path, tmp_path: Path) -> None:
    """Against the tokenizer called on each draw with its channel three times, and the statistics of these latents."""
    output = tmp_path / "latents"
    options = levels(walkers, "--draws", "3", "--output", output, "--shard-size", "25", "--posterior", "mode")
    assert main(command(tiny_folder, *options)) == 0
    images = open_levels(walkers / "levels", walkers / "out" / "split.json", "training", draws=3)
    batch, shards = images.batch(range(images.count)), LatentShards(output)
    assert len(shards) == images.count > 25
    found, _ = shards.batch(torch.arange(len(shards)))
    expected = VA_VAE(tiny_folder / "tokenizer.yaml").encode_images(batch.pixels.repeat(1, 3, 1, 1), sample=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(shards.labels, batch.labels)
    for name in ("conditions", "augmentation", "windows"):
        assert torch.equal(getattr(shards, name), getattr(batch, name)), name
    assert shards.conditions is not None
    assert set(shards.conditions.tolist()) == {0, 1}
    stats = LatentStats.load(output / "latents_stats.pt", 4)
    torch.testing.assert_close(stats.mean, expected.mean((0, 2, 3), keepdim=True), atol=1e-5, rtol=1e-5)
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert manifest["class_names"] == ["ID_1", "ID_2", "ID_3", "ID_4"]
    assert manifest["condition_names"] == ["Bag_line", "Normal_line"]
    assert (manifest["augmentation"], manifest["draws"]) == (list(NAMES), 3)
    digest = load_split(walkers / "out" / "split.json").digest
    assert manifest["split"] == {"digest": digest, "fold": 0, "part": "training"}


def test_validation_latents_have_no_statistics_to_be_mistaken(
    tiny_folder: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "valid"
    options = levels(walkers, "--part", "validation", "--fold", "1", "--output", output)
    for _ in range(2):  # the second run finds everything whole
        assert main(command(tiny_folder, *options)) == 0
        said = capsys.readouterr().out
        assert "normalises them by those of data.data_path" in said
        assert f"Next: set data.valid_path: {output} in" in said
    assert not (output / "latents_stats.pt").exists()
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert manifest["split"]["fold"] == 1
    assert not {"mean", "std"} & manifest.keys()
    split = load_split(walkers / "out" / "split.json")
    shards = LatentShards(output)
    assert shards.augmentation is None
    assert shards.windows is not None
    assert {split.rows[row].parts[1] for row in shards.windows.tolist()} == {"validation"}


def test_one_step_of_sixteen_bits_reaches_the_tokenizer(one_channel: Path, walkers: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(walkers, tmp_path / "copied"))
    manifest = json.loads((copied / "levels" / "manifest.json").read_text())
    rows = load_windows(*(copied / name for name in ("levels", "out/split.json")), "training").rows.tolist()
    split, latents = load_split(copied / "out" / "split.json"), []
    for step in range(2):
        name = split.rows[rows[0]].name
        file = copied / "levels" / "levels" / manifest["files"][name]
        grey = np.asarray(Image.open(file)).astype(np.uint16) + np.uint16(step)
        Image.fromarray(grey).save(file)
        manifest["digests"][name] = levels_digest(grey)
        (copied / "levels" / "manifest.json").write_text(json.dumps(manifest))
        output = tmp_path / str(step)
        assert main(command(one_channel, *levels(copied, "--output", output, "--posterior", "mode"))) == 0
        latents.append(LatentShards(output).batch(torch.arange(len(rows)))[0])
    assert 0 < float((latents[0][0] - latents[1][0]).abs().max()) < 1e-2
    assert torch.equal(latents[0][1:], latents[1][1:])


def test_an_interrupted_extraction_of_draws_ends_in_the_bytes_of_an_unbroken_one(
    tiny_folder: Path, walkers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vavae, "CHUNK_PIXELS", 2 * 16 * 16)
    options = levels(walkers, "--draws", "2", "--shard-size", "10", "--batch-size", "1")
    whole, broken = (command(tiny_folder, *options, "--output", tmp_path / name) for name in ("whole", "broken"))
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run_main(lambda: main(broken)) == 130
    assert main(broken) == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    torn, other = (shard_path(tmp_path / "broken", 0, number) for number in range(2))
    torn.write_bytes(torn.read_bytes()[:-8])
    with safe_open(other, framework="pt") as opened:
        rows, record = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    save_weights({**rows, "windows": rows["windows"] + 1}, other, record)  # whole, but with other rows of the split
    assert main(broken) == 0
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_other_draws_are_other_latents(
    tiny_folder: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = command(tiny_folder, *levels(walkers, "--draws", "2", "--output", tmp_path / "latents"))
    assert main([*own, "--augment", "gain=3"]) == 0
    assert "2 draws of each window: gain up to 3 dB;" in capsys.readouterr().out
    assert run_main(lambda: main(own)) == 1
    said = capsys.readouterr().err
    assert "holds latents of other settings" in said
    assert "augmentation.gain: 3.0 there, 6.0 now" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "x", "--fold", "1"], "--fold goes with --levels"),
        (["--images", "x", "--draws", "2", "--augment", "gain"], "--draws, --augment goes with --levels"),
        (["--levels", "x"], "--levels needs --split-file"),
        (["--levels", "x", "--split-file", "s", "--flip"], "--flip does not go with --levels"),
        (["--levels", "x", "--split-file", "s", "--fit", "pad"], "--fit does not go with --levels"),
        (["--levels", "x", "--split-file", "s", "--part", "test"], "invalid choice"),
        (["--levels", "x", "--split-file", "s", "--part", "validation", "--draws", "2"], "goes with training windows"),
        (["--levels", "x", "--split-file", "s", "--augment", "gain"], "--augment has no effect without --draws"),
        (["--levels", "x", "--split-file", "s", "--zero-doppler", "3"], "--zero-doppler has no effect"),
        (["--levels", "x", "--split-file", "s", "--workers", "1"], "--workers does not go with --levels"),
        (["--levels", "x", "--split-file", "s", "--data-root", "r"], "not with --images, --list or --levels"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], said: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(tiny_folder, *options, "--output", "o"))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_refuses_windows_of_another_size(
    tiny_folder: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tiny_folder / "config.yaml").read_text()
    own = command(tiny_folder, *levels(walkers, "--output", tmp_path / "latents", "--dry-run"))
    assert main(own) == 0
    assert "classes: 0 ID_1" in capsys.readouterr().out
    (tiny_folder / "config.yaml").write_text(text.replace("image_size: 16", "image_size: 32"))
    assert run_main(lambda: main(own)) == 1
    assert "16x16 pixels, 32x32 are asked for" in capsys.readouterr().err


def test_two_hundred_people_some_of_them_odd_are_a_line_each(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One window of most people, of one nothing but NaN, of one no finite value, and two with equal windows."""
    people = [*range(1, 201), *[200] * 8]
    windows = np.stack([scroll(at, 24, 32) * 50 - 60 for at in range(len(people))]).astype(np.float32)
    windows[6], windows[8], windows[12] = np.nan, -np.inf, windows[9]
    windows[20, 0, 0] = np.inf
    numbers = [0] * 200 + [1, 2, 30, 31, 32, 60, 61, 62]
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "x.npz", dB=windows, person=[f"ID_{one}" for one in people], number=numbers)
    capsys.readouterr()
    levels_of(tmp_path, "16")
    said = capsys.readouterr().out
    for line in (
        "people without a window that can be used (5): ID_7, ID_9, ID_10 and 2 more",
        "x.npz[6] has 768 values that are NaN or infinite",
        "x.npz[8] has no finite value",
        "x.npz[20] has 1 values that are NaN or infinite",
        "2 windows are left out, since several people have the same pixels: ID_10 1, ID_13 1",
        "people with one pass train only and are in no verdict (194): ID_1, ID_2, ID_3 and 191 more",
    ):
        assert said.count(line) == 1, line
    for part in ("training", "validation"):
        assert main(command(tiny_folder, *levels(tmp_path, "--part", part, "--output", tmp_path / part))) == 0
    said = capsys.readouterr().out
    assert "of 195 classes" in said
    assert "people without validation windows in fold 0: ID_1, ID_2, ID_3, ID_4, ID_5 and 189 more" in said
    [*_, note] = open_levels(tmp_path / "levels", tmp_path / "out" / "split.json", "training", 1).notes
    assert note == f"the dB range of {tmp_path / 'levels'} is that of the training windows of fold 0"
    shards = LatentShards(tmp_path / "training")
    assert (len(shards), len(shards.labels.unique())) == (197, 195)
    where = {"data_path": tmp_path / "training", "valid_path": tmp_path / "validation"}
    data = DataConfig(**{key: str(path) for key, path in where.items()}, split_file=str(tmp_path / "out/split.json"))
    assert check_parts(Config(data=data)) == []
