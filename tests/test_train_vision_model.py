"""The vision model of our own: what it is trained on is what the alignment shows it, and its file is one of timm's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import inspect
from LightningDiT.console import run_main
from LightningDiT.tokenizer.vision import VisionModel, create_model
from studies import train_vision_model
from tests.test_evaluate_bundled import write_photographs

MODEL, SIDE = "test_efficientnet", 64


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("fashion"), 130)


@pytest.fixture(scope="module")
def trained(data_root: Path) -> Path:
    path = data_root / "vision.safetensors"
    arguments = ["--data-root", str(data_root), "--output", str(path), "--model", MODEL, "--size", str(SIDE)]
    assert run_main(lambda: train_vision_model.main([*arguments, "--epochs", "1"])) == 0
    return path


def test_the_alignment_shows_what_it_was_trained_on() -> None:
    classifier = train_vision_model.create_classifier(MODEL, SIDE)
    vision = VisionModel(classifier.model, grid=2)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert vision.side == SIDE
    seen: list[torch.Tensor] = []
    classifier.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        classifier(images)
    torch.testing.assert_close(vision.preprocess(images), seen[0])


def test_the_file_is_one_that_a_tokenizer_can_name(trained: Path) -> None:
    metadata = inspect(trained).metadata
    assert (metadata["model"], metadata["size"], metadata["epochs"]) == (MODEL, str(SIDE), "1")
    assert 0 <= float(metadata["test_accuracy"]) <= 1
    vision = VisionModel(create_model(MODEL, trained), grid=2)
    assert vision(torch.zeros(2, 3, 32, 32)).shape == (2, vision.width, 2, 2)
    fresh = train_vision_model.create_classifier(MODEL, SIDE).model.state_dict()
    assert not torch.equal(vision.model.state_dict()["conv_stem.weight"], fresh["conv_stem.weight"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "no_such"], "knows no model 'no_such'; fix: give --model a name of timm.list_models()"),
        (["--model", "test_vit", "--size", "72"], "timm's test_vit does not take 72 pixels"),
    ],
)
def test_what_timm_has_not_is_one_line(
    options: list[str], reason: str, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--data-root", str(data_root), "--output", str(tmp_path / "v.safetensors"), *options]
    assert run_main(lambda: train_vision_model.main(arguments)) == 1
    errors = capsys.readouterr().err
    assert reason in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "v.safetensors").exists()
