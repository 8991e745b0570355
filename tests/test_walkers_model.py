"""models/walkers on walkers that it has not seen: it knows their windows better than a model of garments does."""

from __future__ import annotations

import pytest
import torch

import step5_prepare_spectrograms as step5
from LightningDiT.config import load_config
from LightningDiT.loading import load_stats
from LightningDiT.radar.level_images import load_windows
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tools import simulate_walkers
from LightningDiT.training.fine_tuning import initialise
from LightningDiT.verdict.plan import MODELS
from tests.conftest import PROJECT

FOLDER = PROJECT / "models" / "walkers"
MOST_BYTES = 16e6


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Return (N, 1, 64, 64) windows of two walkers of another population."""
    root = tmp_path_factory.mktemp("walkers")
    make = ["--people", "2", "--windows", "24", "--seed", "4242", "--workers", "1"]
    assert simulate_walkers.main(["--output", str(root / "data"), *make]) == 0
    write = ["--write", str(root / "levels"), "--size", "64", "--db-range", "-45", "0"]
    assert step5.main(["--data", str(root / "data"), "--output", str(root / "out"), *write]) == 0
    return load_windows(root / "levels", root / "out/split.json", "training", 0).pixels[::3]


@pytest.fixture(scope="module")
def pipe() -> LightningDiTPipeline:
    return LightningDiTPipeline.from_config(FOLDER / "config.yaml", "cpu")


def test_the_folder_is_small_and_no_person_has_its_names(pipe: LightningDiTPipeline) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < MOST_BYTES
    assert FOLDER.parent == MODELS
    assert all(name.startswith("simulated walker ") for name in pipe.labels.names)
    assert len(set(pipe.labels.names)) == 200
    assert pipe.conditions.names == ("Backpack_line", "Bag_Phone_line", "Bag_line", "Normal_line")


@torch.no_grad()
def test_windows_of_others_come_back(pipe: LightningDiTPipeline, windows: torch.Tensor) -> None:
    levels = (windows + 1) / 2
    back = (pipe.tokenizer.decode_latents(pipe.tokenizer.encode_images(windows, sample=False)) + 1) / 2
    psnr = -10 * (levels - back).square().mean().log10()
    assert 27 < psnr < 32, psnr  # 29.0 dB on 1,009 windows of 31 other walkers


@torch.no_grad()
def test_velocities_are_nearer_than_from_garments(pipe: LightningDiTPipeline, windows: torch.Tensor) -> None:
    config = load_config(FOLDER / "config.yaml")
    garments = type(pipe.transformer)(pipe.transformer.settings)
    initialise(garments, PROJECT / "models/fashion-mnist/transformer.safetensors")
    generator = torch.Generator().manual_seed(0)
    latents = load_stats(config).normalise(pipe.tokenizer.encode_images(windows, sample=False))
    noise = torch.randn(latents.shape, generator=generator)
    labels = pipe.transformer.null_labels(torch.zeros(len(latents), 2, dtype=torch.long))
    errors = []
    for network in (pipe.transformer, garments.eval()):
        found = []
        for time in (0.3, 0.6, 0.9):
            state = time * latents + (1 - time) * noise
            velocity = network(state, torch.full((len(latents),), time), labels)
            found.append((velocity - (latents - noise)).square().mean())
        errors.append(torch.stack(found).mean())
    assert errors[0] < 0.8 * errors[1], errors
