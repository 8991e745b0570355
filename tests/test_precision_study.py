"""The study of precisions: rounding in closed form, emulated fp16 beside torch's own, and the tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import studies.precision_study as study
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.transport import GuidanceSettings
from tests.conftest import BUNDLED, PROJECT
from tests.test_evaluate_bundled import grey_images, write_idx

Build = Callable[..., LightningDiT]
SMALL = {"depth": 2, "hidden_size": 64, "num_heads": 2, "in_channels": 8, "input_size": 4, "patch_size": 1}
DRIFT = {"precision": "bf16", "error": 0.0169, "worst": 0.026, "changed": {"1": 0.046, "2": 0.014, "4": 0.00278}}
DECODED = {"precision": "fp16", "mean": 0.01234, "largest": 0.4567, "changed": {"1": 0.001, "2": 0.0, "4": 0.0}}
STUDY = {
    "bundled": {"count": 20, "solver": "fast", "rows": [{**DRIFT, "frechet": 1.0625, "accuracy": 0.9612}]},
    "solvers": {
        "count": 4,
        "rows": [{"solver": "euler, 50 points", "evaluations": 49, "errors": {"bf16": 0.0041, "fp16, emulated": 5e-4}}],
    },
    "kernels": {"count": 4, "torch": "2.0", "rows": [DRIFT]},
    "b1": {"count": 2, "rows": [{"precision": "bf16", "velocity": 0.0068, "error": 0.0025, "worst": 0.003}]},
    "decode": {"torch": "2.0", "decoders": [{"decoder": "bundled", "count": 4, "rows": [DECODED]}]},
}


def test_products_take_and_give_what_fp16_can_hold() -> None:
    layer = study.emulate_fp16(nn.Linear(1, 1, bias=False).requires_grad_(False))
    nn.init.constant_(layer.weight, 3.0)
    # between 1 and 2 fp16 has steps of 2^-10, and between 2048 and 4096 steps of 2
    for value, expected in ((1 + 2**-12, 3.0), (1 + 2**-10, 3 + 2**-8), (1001.0, 3004.0), (30_000.0, float("inf"))):
        assert float(layer(torch.tensor([[value]]))) == expected
    weights = nn.Linear(2, 1)
    nn.init.constant_(weights.weight, 1 + 2**-11 + 2**-13)
    study.emulate_fp16(weights)
    assert weights.weight.tolist() == [[1 + 2**-10] * 2]


def test_tf32_has_ten_bits_of_mantissa() -> None:
    """The nearest, and the even one of two that are as near, as fp16 has it for these numbers, but with its range."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    halfway = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 0.0])
    for given in (values, halfway):
        assert torch.equal(study.rounded_to_tf32(given), given.half().float())
    assert study.rounded_to_tf32(torch.tensor([2.0**100 * (1 + 2**-12), float("inf")])).tolist() == [
        2.0**100,
        torch.inf,
    ]
    layer = study.emulate_tf32(nn.Linear(1, 1).requires_grad_(False))
    for tensor, value in ((layer.weight, 1 + 2**-12), (layer.bias, 1 + 2**-12)):
        nn.init.constant_(tensor, value)
    study.emulate_tf32(layer)
    assert float(layer(torch.tensor([[1 + 2**-12]]))) == 2 + 2**-12  # sums are float32


def computes_fp16() -> bool:
    """Return whether this torch has a decoder's fp16 kernels for the CPU."""
    try:
        torch.nn.functional.interpolate(torch.zeros(1, 4, 2, 2).half().to(memory_format=torch.channels_last), (4, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not computes_fp16(), reason="this torch enlarges no images in fp16 on a CPU (as 2.2)")
def test_a_decoder_in_fp16_is_nearer_than_in_bf16() -> None:
    model = study.full_pipeline(str(BUNDLED)).tokenizer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    side = model.settings.resolution // model.settings.downsample_factor
    latents = torch.randn(2, model.settings.embed_dim, side, side, generator=torch.Generator().manual_seed(0))
    rows = {row["precision"]: row for row in study.decoder_rows(model, latents)}
    assert set(rows) == {"TF32, emulated", "fp16", "bf16"}
    for figure in ("mean", "largest"):
        assert 0 < 4 * rows["fp16"][figure] < rows["bf16"][figure]
        assert 0 < rows["TF32, emulated"][figure] < rows["bf16"][figure]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_emulated_fp16_is_as_far_from_float32_as_fp16(unit_model: Build, golden: dict[str, Tensor]) -> None:
    model = unit_model("default").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = golden["x"], golden["t"], golden["y"]
    full, emulated, half = (
        study.in_precision(model, n)(*inputs).float() for n in ("float32", "fp16, emulated", "fp16")
    )
    torch.testing.assert_close(full, golden["forward.default"], atol=1e-4, rtol=0)
    errors = [study.latent_drift(out, full)["error"] for out in (emulated, half)]
    assert 0.5 < errors[0] / errors[1] < 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_drift_in_closed_form() -> None:
    reference = torch.tensor([3.0, 4.0, 0.0, 1.0]).view(2, 2, 1, 1)
    latents = reference + torch.tensor([0.0, 0.5, 0.0, 0.3]).view(2, 2, 1, 1)
    drift = study.latent_drift(latents, reference)  # 0.5 of 5, 0.3 of 1
    assert (drift["error"], drift["worst"]) == (pytest.approx(0.2), pytest.approx(0.3))
    pixels = torch.tensor([0, 1, 2, 3, 5, 10, 255, 0], dtype=torch.uint8)
    zeros = torch.zeros(8, dtype=torch.uint8)
    assert study.pixel_drift(pixels, zeros) == {"changed": {"1": 5 / 8, "2": 4 / 8, "4": 3 / 8}}
    assert study.pixel_drift(zeros, pixels) == study.pixel_drift(pixels, zeros)


def test_seeded_weights_pass_signals_on_and_are_the_same_again() -> None:
    networks = [study.seed_weights(LightningDiT(**SMALL)) for _ in range(2)]
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, networks[1].state_dict()[name])
    torch.testing.assert_close(networks[0].pos_embed, LightningDiT(**SMALL).pos_embed, atol=0, rtol=0)
    assert float(networks[0].blocks[0].attn.qkv.weight.std()) == pytest.approx(0.7 / 64**0.5, rel=0.05)
    x = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    assert 0.1 < float(networks[0](x, torch.tensor([0.5]), torch.arange(4)).std()) < 10


def test_bf16_drifts_more_than_fp16_and_guidance_acts() -> None:
    network = study.seed_weights(LightningDiT(**SMALL))
    rows = {row["precision"]: row for row in study.seeded_drift(network)}
    assert set(rows) == {"TF32, emulated", "bf16", "fp16, emulated"}
    for figure in ("velocity", "error", "worst"):
        assert 2 < rows["bf16"][figure] / rows["fp16, emulated"][figure] < 32  # 8 bits of mantissa against 11
        assert 0 < rows["TF32, emulated"][figure] < rows["fp16, emulated"][figure]  # 11 bits too, and float32 between
    noise, labels = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    guided, plain = (study.follow(network, noise, labels, GuidanceSettings(scale))[0] for scale in (6.7, 1.0))
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:], atol=1e-5, rtol=1e-5)
    assert (guided[:, :3] - plain[:, :3]).abs().max() > 0.1


def test_a_copy_in_another_precision_leaves_the_pipeline_as_it_is() -> None:
    pipe = study.full_pipeline(str(BUNDLED))
    pipe.guide = copy.deepcopy(pipe.transformer)
    other = study.pipeline_in(pipe, "bf16")
    assert (pipe.dtype, other.dtype) == (torch.float32, torch.bfloat16)
    assert {value.dtype for value in pipe.transformer.parameters()} == {torch.float32}
    assert {value.dtype for value in other.guide.parameters()} == {torch.bfloat16}
    assert other.tokenizer is pipe.tokenizer


def test_a_study_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", grey_images(20).numpy())
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20) % 10)
    argv = ["--data-root", str(tmp_path), "--model", str(BUNDLED), "--output", str(tmp_path), "--count", "20"]
    assert study.main([*argv, "--noises", "1", "--part", "kernels"]) == 0
    assert study.main([*argv, "--part", "bundled"]) == 0
    kept = json.loads((tmp_path / "precision" / "study.json").read_text())
    full, bf16, fp16 = kept["bundled"]["rows"]
    assert (full["error"], full["worst"], set(full["changed"].values())) == (0.0, 0.0, {0.0})
    assert 0.05 > bf16["error"] > 2 * fp16["error"] > 0
    assert bf16["changed"]["1"] > bf16["changed"]["4"]
    assert abs(bf16["frechet"] - full["frechet"]) < 0.1 * full["frechet"]
    assert full["accuracy"] == 1.0 and fp16["accuracy"] == 1.0
    emulated, real = kept["kernels"]["rows"]
    assert 0.25 < emulated["error"] / real["error"] < 4
    text = (tmp_path / "precision.md").read_text(encoding="utf-8")
    assert text.index("The bundled model") < text.index("Emulated fp16 and torch")
    assert "| bf16 |" in capsys.readouterr().out


def test_each_solver_is_compared_with_itself(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"sampling_method": "euler", "num_sampling_steps": 2}
    monkeypatch.setattr(study, "SOLVERS", {"short": few, "long": {**few, "num_sampling_steps": 5}})
    argv = ["--model", str(tiny_folder), "--output", str(tmp_path), "--noises", "2", "--part", "solvers"]
    assert study.main(argv) == 0
    short, long = json.loads((tmp_path / "precision" / "study.json").read_text())["solvers"]["rows"]
    assert (short["evaluations"], long["evaluations"]) == (1, 4)
    for row in (short, long):
        assert 0.05 > row["errors"]["bf16"] > row["errors"]["fp16, emulated"] > 0


def test_tables_hold_the_figures() -> None:
    start = "| bf16 | 1.690% | 2.600% | 4.600% | 1.400% | 0.278% |"
    assert f"{start} 1.062 | 96.12% |" in study.PARTS["bundled"][1](STUDY["bundled"])
    assert start in study.PARTS["kernels"][1](STUDY["kernels"])
    assert "| euler, 50 points | 49 | 0.410% | 0.050% |" in study.PARTS["solvers"][1](STUDY["solvers"])
    assert "| bundled | 4 | fp16 | 0.0123 | 0.457 | 0.100% | 0.000% |" in study.PARTS["decode"][1](STUDY["decode"])
    lines = study.PARTS["b1"][1](STUDY["b1"])
    assert "guidance 6.7 from t = 0.125 on 3 channels, 10 evaluations of `ab3`" in lines[0]
    assert lines[2:] == [
        "| precision | one evaluation | latents: mean error | worst image |",
        "|---|--:|--:|--:|",
        "| bf16 | 0.680% | 0.250% | 0.300% |",
        "",
    ]


@pytest.mark.parametrize("option", [["--noises", "0"], ["--part", "all"]])
def test_bad_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        study.main(option)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_the_page_shows_what_the_last_study_measured() -> None:
    figures = json.loads((PROJECT / "docs" / "precision" / "study.json").read_text())
    page = (PROJECT / "docs" / "precision.md").read_text(encoding="utf-8")
    for part, (_, table) in study.PARTS.items():
        for line in table(figures[part]):
            assert line in page
