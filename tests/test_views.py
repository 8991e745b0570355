"""A model of one channel: its runs hold levels with 16 bits, and people see them in a colour map."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT import inference
from LightningDiT.checkpoint import save_weights
from LightningDiT.radar.colour_maps import colours
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Preview
from LightningDiT.sampling.resumable_run import sample_run
from LightningDiT.sampling.views import shown_bytes, shown_file, views
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.vavae import autoencoder_settings
from tests.conftest import TINY_TOKENIZER, seed_weights


@pytest.fixture
def levels_folder(tiny_folder: Path) -> Path:
    """The small pipeline's folder with a tokenizer of one channel."""
    file = tiny_folder / "tokenizer.yaml"
    file.write_text(TINY_TOKENIZER.replace("ch: 32,", "ch: 32, in_channels: 1, out_ch: 1,"))
    model = seed_weights(AutoencoderKL(autoencoder_settings(load_tokenizer_config(file))))
    save_weights(model.state_dict(), tiny_folder / "tokenizer.safetensors")
    return tiny_folder


def test_a_view_has_the_colours_of_the_map() -> None:
    levels = torch.tensor([[-1.0, 1.0], [0.0, -3.0]]).view(1, 1, 2, 2)
    (view,) = views(levels)
    jet = colours("jet")
    np.testing.assert_array_equal(np.asarray(view), [[jet[0], jet[255]], [jet[128], jet[0]]])
    (photo,) = views(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert np.asarray(photo).tolist() == [[[0, 128, 255]]]


def test_a_run_of_levels_has_16_bits(levels_folder: Path, tmp_path: Path) -> None:
    pipe = LightningDiTPipeline.from_config(levels_folder / "config.yaml", "cpu")
    assert pipe.channels == 1
    preview = Preview(1, tmp_path / "strip.png")
    run = sample_run(pipe, [0, 1, 2], 4, tmp_path / "run", None, preview=preview)
    decoded = pipe([0, 1, 2], seed=4, output_type="pt", batch_size=2).images
    wanted = (decoded.clamp(-1, 1) + 1) / 2 * 65535
    for path, level in zip(run.paths, wanted, strict=True):
        assert path is not None
        stored = Image.open(path)
        assert stored.mode.startswith("I")
        assert np.abs(np.asarray(stored, np.float64) - level[0].numpy()).max() <= 1
        shown = np.asarray(shown_file(path)).reshape(-1, 3)
        assert {tuple(pixel) for pixel in shown} <= {tuple(colour) for colour in colours("jet")}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["pixels"] == "grey of 16 bits, 0 is level 0 and 65535 level 1"
    strip = np.asarray(Image.open(tmp_path / "strip.png")).reshape(-1, 3)
    assert (strip[:, 0] != strip[:, 1]).any()
    before = {path: path.read_bytes() for path in run.paths if path}
    next(iter(before)).unlink()
    assert sample_run(pipe, [0, 1, 2], 4, tmp_path / "run", None).made == 1
    assert {path: path.read_bytes() for path in before} == before


def test_the_grid_of_levels_is_in_colour(levels_folder: Path) -> None:
    command = ["--config", str(levels_folder / "config.yaml"), "--output", str(levels_folder / "out"), "--demo"]
    assert inference.main(command) == 0
    grid = np.asarray(Image.open(levels_folder / "out" / "demo_samples.png")).astype(int)
    assert (np.ptp(grid.reshape(-1, 3), axis=1) > 100).mean() > 0.1
    file = next((levels_folder / "out").glob("run-*/000000.png"))
    with Image.open(io.BytesIO(shown_bytes(file))) as picture:  # that of the report
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(shown_file(file)))


def test_a_photo_is_shown_as_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "a.png")
    assert np.asarray(shown_file(tmp_path / "a.png")).reshape(-1, 3).tolist() == [[1, 2, 3]] * 4
    assert shown_bytes(tmp_path / "a.png") == (tmp_path / "a.png").read_bytes()
