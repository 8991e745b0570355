"""Feature extraction: sources, labels, statistics, and the same bytes whatever happens on the way."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from LightningDiT.checkpoint import load_training_state, load_weights
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.data.image_sets import open_folder
from LightningDiT.data.labels import LATENTS_MANIFEST, Labels
from LightningDiT.data.reading import ReadingProcesses
from LightningDiT.data.shards import LatentShards, iterate_shards, shard_files, shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.extract_features import main, next_step, parse
from LightningDiT.files import LOCK, UNFINISHED
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer import vavae
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, DiagonalGaussian
from LightningDiT.tokenizer.latent_space import KEY, encoder_values
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.training import extraction
from tests.conftest import PROJECT
from tests.test_image_sets import CLASSES, save_images

KILLS = 14
#: Extracts into the first folder, then forks an extraction into the second one for every line on its input. Groups of
#: two images, and what a shard has is kept after every batch, so that a kill can come between any two steps.
NURSERY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from LightningDiT import extract_features
from LightningDiT.training import extraction
from LightningDiT.console import run_main
from LightningDiT.tokenizer import vavae
vavae.CHUNK_PIXELS = 2 * 16 * 16
extraction.PART_SECONDS = 0.0
whole, broken = ([*sys.argv[4:], "--output", folder] for folder in sys.argv[2:4])
sys.stdout, answers = open(os.devnull, "w"), sys.stdout
assert extract_features.main(whole) == 0
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(run_main(lambda: extract_features.main(broken)))
    print(child, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def command(folder: Path, *more: str | Path) -> list[str]:
    return ["--config", str(folder / "config.yaml"), *map(str, more)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images of three classes: four cats, four dogs, three sea lions."""
    return save_images(tmp_path / "images", 11)


def cropped(path: Path) -> torch.Tensor:
    """The middle 16x16 pixels of a photograph of `save_images` in [-1, 1], without the library."""
    pixels = np.asarray(Image.open(path))[:, 2:18].astype(np.float64)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()


def test_the_modes_and_their_statistics_are_written(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """Latents against the tokenizer called on each image, statistics against NumPy in float64 over all latents."""
    output = tmp_path / "latents"
    options = ("--images", images, "--output", output, "--shard-size", "4", "--posterior", "mode")
    assert main(command(tiny_folder, *options)) == 0
    assert [path.name for path in shard_files(output)] == [f"latents_rank00_shard{n:03d}.safetensors" for n in range(3)]
    assert [len(shard["labels"]) for shard in iterate_shards(output)] == [4, 4, 3]
    shards = LatentShards(output)
    assert shards.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert not shards.has_flips
    latents, _ = shards.batch(torch.arange(11))
    tokenizer = VA_VAE(tiny_folder / "tokenizer.yaml")
    for place, path in enumerate(sorted(images.rglob("*.png"))):
        expected = tokenizer.encode_images(cropped(path), sample=False)
        torch.testing.assert_close(latents[place : place + 1], expected, atol=1e-5, rtol=1e-5)
    values = latents.numpy().astype(np.float64)
    stats = load_training_state(output / "latents_stats.pt")
    assert stats["count"] == 11
    np.testing.assert_allclose(stats["mean"].flatten(), values.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(stats["std"].flatten(), values.std((0, 2, 3), ddof=1), rtol=1e-6)
    torch.testing.assert_close(LatentStats.load(output / "latents_stats.pt", 4).mean, stats["mean"])


def test_the_manifest_says_what_the_latents_are(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "latents"
    assert main(command(tiny_folder, "--images", images, "--output", output, "--shard-size", "8")) == 0
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert manifest["class_names"] == list(CLASSES)
    assert manifest[KEY] == encoder_values(load_weights(tiny_folder / "tokenizer.safetensors"))
    assert manifest["precision"] == "fp32"
    assert (manifest["classes"], manifest["latents"], manifest["values_per_channel"]) == (3, 11, 11 * 64)
    assert [(shard["images"], shard["latents"]) for shard in manifest["shards"]] == [(8, 8), (3, 3)]
    settings = manifest["settings"]
    assert (settings["flips"], settings["posterior"], settings["image_size"]) == (False, "sample, seed 0", 16)
    latents, _ = LatentShards(output).batch(torch.arange(11))
    sums = np.sum([shard["total"] for shard in manifest["shards"]], axis=0)
    np.testing.assert_allclose(sums, latents.double().sum((0, 2, 3)), rtol=1e-12)


def test_the_precision_of_the_encoder_is_part_of_what_the_latents_are(
    tiny_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TF32 is a setting of its own; a CPU has none and says so. Manifests of exact latents are as they ever were."""
    output = tmp_path / "latents"
    assert main(command(tiny_folder, "--images", images, "--output", output, "--precision", "tf32")) == 0
    assert "note: precision tf32 computes as fp32 here" in capsys.readouterr().out
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert manifest["precision"] == "fp32"
    found, tokenizer = open_folder(images), VA_VAE(tiny_folder / "tokenizer.yaml", 16)
    described = [
        extraction.settings_of(found, tokenizer, tiny_folder / "tokenizer.safetensors", settings)
        for settings in (extraction.ExtractionSettings(16), extraction.ExtractionSettings(16, tf32=True))
    ]
    assert described[0] == manifest["settings"]
    assert described[1] == manifest["settings"] | {"precision": "tf32"}


def test_the_noise_of_an_image_comes_from_seed_number_and_side(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """mean + std * noise, from the tokenizer's own posterior of each image and mirrored image."""
    output = tmp_path / "latents"
    assert main(command(tiny_folder, "--images", images, "--output", output, "--flip", "--seed", "7")) == 0
    shards, tokenizer = LatentShards(output), VA_VAE(tiny_folder / "tokenizer.yaml")
    assert shards.has_flips
    for index, path in list(enumerate(sorted(images.rglob("*.png"))))[::4]:
        for side, mirrored in enumerate((False, True)):
            picture = cropped(path).flip(-1) if mirrored else cropped(path)
            posterior = tokenizer.posterior(picture)
            noise = torch.randn(posterior.mean.shape, generator=generator_for(7, index, side))
            expected = posterior.mean + (posterior.logvar / 2).exp() * noise
            latents, _ = shards.batch(torch.tensor([index]), torch.tensor([mirrored]))
            torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def test_any_image_type_is_read_and_what_is_none_is_listed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same picture in every type without loss has the same latent; files that are no images leave no gap."""
    place, output = tmp_path / "images" / "grey", tmp_path / "latents"
    place.mkdir(parents=True)
    grey = np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)
    picture = Image.fromarray(grey)
    for name in ("a.png", "b.gif", "c.bmp", "d.TIFF", "e.ppm"):
        picture.save(place / name)
    picture.save(place / "f.webp", lossless=True)
    Image.fromarray(grey.astype(np.uint16) * 257).save(place / "g16.png")
    picture.convert("P").save(place / "h_palette.png")
    picture.convert("RGBA").save(place / "i_alpha.png")
    picture.save(place / "j_animated.gif", save_all=True, append_images=[Image.new("L", (16, 16))])
    picture.convert("RGB").save(place / "k.jpg", quality=95)
    (place / "b_broken.png").write_bytes(b"no image")
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    (place / "d_torn.png").write_bytes(whole.getvalue()[:-40])
    Image.fromarray(grey.astype(np.float32)).save(place / "l_fractions.tif")
    (place / "m_empty.jpg").touch()
    (place / "notes.txt").write_text("not called like an image")
    options = ("--images", place.parent, "--output", output, "--shard-size", "6", "--posterior", "mode")
    assert main(command(tiny_folder, *options)) == 0
    latents, _ = LatentShards(output).batch(torch.arange(11))
    for number in range(1, 10):
        torch.testing.assert_close(latents[number], latents[0], atol=1e-5, rtol=1e-5)
    assert not torch.equal(latents[10], latents[0])  # JPEG loses a little
    broken = ["b_broken.png", "d_torn.png", "l_fractions.tif", "m_empty.jpg"]
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert [name for name, _ in manifest["unreadable"]] == [str(place / name) for name in broken]
    assert [(shard["images"], shard["latents"]) for shard in manifest["shards"]] == [(6, 4), (6, 6), (3, 1)]
    said = capsys.readouterr().out
    assert "passed over 4 of 15 images" in said
    assert f"{place / 'l_fractions.tif'}: its pixels are fractions" in said
    assert "11 latents in 3 shards" in said


def test_a_set_of_broken_files_alone_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "images" / "cats" / "a.png").write_bytes(b"no image")
    options = ("--images", tmp_path / "images", "--output", tmp_path / "latents")
    with pytest.raises(LightningDiTError, match="none of the 1 images of .* can be read"):
        main(command(tiny_folder, *options))
    assert not (tmp_path / "latents" / "latents_stats.pt").exists()


@pytest.mark.parametrize("size", ["1", "4", "11"])
def test_images_meet_the_encoder_in_groups_of_one_size(
    size: str, tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch size: a GPU takes more of them at once, and then the last bits depend on their number."""
    groups, encode = list[int](), AutoencoderKL.encode

    def counted(self: AutoencoderKL, pictures: torch.Tensor) -> DiagonalGaussian:
        groups.append(len(pictures))
        return encode(self, pictures)

    monkeypatch.setattr(VA_VAE, "images_at_once", lambda self, pixels: 3)
    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    options = ("--images", images, "--output", tmp_path / "latents", "--shard-size", "11", "--batch-size", size)
    assert main(command(tiny_folder, *options)) == 0
    assert groups == [3, 3, 3, 2]


def test_latents_do_not_depend_on_the_batch_size(
    tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vavae, "CHUNK_PIXELS", 2 * 16 * 16)
    (images / "cats" / "003.png").write_bytes(b"no image")  # it must not move the others into other groups
    folders = [tmp_path / name for name in ("small", "large")]
    for folder, size in zip(folders, ("1", "5"), strict=True):
        options = ("--images", images, "--output", folder, "--shard-size", "7", "--batch-size", size)
        assert main(command(tiny_folder, *options)) == 0
    assert contents(folders[0]) == contents(folders[1])


def test_the_bytes_do_not_depend_on_who_reads(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    (images / "cats" / "003.png").write_bytes(b"no image")
    written = []
    for option in (("--workers", "0"), ("--read-threads", "1"), ("--workers", "1"), ("--workers", "3")):
        folder = tmp_path / "".join(option)
        options = ("--images", images, "--output", folder, "--shard-size", "4", "--batch-size", "3", "--flip", *option)
        assert main(command(tiny_folder, *options)) == 0
        written.append(contents(folder))
    assert all(files == written[0] for files in written)


def test_a_reader_that_is_killed_ends_the_extraction_with_one_line(
    tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = command(tiny_folder, "--images", images, "--output", tmp_path / "latents", "--workers", "1")
    real = ReadingProcesses.read

    def killed(self: ReadingProcesses, file: Path, size: int, fit: str) -> Any:
        if self._started and file.name == "005.png":
            self._started[0].kill()
        return real(self, file, size, fit)

    with monkeypatch.context() as patch:
        patch.setattr(ReadingProcesses, "read", killed)
        assert run_main(lambda: main(own)) == 1
    said = capsys.readouterr().err
    assert re.search(r"^error: the process that read .*005.png has ended \(exit code .*\); fix: run the same", said)
    assert said.count("\n") == 1
    assert main(own) == 0
    assert len(LatentShards(tmp_path / "latents")) == 11


@pytest.mark.parametrize(
    ("cores", "local", "device", "workers"),
    [
        (16, 1, "cuda", 15),
        (16, 2, "cuda", 7),
        (64, 1, "cuda", 16),
        (2, 1, "cuda", 0),
        (4, 2, "cuda", 0),
        (16, 1, "cpu", 0),
    ],
)
def test_the_number_of_readers_follows_from_the_cores(
    cores: int, local: int, device: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert extraction.default_workers(torch.device(device), 8) == workers


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:  # at its end, and reaped
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_random_moments_and_in_the_end_the_bytes_of_an_unbroken_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Some runs are killed at a random moment after their start, the others at one after a new file."""
    images = save_images(tmp_path / "images", 40)
    (images / "cats" / "021.png").write_bytes(b"no image")
    folders = [tmp_path / "whole", tmp_path / "broken"]
    options = command(tiny_folder, "--images", images, "--shard-size", "6", "--batch-size", "1", "--flip")
    arguments = [sys.executable, "-c", NURSERY, str(PROJECT), *map(str, folders), *options]
    draw, environment = random.Random(2), {**os.environ, "OMP_NUM_THREADS": "1"}
    seen = set[str]()
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as nursery:
        assert nursery.stdin
        assert nursery.stdout
        whole, broken = folders
        for kill in range(KILLS):
            before = set(broken.iterdir()) if broken.exists() else set()
            print(kill, file=nursery.stdin, flush=True)
            child, deadline = int(nursery.stdout.readline()), time.monotonic() + 60
            while kill % 2 and is_running(child) and time.monotonic() < deadline:
                if broken.exists() and set(broken.iterdir()) - before:
                    break
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.04))
            with suppress(ProcessLookupError):  # it may have come to its end
                os.kill(child, signal.SIGKILL)
            assert int(nursery.stdout.readline()) in (-signal.SIGKILL, 0)
            for path in broken.glob("*.safetensors") if broken.exists() else ():
                assert path.read_bytes() == (whole / path.name).read_bytes(), path
            seen |= {path.suffix for path in broken.iterdir()} if broken.exists() else set()
        print("to the end", file=nursery.stdin, flush=True)
        nursery.stdout.readline()
        assert nursery.stdout.readline() == "0\n"
        nursery.stdin.close()
    assert ".part" in seen  # a shard that was under way was kept
    assert contents(broken) == contents(whole)
    assert len(LatentShards(whole)) == 39


@pytest.mark.skipif(
    torch.__version__.startswith("2.2.") and sys.version_info >= (3, 12),
    reason="torchrun of torch 2.2 crashes on Python 3.12 before it starts anything",
)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_write_the_files_of_one(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """Three shards for two processes, one broken file among them."""
    (images / "dogs" / "004.png").write_bytes(b"no image")
    options = ("--images", images, "--shard-size", "4", "--flip")
    assert main(command(tiny_folder, *options, "--output", tmp_path / "one")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = command(tiny_folder, *options, "--output", tmp_path / "two")
    done = subprocess.run(
        [*launcher, "-m", "LightningDiT.extract_features", *own],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 latents in 3 shards") == 1
    assert done.stdout.count("passed over 1 of 11 images") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Send this process Ctrl-C while it encodes its `batch`-th batch, counted from 1."""
    plain, calls = VA_VAE.posterior, []

    def posterior(*inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            signal.raise_signal(signal.SIGINT)
        return plain(*inputs)

    monkeypatch.setattr(VA_VAE, "posterior", posterior)


def test_ctrl_c_ends_after_the_batch_and_a_rerun_goes_on_from_it(
    tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Groups of two: shards of 8 and 3 take 4 and 2 batches; the run ends in the second one of the first shard."""
    monkeypatch.setattr(vavae, "CHUNK_PIXELS", 2 * 16 * 16)
    options = ("--images", images, "--shard-size", "8", "--batch-size", "1")
    whole, broken = (command(tiny_folder, *options, "--output", tmp_path / name) for name in ("whole", "broken"))
    assert main(whole) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert run_main(lambda: main(broken)) == 130
    assert "the same command goes on from there" in capfd.readouterr().err
    assert sorted(contents(tmp_path / "broken")) == ["latents_rank00_shard000.part", LATENTS_MANIFEST]
    assert main(broken) == 0
    assert "encoded 7 images in" in capfd.readouterr().out  # 11 but for the first two batches
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert main(broken) == 0
    assert "11 latents in 2 shards" in capfd.readouterr().out
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_damaged_and_torn_files_are_made_again_and_others_kept(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    own = command(tiny_folder, "--images", images, "--shard-size", "4", "--output", tmp_path / "latents")
    assert main(own) == 0
    whole = contents(tmp_path / "latents")
    first = shard_path(tmp_path / "latents", 0, 0)
    first.write_bytes(first.read_bytes()[:-8])
    first.with_suffix(".part").write_bytes(b"half")
    for torn in (".latents_rank00_shard001.safetensors", ".manifest.json", ".latents_stats.pt"):
        (tmp_path / "latents" / f"{torn}.x1y2z3w4{UNFINISHED}").write_bytes(b"half")
    (tmp_path / "latents" / ".tmpa1B2c3").write_bytes((64).to_bytes(8, "little") + b'{"latents":')  # of safetensors
    (tmp_path / "latents" / ".notes.tmp").write_text("mine")
    assert main(own) == 0
    assert contents(tmp_path / "latents") == {**whole, ".notes.tmp": b"mine"}


def swap_rows(path: Path) -> None:
    """Exchange two latents of a shard: whole, of the same size, with the same sums."""
    tensors = dict(next(iter(iterate_shards(path.parent))))
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors["latents"] = tensors["latents"].flip(0)
    write_shard(path, tensors["latents"], tensors["labels"], tensors.get("latents_flip"), metadata)


def flip_bit(path: Path, back: int = 5) -> None:
    content = bytearray(path.read_bytes())
    content[-back] ^= 1
    path.write_bytes(content)


def change_record(path: Path) -> None:
    content = path.read_bytes()
    changed = content.replace(b'\\"largest_label\\": 0', b'\\"largest_label\\": 2', 1)
    assert changed != content
    path.write_bytes(changed)


def replace_by_another(path: Path) -> None:
    shutil.copy(shard_path(path.parent, 0, 1), path)


@pytest.mark.parametrize("change", [swap_rows, flip_bit, change_record, replace_by_another])
def test_a_shard_whose_bytes_changed_is_made_again(
    change: Callable[[Path], None], tiny_folder: Path, images: Path, tmp_path: Path
) -> None:
    """It is whole and of the right size, so its header alone tells nothing."""
    own = command(tiny_folder, "--images", images, "--shard-size", "4", "--flip", "--output", tmp_path / "latents")
    assert main(own) == 0
    whole = contents(tmp_path / "latents")
    first = shard_path(tmp_path / "latents", 0, 0)
    change(first)
    assert first.read_bytes() != whole[first.name]
    assert main(own) == 0
    assert contents(tmp_path / "latents") == whole


def test_a_shard_that_is_made_again_may_have_another_digest(
    tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: the shards of an interrupted repair are kept."""
    for seed in ("0", "1"):
        options = ("--images", images, "--shard-size", "4", "--seed", seed, "--output", tmp_path / seed)
        assert main(command(tiny_folder, *options)) == 0
    own = command(tiny_folder, "--images", images, "--shard-size", "4", "--output", tmp_path / "0")
    first, other = (shard_path(tmp_path / seed, 0, 0) for seed in ("0", "1"))
    flip_bit(first)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert run_main(lambda: main(own)) == 130
    rows = json.loads((tmp_path / "0" / LATENTS_MANIFEST).read_text())["shards"]
    assert ["digest" in row for row in rows] == [False, True, True]
    shutil.copy(other, first)
    assert main(own) == 0
    assert first.read_bytes() == other.read_bytes()
    assert len(LatentShards(tmp_path / "0")) == 11


def test_a_shard_of_another_extraction_is_not_trained_on(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """Of the same images and sizes, by another seed: the digest in its header is not that of the manifest."""
    for seed in ("0", "1"):
        options = ("--images", images, "--shard-size", "4", "--seed", seed, "--output", tmp_path / seed)
        assert main(command(tiny_folder, *options)) == 0
    first, other = (shard_path(tmp_path / seed, 0, 0) for seed in ("0", "1"))
    shutil.copy(other, first)
    with pytest.raises(
        LightningDiTError, match=r"000.safetensors is not the one that manifest.json .* fix: run the ex"
    ):
        LatentShards(tmp_path / "0")


def test_shards_without_digests_are_kept(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """As earlier releases wrote them."""
    own = command(tiny_folder, "--images", images, "--shard-size", "4", "--output", tmp_path / "latents")
    assert main(own) == 0
    first = shard_path(tmp_path / "latents", 0, 0)
    with safe_open(first, framework="pt") as opened:
        record = json.loads(opened.metadata()[extraction.RECORD])
        latents, labels = opened.get_tensor("latents"), opened.get_tensor("labels")
    assert len(record.pop("digest")) == 64
    write_shard(first, latents, labels, metadata={extraction.RECORD: json.dumps(record)})
    manifest = json.loads((tmp_path / "latents" / LATENTS_MANIFEST).read_text())
    manifest["shards"] = [
        {name: value for name, value in row.items() if name != "digest"} for row in manifest["shards"]
    ]
    (tmp_path / "latents" / LATENTS_MANIFEST).write_text(json.dumps(manifest))
    kept = first.read_bytes()
    assert main(own) == 0
    assert first.read_bytes() == kept
    rows = json.loads((tmp_path / "latents" / LATENTS_MANIFEST).read_text())["shards"]
    assert ["digest" in row for row in rows] == [False, True, True]
    assert len(LatentShards(tmp_path / "latents")) == 11


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--flip",), "flips: false there, true now"),
        (("--seed", "3"), "posterior: sample, seed 0 there, sample, seed 3 now"),
        (("--posterior", "mode"), "posterior: sample, seed 0 there, mode now"),
        (("--shard-size", "5"), "shard_size: 4 there, 5 now"),
    ],
)
def test_other_settings_are_refused(
    changed: tuple[str, ...], message: str, tiny_folder: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--images", images, "--output", tmp_path / "latents", "--shard-size", "4")
    assert main(command(tiny_folder, *options)) == 0
    before = contents(tmp_path / "latents")
    with pytest.raises(LightningDiTError, match=f"holds latents of other settings .{message}."):
        main(command(tiny_folder, *options, *changed))
    assert contents(tmp_path / "latents") == before


def test_other_images_or_another_tokenizer_are_refused(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    own = command(tiny_folder, "--images", images, "--output", tmp_path / "latents")
    assert main(own) == 0
    moved = images.rename(tmp_path / "moved")
    assert main(command(tiny_folder, "--images", moved, "--output", tmp_path / "latents")) == 0  # the same ones
    moved.rename(images)
    extra = images / "dogs" / "new.png"
    Image.new("RGB", (16, 16)).save(extra)
    with pytest.raises(LightningDiTError, match=r"images: 11 there, 12 now; image_list: .* there"):
        main(own)
    extra.unlink()
    weights = tiny_folder / "tokenizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(LightningDiTError, match=r"tokenizer.weights: \w+ there, \w+ now"):
        main(own)


def test_shards_of_another_origin_are_never_mixed_with_new_ones(
    tiny_folder: Path, images: Path, tmp_path: Path
) -> None:
    write_shard(shard_path(tmp_path, 0, 0), torch.ones(2, 1, 1, 1), torch.tensor([0, 1]))
    own = command(tiny_folder, "--images", images, "--output", tmp_path)
    with pytest.raises(LightningDiTError, match=r"holds latents_rank00_shard000.safetensors already"):
        main(own)
    assert len(LatentShards(tmp_path)) == 2
    shard_path(tmp_path, 0, 0).unlink()
    (tmp_path / LATENTS_MANIFEST).write_text('{"seed": 0}')
    with pytest.raises(LightningDiTError, match="is no manifest of latents"):
        main(own)


def test_statistics_of_another_origin_are_not_overwritten(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """Such as the published ones, which nothing here could make again."""
    place = tmp_path / "published"
    place.mkdir()
    (tiny_folder / "latents_stats.pt").rename(place / "latents_stats.pt")
    before = contents(place)
    with pytest.raises(LightningDiTError, match=r"holds latents_stats.pt already, .*; fix: choose another --output"):
        main(command(tiny_folder, "--images", images, "--output", place))
    assert contents(place) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("downsample_ratio: 2", "downsample_ratio: 4", r"downsample_ratio is 4, and 2 in the tokenizer"),
        ("image_size: 16", "image_size: 15", r"image_size 15 is no multiple of vae.downsample_ratio 2"),
    ],
)
def test_sizes_that_do_not_fit_the_tokenizer_are_refused(
    old: str, new: str, message: str, tiny_folder: Path, images: Path, tmp_path: Path
) -> None:
    config = tiny_folder / "config.yaml"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(LightningDiTError, match=message):
        main(command(tiny_folder, "--images", images, "--output", tmp_path / "latents"))
    assert not (tmp_path / "latents").exists()


def test_a_disk_that_is_too_small_is_said_before_the_start(
    tiny_folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 latents of 4x8x8 float32 in two copies and a label take 11 * (2 * 1024 + 8) = 22,616 bytes."""
    usage = shutil.disk_usage(tmp_path)
    own = command(tiny_folder, "--images", images, "--output", tmp_path / "latents", "--flip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=22_615))
    with pytest.raises(LightningDiTError, match="the latents may take 22.6 kB, and .* has 22.6 kB free"):
        main(own)
    assert not shard_files(tmp_path / "latents")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=22_616))
    assert main(own) == 0


def test_listed_files_that_are_missing_are_passed_over(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    (images / "list.txt").write_text("cats/000.png 1\nnot there.png 0\ndogs/001.png 0\n")
    assert main(command(tiny_folder, "--list", images / "list.txt", "--output", tmp_path / "latents")) == 0
    assert LatentShards(tmp_path / "latents").labels.tolist() == [1, 0]
    manifest = json.loads((tmp_path / "latents" / LATENTS_MANIFEST).read_text())
    assert [name for name, _ in manifest["unreadable"]] == [str(images / "not there.png")]
    assert (manifest["classes"], manifest["class_names"]) == (2, None)


def test_the_pipeline_shows_the_class_names_of_the_manifest(tiny_folder: Path, images: Path) -> None:
    """Fifteen lines of YAML without names, with the latents' folder as data_path."""
    assert main(command(tiny_folder, "--images", images, "--output", tiny_folder / "latents")) == 0
    file = tiny_folder / "config.yaml"
    named = file.read_text()
    unnamed = named.replace(', class_names: ["cat, house cat", dog, "sea lion"]', "").replace(
        "data_path: .", "data_path: latents"
    )
    file.write_text(unnamed)
    pipe = LightningDiTPipeline.from_config(file, device="cpu")
    assert [pipe.labels.caption(label) for label in range(3)] == list(CLASSES)
    assert pipe.labels.number("Sea Lions") == 2
    file.write_text(named.replace("data_path: .", "data_path: latents"))
    with pytest.raises(LightningDiTError, match="class 0 is 'cat, house cat' in data.class_names .* and 'cats' in the"):
        Labels.of(load_config(file))
    own = named.replace('["cat, house cat", dog, "sea lion"]', '["pets, cats", dogs, "sea lions"]')
    file.write_text(own.replace("data_path: .", "data_path: latents"))
    labels = Labels.of(load_config(file))
    assert labels.names == ("pets, cats", "dogs", "sea lions")  # the YAML's own are shown
    assert labels.identity == CLASSES
    file.write_text(unnamed.replace("num_classes: 3", "num_classes: 4"))
    assert Labels.of(load_config(file)).names == (*CLASSES, "class 3")
    file.write_text(unnamed)
    manifest = tiny_folder / "latents" / LATENTS_MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "class_names": ["n02084071", "n01440764", "n99999999"]}))
    assert Labels.of(load_config(file)).names == (
        "dog, domestic dog, Canis familiaris",
        "tench, Tinca tinca",
        "n99999999",
    )
    manifest.write_text("{")
    with pytest.raises(LightningDiTError, match="the manifest .* cannot be read"):
        Labels.of(load_config(file))


def test_an_extraction_says_its_classes_what_it_passes_over_and_what_the_crop_loses(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_images(tmp_path / "images", 4, ("ID_1", "ID_2", "ID_10"))
    Image.new("RGB", (128, 200)).save(folder / "ID_2" / "tall.png")
    Image.new("RGB", (64, 64)).save(folder / "ID_2" / "square.png")
    (folder / "ID_2" / "x.npy").touch()
    output = tmp_path / "latents"
    assert main(command(tiny_folder, "--images", folder, "--output", output)) == 0
    printed = capsys.readouterr().out
    assert "note: passed over 1 files that are no images: .npy 1\n6 images of 3 classes\n" in printed
    assert "classes: 0 ID_1 (2), 1 ID_2 (3), 2 ID_10 (1)\n" in printed
    assert (
        "5 of 6 images are not square: the crop leaves out both ends of their longer side, up to 36% of it" in printed
    )
    manifest = json.loads((output / LATENTS_MANIFEST).read_text())
    assert manifest["cut"] == {"images": 5, "most": 0.36}
    assert manifest["class_names"] == ["ID_1", "ID_2", "ID_10"]


@pytest.mark.parametrize("named", [True, False])
def test_an_extraction_keeps_the_order_of_its_manifest(tiny_folder: Path, tmp_path: Path, named: bool) -> None:
    """As of one that began when folders were in alphabetical order, with and without names in its manifest."""
    alphabetical = ["ID_1", "ID_10", "ID_2"]
    images = open_folder(save_images(tmp_path / "images", 6, tuple(alphabetical)))
    tokenizer, weights = VA_VAE(tiny_folder / "tokenizer.yaml", 16), tiny_folder / "tokenizer.safetensors"
    settings = extraction.ExtractionSettings(image_size=16)
    described = extraction.settings_of(images.in_order(alphabetical), tokenizer, weights, settings)
    output = tmp_path / "latents"
    output.mkdir()
    content = {"settings": described} | ({"class_names": alphabetical} if named else {})
    (output / LATENTS_MANIFEST).write_text(json.dumps(content))
    result = extraction.extract(images, tokenizer, weights, output, settings)
    assert result.manifest is not None
    assert result.manifest["class_names"] == tuple(alphabetical)
    labels = {Path(images.files[n]).parent.name: label for n, label in enumerate(LatentShards(output).labels.tolist())}
    assert labels == {"ID_1": 0, "ID_10": 1, "ID_2": 2}


@pytest.mark.parametrize(
    "options",
    [("--dataset", "CIFAR10"), (), ("--images", "x", "--data-root", "y"), ("--images", "x", "--list", "y")],
)
def test_one_source_of_images_must_be_named(options: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--config", "c.yaml", "--output", str(tmp_path), *options])
    assert ended.value.code == 2


def test_the_shares_of_the_time_are_stated(tiny_folder: Path, images: Path, tmp_path: Path) -> None:
    """The parts are disjoint, so they are at most the whole; the encoder has one."""
    config = load_config(tiny_folder / "config.yaml")
    tokenizer = VA_VAE(tiny_folder / "tokenizer.yaml", 16)
    settings = extraction.ExtractionSettings(image_size=config.data.image_size, shard_size=4, threads=1)
    weights = tiny_folder / "tokenizer.safetensors"
    result = extraction.extract(open_folder(images), tokenizer, weights, tmp_path / "latents", settings)
    assert result.manifest is not None
    assert (result.made, result.manifest["latents"], result.manifest["classes"]) == (11, 11, 3)
    assert set(result.shares) == {"encoder", "waiting for images", "writing"}
    assert result.shares["encoder"] > 0
    assert sum(result.shares.values()) <= 1


def test_latents_of_a_test_split_are_named_for_validation() -> None:
    arguments = ["--config", "my config.yaml", "--output", "latents", "--data-root", "data"]
    said = next_step(parse(arguments), {"classes": 10})
    assert said == (
        "Next: set data.data_path: latents and data.num_classes: 10 in my config.yaml, and"
        " python -m LightningDiT.train --config 'my config.yaml'"
    )
    said = next_step(parse([*arguments, "--split", "test"]), {"classes": 10})
    assert "data.valid_path: latents and train.valid_every in my" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_resized_or_padded_keep_their_ends(
    workers: int, tiny_folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the tokenizer called on each image, resized by Pillow; the manifest has the way and no image is cut."""
    output = tmp_path / "latents"
    own = command(tiny_folder, "--images", images, "--output", output, "--posterior", "mode", "--workers", str(workers))
    assert main([*own, "--fit", "resize"]) == 0
    said = capsys.readouterr().out
    assert "leaves out both ends" not in said
    assert json.loads((output / LATENTS_MANIFEST).read_text())["settings"]["fit"] == "resize"
    latents, _ = LatentShards(output).batch(torch.arange(11))
    tokenizer = VA_VAE(tiny_folder / "tokenizer.yaml")
    for place, path in enumerate(sorted(images.rglob("*.png"))[:3]):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
        values = torch.from_numpy(pixels.astype(np.float64) / 127.5 - 1).permute(2, 0, 1)[None].float()
        expected = tokenizer.encode_images(values, sample=False)
        torch.testing.assert_close(latents[place : place + 1], expected, atol=1e-5, rtol=1e-5)
    assert run_main(lambda: main([*own, "--fit", "pad"])) == 1
    assert "fit: resize there, pad now" in capsys.readouterr().err
