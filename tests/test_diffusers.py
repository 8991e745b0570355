"""A tokenizer and a pipeline in diffusers' layout, beside the real classes of diffusers."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import as_yaml, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.formats import diffusers_vae
from LightningDiT.loading import load_stats, make_model, model_settings
from LightningDiT.sampling.dry_run import verify
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.starting_weights import read_starting_weights
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.tools import convert_pipeline, convert_tokenizer
from tests.conftest import BUNDLED, PROJECT, seed_weights
from tests.hub_server import running_hub

WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Embedding and inner channels of the latent: those of f16d32, where both are one number, and each the larger.
CHANNELS = [(32, 32), (3, 5), (6, 4)]
AS_F16D32 = {"resolution": 32, "ch": 32, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [2]}
SMALL = {"resolution": 8, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]}


@pytest.fixture
def diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, which keeps the modules that it loads below `tmp_path`."""
    package = pytest.importorskip("diffusers")
    modules = importlib.import_module("diffusers.utils.dynamic_modules_utils")
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return package


def write_tokenizer(folder: Path, embed_dim: int, z_channels: int, **sizes: Any) -> Path:
    """Write a tokenizer of ours with seeded weights and statistics, and return its YAML."""
    folder.mkdir()
    params = {"embed_dim": embed_dim, "ddconfig": {"z_channels": z_channels, **AS_F16D32, **sizes}}
    file = folder / "tokenizer.yaml"
    file.write_text(as_yaml({"ckpt_path": "tokenizer.safetensors", "model": {"params": params}}))
    model = seed_weights(AutoencoderKL(autoencoder_settings(load_tokenizer_config(file))))
    save_weights({**model.state_dict(), "loss.logvar": torch.zeros(1)}, folder / "tokenizer.safetensors")
    numbers = torch.arange(1.0, embed_dim + 1).view(1, -1, 1, 1)
    LatentStats(numbers / 7, numbers / 3).save(folder / "latents_stats.pt")
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer of four channels in diffusers' layout."""
    folder = tmp_path_factory.mktemp("converted")
    return convert(write_tokenizer(folder / "ours", 4, 4, **SMALL), folder / "theirs")


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "theirs"))


def convert(source: Path, output: Path, *options: str) -> Path:
    assert convert_tokenizer.main(["--tokenizer", str(source), "--output", str(output), *options]) == 0
    return output


def images_of(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def assert_same_network(ours: AutoencoderKL, theirs: Any, channels: int, dtype: torch.dtype) -> None:
    """Encoder and decoder agree with diffusers', whose further channels of the latent are zero and have no effect."""
    images, tolerance = images_of().to(dtype), {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    with torch.no_grad():
        posterior, known = ours.encode(images), theirs.encode(images).latent_dist
        decoded, wanted = theirs.decode(known.mean).sample, ours.decode(posterior.mean)
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(known.mean[:, :channels], posterior.mean, **close)
    torch.testing.assert_close(known.logvar[:, :channels], posterior.logvar, **close)
    torch.testing.assert_close(decoded, wanted, **close)
    assert not known.mean[:, channels:].any() and (known.logvar[:, channels:] == -30).all()
    assert wanted.std() > 0.01


# ---- the tokenizer


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_tokenizer_is_an_autoencoder_of_diffusers_and_comes_back(
    channels: tuple[int, int], diffusers: Any, tmp_path: Path
) -> None:
    """Encoder and decoder agree, and weights and statistics come back bit for bit.

    In float64, because a decoder of seeded weights magnifies float32's rounding to 6e-5.
    """
    source = write_tokenizer(tmp_path / "ours", *channels)
    folder = convert(source, tmp_path / "theirs")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    assert_same_network(VA_VAE(source, device="cpu").model, theirs, channels[0], torch.float64)
    stats = LatentStats.load(source.parent / "latents_stats.pt")
    told = (theirs.config.latents_mean, theirs.config.latents_std)
    assert [values[: channels[0]] for values in told] == [stats.mean.flatten().tolist(), stats.std.flatten().tolist()]
    assert theirs.config.scaling_factor == 1

    theirs.float().save_pretrained(tmp_path / "again")  # by diffusers, which keeps how many channels were filled up
    for number, there in enumerate((folder, tmp_path / "again")):
        back = convert(there, tmp_path / f"back{number}")
        before, after = load_file(source.parent / "tokenizer.safetensors"), load_file(back / "tokenizer.safetensors")
        assert before.keys() - after.keys() == {"loss.logvar"}
        assert all(value.shape == before[name].shape and value.equal(before[name]) for name, value in after.items())
        assert autoencoder_settings(load_tokenizer_config(back / "tokenizer.yaml")) == autoencoder_settings(
            load_tokenizer_config(source)
        )
        found = LatentStats.load(back / "latents_stats.pt")
        assert found.mean.equal(stats.mean) and found.std.equal(stats.std)
        assert VA_VAE(back / "tokenizer.yaml", device="cpu").model.settings.embed_dim == channels[0]


def test_the_bundled_tokenizer_in_diffusers(diffusers: Any, tmp_path: Path) -> None:
    folder = convert(BUNDLED, tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    assert_same_network(VA_VAE(BUNDLED / "tokenizer.yaml", device="cpu").model, theirs, 6, torch.float32)


@pytest.mark.parametrize("quant_conv", [(True, False), (False, False)])
def test_an_autoencoder_that_diffusers_made_loads_without_diffusers(
    quant_conv: tuple[bool, bool], diffusers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without the convolutions at the latent, which come back as they were."""
    torch.manual_seed(3)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        latent_channels=5,
        use_quant_conv=quant_conv[0],
        use_post_quant_conv=quant_conv[1],
    )
    theirs.eval().save_pretrained(tmp_path / "hub" / "vae")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "diffusers", None)
        ours = VA_VAE(tmp_path / "hub", device="cpu")  # the folder of a whole pipeline
        back = convert(tmp_path / "hub", tmp_path / "ours")
        again = convert(back, tmp_path / "theirs")
    assert_same_network(ours.model, theirs, 5, torch.float32)
    config = json.loads((again / "config.json").read_text())
    assert (config["use_quant_conv"], config["use_post_quant_conv"]) == quant_conv
    before, after = load_file(tmp_path / "hub" / "vae" / WEIGHTS), load_file(again / WEIGHTS)
    assert before.keys() == after.keys() and all(value.equal(after[name]) for name, value in before.items())


@pytest.mark.parametrize("kernels", [False, True])
def test_names_and_shapes_of_earlier_releases(kernels: bool, copied: Path) -> None:
    """diffusers before 0.12 called the products of attention otherwise; some files keep them as 1x1 convolutions."""
    folder = copied
    wanted = load_weights(folder / WEIGHTS)
    earlier = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        earlier[name] = value[:, :, None, None] if kernels and "attentions" in name and value.dim() == 2 else value
    assert any("mid_block.attentions.0.proj_attn.weight" in name for name in earlier)
    (folder / WEIGHTS).unlink()
    torch.save(earlier, folder / "diffusion_pytorch_model.bin")
    assert load_tokenizer_config(folder).ckpt_path == str(folder / "diffusion_pytorch_model.bin")
    found = load_weights(folder / "diffusion_pytorch_model.bin")
    assert found.keys() == wanted.keys() and all(value.equal(wanted[name]) for name, value in found.items())
    assert read_starting_weights(folder).autoencoder.keys() == wanted.keys()


def test_shards_are_read(diffusers: Any, copied: Path, tmp_path: Path) -> None:
    diffusers.AutoencoderKL.from_pretrained(copied).save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    config = load_tokenizer_config(tmp_path / "shards")
    assert str(config.ckpt_path).endswith(f"{WEIGHTS}.index.json")
    found, wanted = load_weights(str(config.ckpt_path)), load_weights(copied / WEIGHTS)
    assert found.keys() == wanted.keys() and all(value.equal(wanted[name]) for name, value in found.items())


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "AutoencoderDC"}, "of the class AutoencoderDC; AutoencoderKL is expected"),
    ({"spectral_norm": True}, "spectral_norm is unknown"),
    ({"act_fn": "relu"}, "act_fn is 'relu'; 'silu' is expected"),
    ({"norm_num_groups": 16}, "norm_num_groups is 16; 32 is expected"),
    ({"mid_block_add_attention": False}, "mid_block_add_attention is False; True is expected"),
    ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "attention at different levels"),
    ({"down_block_types": ["DownBlock2D"] * 2}, "2 of DownEncoderBlock2D or AttnDownEncoderBlock2D are expected"),
    ({"block_out_channels": [32, 48]}, "block_out_channels has 48; a multiple of its first, 32"),
    ({"block_out_channels": []}, "positive whole numbers are expected"),
    ({"latent_channels": "4"}, "latent_channels is ['4']; positive whole numbers are expected"),
    ({"latents_mean": [0.0, 1.0]}, "latents_mean is [0.0, 1.0]; 4 numbers are expected"),
    ({"latents_mean": None, "latents_std": None, "scaling_factor": 0}, "scaling_factor is 0"),
    ({"latent_channels": 8, "latents_mean": None, "latents_std": None}, "tensors 7 of another shape"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_network_is_one_line(change: dict[str, Any], message: str, copied: Path, tmp_path: Path) -> None:
    folder = copied
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LightningDiTError, match=re.escape(message)) as raised:
        convert(folder, tmp_path / "back")
    assert "\n" not in str(raised.value) and not (tmp_path / "back").exists()


def test_what_is_no_tokenizer_in_diffusers_layout(converted: Path, copied: Path, tmp_path: Path) -> None:
    folder, ours = copied, converted.parent / "ours"
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "encoder.mid_block.temb.weight": torch.zeros(1)}, folder / WEIGHTS)
    with pytest.raises(LightningDiTError, match=r"tensors 1 unknown: encoder\.mid_block\.temb\.weight"):
        VA_VAE(folder, device="cpu")
    (folder / WEIGHTS).unlink()
    with pytest.raises(LightningDiTError, match=f"holds config.json and no weights; {WEIGHTS} is expected"):
        VA_VAE(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LightningDiTError, match=r"config\.json is no JSON"):
        VA_VAE(folder)
    first = write_tokenizer(tmp_path / "wide", 4, 4, ch_mult=[2, 2], resolution=8)
    with pytest.raises(LightningDiTError, match=r"ch_mult is \[2, 2\]; AutoencoderKL of diffusers needs 1"):
        convert(first, tmp_path / "x")
    with pytest.raises(LightningDiTError, match="the statistics have 6 channels and the latents 4"):
        convert(ours, tmp_path / "x", "--stats", str(BUNDLED / "latents_stats.pt"))
    assert diffusers_vae.folder_of(ours) is None and not (tmp_path / "x").exists()


def test_a_dry_run_of_a_conversion_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tokenizer(tmp_path / "ours", 3, 5, **SMALL)
    convert(source, tmp_path / "theirs", "--dry-run")
    assert capsys.readouterr().out == (
        "AutoencoderKL of diffusers: 154 tensors, 5 latent channels, 2 of them filled up by zeros,"
        " statistics of each channel\n"
    )
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    ("told", "mean", "std"),
    [
        ({"latents_mean": [1.0, 2, 3, 4], "latents_std": [5.0, 6, 7, 8]}, [1, 2, 3, 4], [5, 6, 7, 8]),
        ({"shift_factor": 0.5, "scaling_factor": 0.25}, [0.5] * 4, [4] * 4),
        ({"scaling_factor": 0.5}, [0] * 4, [2] * 4),
        ({"scaling_factor": 1.0}, None, None),
    ],
)
def test_statistics_of_config_json(told: dict[str, Any], mean: Any, std: Any, copied: Path) -> None:
    """z = (latent - mean) / std; one shift and scale for all channels are z = (latent - shift) * scale."""
    folder = copied
    config = json.loads((folder / "config.json").read_text())
    bare = {"latents_mean": None, "latents_std": None, "shift_factor": None, "scaling_factor": 0.18215}
    (folder / "config.json").write_text(json.dumps(config | bare | told))
    stats = LatentStats.of_diffusers(folder / WEIGHTS)
    assert (stats and stats.mean.flatten().tolist()) == mean and (stats and stats.std.flatten().tolist()) == std


@pytest.mark.parametrize("name", ["", "vae", f"vae/{WEIGHTS}"])
def test_a_configuration_names_a_tokenizer_in_diffusers_layout(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    """The whole pipeline's folder, the tokenizer's, or its file; without data_path its statistics count."""
    wanted = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")([0, 2], output_type="pt").images
    convert(tiny_folder, tmp_path / "hub" / "vae")
    text = (tiny_folder / "config.yaml").read_text().replace("data_path: ., ", "")
    file = tiny_folder / "other.yaml"
    file.write_text(text.replace("model_name: tokenizer.yaml", f"ckpt_path: {tmp_path / 'hub' / name}"))
    config = load_config(file)
    assert config.vae.ckpt_path == str(tmp_path / "hub" / "vae" / WEIGHTS)
    assert verify(config)[-1] == f"latent statistics in {config.vae.ckpt_path}: 4 channels"
    pipe = LightningDiTPipeline.from_config(config, "cpu")
    assert pipe([0, 2], output_type="pt").images.equal(wanted)
    pipe.save_pretrained(tmp_path / "saved", picture=False)
    saved = LightningDiTPipeline.from_pretrained(tmp_path / "saved", "cpu")
    assert saved([0, 2], output_type="pt").images.equal(wanted)


def test_statistics_of_a_named_folder_win(tiny_folder: Path, tmp_path: Path) -> None:
    convert(tiny_folder, tmp_path / "vae")
    other = LatentStats(torch.full((1, 4, 1, 1), 0.1), torch.full((1, 4, 1, 1), 2.0))
    other.save(tiny_folder / "latents_stats.pt")
    text = (tiny_folder / "config.yaml").read_text()
    (tiny_folder / "other.yaml").write_text(text.replace("model_name: tokenizer.yaml", f"ckpt_path: {tmp_path}/vae"))
    assert load_stats(load_config(tiny_folder / "other.yaml")).std.equal(other.std)


# ---- the pipeline


def convert_all(config: Path, output: Path) -> Path:
    assert convert_pipeline.main(["--config", str(config), "--output", str(output)]) == 0
    return output


def pixels_of(pipe: Any, **options: Any) -> np.ndarray:
    return np.asarray(pipe([0, 2, "dog"], seed=7, output_type="np", **options).images)


def test_the_pipeline_of_diffusers_gives_the_same_picture(diffusers: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """By custom_pipeline, by the folder alone, saved again, and back in our own pipeline; with guide and options."""
    (tiny_folder / "guide.safetensors").write_bytes((tiny_folder / "transformer.safetensors").read_bytes())
    text = (tiny_folder / "config.yaml").read_text()
    (tiny_folder / "config.yaml").write_text(text.replace("sample: {", "sample: {guide_ckpt: guide.safetensors, "))
    ours = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
    folder = convert_all(tiny_folder / "config.yaml", tmp_path / "folder")
    load = diffusers.DiffusionPipeline.from_pretrained
    by_name = load(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    alone = load(str(folder), trust_remote_code=True)
    for options in ({}, {"guidance_scale": 3.0, "num_inference_steps": 6, "batch_size": 1, "indices": [5, 1, 2]}):
        wanted = pixels_of(ours, **options)
        assert np.array_equal(pixels_of(by_name, **options), wanted) and wanted.std() > 1
        assert np.array_equal(pixels_of(alone, **options), wanted)
    assert isinstance(alone.vae, diffusers.AutoencoderKL) and alone.guide is not None
    assert isinstance(alone("dog").images[0].size, tuple) and len(alone("dog", return_dict=False)) == 1

    alone.save_pretrained(tmp_path / "again")
    again = load(str(tmp_path / "again"), trust_remote_code=True)
    back = LightningDiTPipeline.from_config(folder / "solver" / "config.yaml", "cpu")
    assert all(np.array_equal(pixels_of(pipe), pixels_of(ours)) for pipe in (again, back))
    with pytest.raises(LightningDiTError, match="cat, house cat"):
        alone("bird")


def test_the_bundled_pipeline_keeps_its_calibrated_solver(diffusers: Any, tmp_path: Path) -> None:
    folder = convert_all(BUNDLED / "config.yaml", tmp_path / "folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    ours = LightningDiTPipeline.from_config(BUNDLED / "config.yaml", "cpu")
    assert pipe.lightningdit.solver(ours.config.sample).calibrated == ours.solver(ours.config.sample).calibrated
    wanted = ours(["Bag", 3], seed=4, output_type="np").images
    assert np.array_equal(pipe(["Bag", 3], seed=4, output_type="np").images, wanted)
    assert pipe.lightningdit is pipe.lightningdit
    kept = pipe.lightningdit
    pipe.transformer.to(torch.bfloat16)
    assert pipe.lightningdit is not kept and pipe.lightningdit.dtype == torch.bfloat16


def test_a_unet_is_a_pipeline_too(diffusers: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """With latents that are not normalised, which diffusers scales by one number."""
    text = (tiny_folder / "config.yaml").read_text().replace("LightningDiT-XS/2", "UNet-S")
    text = text.replace("data: {", "data: {latent_norm: false, latent_multiplier: 0.5, ")
    (tiny_folder / "config.yaml").write_text(text)
    network = seed_weights(make_model(model_settings(load_config(tiny_folder / "config.yaml"))))
    save_weights(network.state_dict(), tiny_folder / "transformer.safetensors")
    folder = convert_all(tiny_folder / "config.yaml", tmp_path / "folder")
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    ours = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
    assert np.array_equal(pixels_of(pipe), pixels_of(ours))
    assert type(pipe.transformer).__name__ == "LightningDiTUNet"
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.latents_mean) == (0.5, None)


FROM_HUB = """
import sys
import numpy
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained("me/cats")
except ValueError as error:
    assert "contains custom code in lightningdit_pipeline.py" in str(error), error
else:
    raise AssertionError("code ran that nobody trusted")
pipe = DiffusionPipeline.from_pretrained("me/cats", trust_remote_code=True)
numpy.save(sys.argv[1], pipe([0, 2, "dog"], seed=7, output_type="np").images)
"""


def test_a_converted_folder_is_a_repository_of_the_hub(diffusers: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """diffusers fetches all that the pipeline needs, and runs its code only where it is trusted."""
    folder = convert_all(tiny_folder / "config.yaml", tmp_path / "folder")
    with running_hub() as hub:
        for path in folder.rglob("*.*"):
            hub.put("me/cats", path.relative_to(folder).as_posix(), path.read_bytes())
        places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", FROM_HUB, str(tmp_path / "images.npy")]
        environment = {**os.environ, **places, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
    assert np.array_equal(np.load(tmp_path / "images.npy"), pixels_of(ours))


def test_without_diffusers_the_pipeline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A conversion needs none."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "LightningDiT.interop.pipeline", raising=False)
    with pytest.raises(LightningDiTError, match=r"needs diffusers, which is not installed; fix: pip install diffusers"):
        importlib.import_module("LightningDiT.interop.pipeline")
    convert_all(BUNDLED / "config.yaml", tmp_path / "folder")
    assert convert_pipeline.main(["--config", str(BUNDLED / "config.yaml"), "--output", "x", "--dry-run"]) == 0
    assert not Path("x").exists()
