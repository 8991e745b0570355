"""The choice of a tokenizer: which candidate is taken, what a rerun does again, and what the choice leads to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from LightningDiT.checkpoint import load_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.reconstruction import Measures
from LightningDiT.radar.level_images import load_windows
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latent_space import encoder_values, same_latents
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.tools import choose_tokenizer as module
from LightningDiT.tools.choose_tokenizer import CANDIDATES, Thresholds, choose, main
from LightningDiT.training.curves import LiveCurves
from tests.conftest import BUNDLED
from tests.walkers import prepared

GOOD = {"psnr_mean": 30.0, "ridge_percent": 0.5, "texture": 0.9, "judge_lost": 0.0}
BAD = {"psnr_mean": 20.0, "ridge_percent": 3.0, "texture": 0.5, "judge_lost": 0.2}
SIZES = {"z_channels": 4, "resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 0, "attn_resolutions": []}


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and torchmetrics take seconds, and have tests of their own."""
    monkeypatch.setattr(LiveCurves, "_draw", lambda self: None)
    monkeypatch.setattr(Measures, "made", lambda self, *_: None)


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("walkers"), {"1": [4, 4, 4], "2": [4, 4, 4]}, "--db-range", "-45", "0")


@pytest.mark.parametrize(("figure", "value"), [(name, BAD[name]) for name in BAD])
def test_each_figure_has_a_threshold(figure: str, value: float) -> None:
    assert Thresholds().failures(GOOD) == []
    [text] = Thresholds().failures({**GOOD, figure: value})
    assert f"{value:.3g}, " in text
    at = {**GOOD, "psnr_mean": 24.0, "ridge_percent": 2.0, "texture": 0.8, "judge_lost": 0.05}
    assert Thresholds().failures(at) == []


def test_the_cheapest_that_passes_is_taken() -> None:
    usual, order = Thresholds(), list(CANDIDATES)
    assert order == ["as_it_is", "decoder", "fine_tuned", "scratch"]
    for number, name in enumerate(order):
        figures = {key: BAD if at < number else {**GOOD, "psnr_mean": 30.0 + at} for at, key in enumerate(order)}
        assert choose(dict(reversed(figures.items())), usual) == (name, True)
    missing = {
        "as_it_is": BAD,
        "decoder": {**GOOD, "texture": 0.7},
        "scratch": {**GOOD, "texture": 0.6, "psnr_mean": 31.0},
    }
    assert choose(missing, usual) == ("scratch", False)  # as many misses, and the higher PSNR
    assert choose({**missing, "fine_tuned": {**BAD, "psnr_mean": 40.0}}, usual) == ("scratch", False)


def test_the_estimate_counts_the_steps_that_are_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """3 s a step, 10 steps of which one candidate has taken 4; half a second a step of a judge with 100."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "build_networks", lambda *_, **__: None)

    def spend(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(module, "TokenizerTrainer", lambda *_: SimpleNamespace(step=lambda step: spend(3.0)))
    there = {"fine_tuned": Path("checkpoint-0000004.pt")}
    monkeypatch.setattr(module, "RunDir", lambda folder: SimpleNamespace(newest=lambda: there.get(folder.name)))
    search = SimpleNamespace(
        **{"output": tmp_path, "tokenizer": None, "training": None, "steps": 10, "judge_steps": 100},
        train_config=lambda name: None,
        judge=lambda steps: spend(0.5 * steps),
    )
    assert module.estimate(search, list(CANDIDATES)) == 3 * (10 + 6 + 10) + 0.5 * 100
    assert module.estimate(search, ["as_it_is"]) == 0.5 * 100


def command(walkers: Path, output: Path, *more: str) -> list[str]:
    where = ["--levels", str(walkers / "levels"), "--split-file", str(walkers / "out" / "split.json")]
    steps = ["--steps", "2", "--judge-steps", "3", "--texture-weight", "0.05"]
    return [*where, "--output", str(output), *steps, *more]


def test_candidates_are_trained_measured_and_one_is_taken(
    walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the bundled tokenizer, and by a rerun without any work."""
    output = tmp_path / "choice"
    assert main(command(walkers, output, "--candidates", "as_it_is")) == 0
    assert "candidate 1 of 1: as_it_is" in capsys.readouterr().out
    lax = ["--least-psnr", "0", "--most-ridge", "100", "--least-texture", "0", "--most-lost", "1"]
    assert main(command(walkers, output, "--candidates", "as_it_is", "decoder", "fine_tuned")) == 0
    said = capsys.readouterr().out
    assert "for decoder, fine_tuned" in said  # the first is there
    assert "candidate 2 of 2: fine_tuned" in said
    report = json.loads((output / "choice.json").read_text())
    assert list(report["candidates"]) == ["as_it_is", "decoder", "fine_tuned"]
    assert report["settings"]["split"]["fold"] == 0
    for name, figures in report["candidates"].items():
        assert 0 < figures["texture"] <= 1, name
        assert figures["judge_lost"] == pytest.approx(report["judge_of_real"] - figures["judge"])
        assert figures["ridge_percent"] == pytest.approx(100 * figures["ridge_error"] / 16)
        assert Image.open(output / f"{name}.png").width > 4 * 128
    weights = {name: load_weights(output / name / "tokenizer.safetensors") for name in report["candidates"]}
    bundled = load_weights(BUNDLED / "tokenizer.safetensors")
    assert torch.equal(weights["as_it_is"]["decoder.conv_in.weight"], bundled["decoder.conv_in.weight"])
    start = encoder_values(weights["as_it_is"])
    assert same_latents(start, encoder_values(weights["decoder"]))
    assert not same_latents(start, encoder_values(weights["fine_tuned"]))
    monkeypatch.setattr(module, "train_stage", lambda *_: pytest.fail("nothing is trained again"))
    monkeypatch.setattr(module, "train_judge", lambda *_: pytest.fail("nor is a judge"))
    assert main(command(walkers, output, *lax, "--candidates", "as_it_is")) == 0
    said = capsys.readouterr().out
    assert "chosen: as_it_is, the starting weights as they are (the cheapest that passes)" in said
    assert "vae.downsample_ratio: 4, model.in_chans: 6 and data.image_size: 16" in said
    figures = json.loads((output / "choice.json").read_text())
    assert (figures["chosen"], figures["passes"], figures["thresholds"]["least_psnr"]) == ("as_it_is", True, 0.0)
    assert figures["candidates"] == report["candidates"]
    tokenizer, windows = VA_VAE(output / "chosen.yaml"), load_windows(*places(walkers), "validation")
    copies = tokenizer.decode_levels(tokenizer.encode_images(windows.pixels, sample=False)).clamp(-1, 1)
    ratios = 10 * torch.log10(4 / (copies - windows.pixels).square().mean((1, 2, 3)))
    assert float(ratios.mean()) == pytest.approx(report["candidates"]["as_it_is"]["psnr_mean"], rel=1e-4)


def places(walkers: Path) -> tuple[Path, Path]:
    return walkers / "levels", walkers / "out" / "split.json"


def test_three_channels_from_scratch_and_what_is_refused(
    walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    train = {"batch_size": 4, "lr": 0.001}
    config.write_text(yaml.safe_dump({"model": {"params": {"embed_dim": 4, "ddconfig": SIZES}}, "train": train}))
    own = ["--config", str(config), "--candidates", "scratch", "--seed", "1"]
    assert main(command(walkers, tmp_path / "choice", *own)) == 0
    said = capsys.readouterr().out
    assert "scratch does not pass: PSNR " in said
    assert "chosen: scratch, from scratch (warning: none passes, and it comes nearest" in said
    content = load_tokenizer_config(tmp_path / "choice" / "chosen.yaml")
    assert (content.ddconfig, content.embed_dim) == (SIZES, 4)
    assert content.ckpt_path == str((tmp_path / "choice" / "scratch" / "tokenizer.safetensors").resolve())
    with pytest.raises(LightningDiTError, match=r"holds a choice with other settings \(training.seed: 1 there"):
        main(command(walkers, tmp_path / "choice", *own[:-1], "2"))
    with pytest.raises(LightningDiTError, match="has no weights to start from; fix: give --init FILE"):
        main(command(walkers, tmp_path / "other", "--init", str(tmp_path)))
    damaged: Any = tmp_path / "choice" / "choice.json"
    damaged.write_text("[]")
    with pytest.raises(LightningDiTError, match="is no report of this command"):
        main(command(walkers, tmp_path / "choice", *own))
