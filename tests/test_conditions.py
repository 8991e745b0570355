"""Sampling with a second label: from names to the states that a network sees, in every batch and run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from LightningDiT import inference
from LightningDiT.checkpoint import save_weights
from LightningDiT.compiling import Plan
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.data.labels import Labels
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import make_model, model_settings
from LightningDiT.sampling import networks
from LightningDiT.sampling.pipeline import LightningDiTPipeline, captions_of
from LightningDiT.sampling.resumable_run import sample_run
from tests.conftest import TINY_CONFIG, seed_weights
from tests.test_networks import GPU, Replay
from tests.test_pipeline import edit

NAMES = ("Normal", "Backpack", "Bag")


def write_model(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a small model of three classes and three conditions beside the small tokenizer; return its settings."""
    file = folder / "config.yaml"
    file.write_text(TINY_CONFIG.replace("num_classes: 3,", "num_classes: 3, num_conditions: 3,"))
    model = seed_weights(make_model(model_settings(load_config(file))))
    save_weights(
        model.state_dict(),
        folder / "transformer.safetensors",
        {"condition_names": json.dumps(NAMES)} if metadata is None else metadata,
    )
    return file


@pytest.fixture
def conditional(tiny_folder: Path) -> Path:
    return write_model(tiny_folder)


def latents(pipe: LightningDiTPipeline, *labels: object, **call: object) -> Tensor:
    return pipe(*labels, output_type="latent", **call).images


def test_guidance_goes_from_both_null_labels_to_both_labels(conditional: Path) -> None:
    """Every step written out, against the call."""
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    state, labels, null = noise, torch.tensor([[0, 2], [2, 1]]), torch.tensor([[3, 3], [3, 3]])
    with torch.no_grad():
        for start, end in itertools.pairwise(torch.linspace(0, 1, 4)):
            weak = pipe.transformer(state, start.expand(2), null)
            state = state + (end - start) * (weak + 2.0 * (pipe.transformer(state, start.expand(2), labels) - weak))
    out = pipe([0, 2], latents=noise, conditions=["Bag", 1], output_type="latent")
    torch.testing.assert_close(out.images, state, atol=1e-5, rtol=1e-5)
    assert out.conditions == [2, 1]


def test_an_image_with_a_condition_depends_on_no_batch(conditional: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits padded and by graphs, and the same image alone."""
    monkeypatch.setattr(networks, "Recording", Replay)
    monkeypatch.setattr(networks, "abilities", lambda device: GPU)
    Replay.made, Replay.most, Replay.failure = [], 2**20, staticmethod(lambda: None)
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    together = latents(pipe, [0, 1, 2], conditions=[2, None, 1], seed=7, batch_size=3)
    with pipe.settled(Plan(graphs=True, batch=4), "the test"):
        padded = latents(pipe, [0, 1, 2], conditions=[2, None, 1], seed=7, batch_size=4)
    torch.testing.assert_close(padded, together, atol=1e-5, rtol=1e-5)
    assert Replay.made
    alone = latents(pipe, [2], conditions=1, seed=7, indices=[2])
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=1e-5)
    other = latents(pipe, [2], conditions=0, seed=7, indices=[2])
    assert (other[0] - together[2]).abs().max() > 1e-2


def test_no_condition_is_said_once(conditional: Path) -> None:
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    with pytest.warns(UserWarning, match="images have none of 0 Normal; 1 Backpack; 2 Bag"):
        without = latents(pipe, [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = latents(pipe.with_sample(pipe.config.sample), [0, 1])
        named = latents(pipe, [0, 1], conditions=[None, None])
    assert torch.equal(without, again) and torch.equal(without, named)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ("Bog", "condition 'Bog' is unknown; near to it: Bag"),
        (3, "condition 3 is out of range; 0 to 2 are expected"),
        ([0, 1, 2], "3 conditions are given for 2 images; fix: give one for each image, or one for all"),
    ],
)
def test_wrong_conditions_are_named(conditions: object, message: str, conditional: Path) -> None:
    with pytest.raises(LightningDiTError, match=message):
        LightningDiTPipeline.from_config(conditional, "cpu")([0, 1], conditions=conditions)


def test_a_model_without_conditions_takes_none(tiny_folder: Path) -> None:
    pipe = LightningDiTPipeline.from_config(tiny_folder / "config.yaml", "cpu")
    assert pipe.conditions is None and pipe([0], num_inference_steps=2).conditions is None
    with pytest.raises(LightningDiTError, match="conditions are given, and the model has none; fix: leave them out"):
        pipe([0], conditions=[1])


def test_names_are_checked_and_kept(conditional: Path, tmp_path: Path) -> None:
    config = load_config(conditional)
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, condition_names=("Normal", "Bag", "Box")))
    with pytest.raises(LightningDiTError, match="condition 1 is 'Bag' in data.condition_names .* 'Backpack' in the"):
        Labels.conditions_of(named)
    (conditional.parent / "manifest.json").write_text(json.dumps({"condition_names": ["Normal", "Backpack"]}))
    with pytest.raises(LightningDiTError, match="manifest.json has 2 conditions, the model .* has 3; fix: choose what"):
        Labels.conditions_of(config)
    (conditional.parent / "manifest.json").unlink()
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    pipe.save_pretrained(tmp_path / "saved")
    again = LightningDiTPipeline.from_pretrained(tmp_path / "saved", "cpu")
    assert again.conditions == pipe.conditions == Labels(3, NAMES, kind="condition")
    ours, theirs = (latents(one, [1], conditions="Bag") for one in (pipe, again))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    with pytest.raises(LightningDiTError, match="condition_names has 1 names, data.num_conditions is 3; fix: set"):
        load_config(edit(conditional.parent, "num_conditions: 3", "num_conditions: 3, condition_names: [Normal]"))


def test_captions_name_class_and_condition(conditional: Path) -> None:
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    assert captions_of(pipe, [0, 2, 1], [2, None, 0]) == ["cat, Bag", "sea lion", "dog, Normal"]
    assert captions_of(pipe, [0], None) == ["cat"]


# ---- runs


def sample(file: Path, *arguments: str) -> int:
    command = ["--config", str(file), "--output", str(file.parent / "out"), *arguments]
    return run_main(lambda: inference.main(command))


def test_conditions_of_a_run_take_turns_by_rounds_of_the_classes(
    conditional: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--classes", "0", "2", "--conditions", "Bag", "none", "--num-samples", "5"]
    assert sample(conditional, *given) == 0
    assert "conditions     2 Bag; none" in capsys.readouterr().out
    content = json.loads((conditional.parent / "out" / "manifest.json").read_text())
    assert content["labels"] == [0, 2, 0, 2, 0]
    assert content["conditions"] == [2, 2, None, None, 2]
    assert content["condition_names"] == list(NAMES)
    assert sample(conditional, "--classes", "0", "2", "--conditions", "Bag", "--num-samples", "5") == 1
    assert "conditions[2]: null there, 2 now" in capsys.readouterr().err


def test_a_stopped_run_gives_the_bytes_of_a_whole_one(conditional: Path, tmp_path: Path) -> None:
    pipe = LightningDiTPipeline.from_config(conditional, "cpu")
    labels, conditions = [0, 1, 2, 0], [0, None, 1, 2]
    whole, parts = (
        sample_run(pipe, labels, 3, tmp_path / name, minutes, conditions=conditions)
        for name, minutes in (("whole", None), ("parts", 1e-9))
    )
    assert whole.made == 4 and parts.made == 2
    sample_run(pipe, labels, 3, tmp_path / "parts", None, conditions=conditions)
    for path in whole.paths:
        assert path is not None and (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    first = pipe([1], seed=3, indices=[1], conditions=[None], output_type="np").images[0]
    shown = np.asarray(Image.open(tmp_path / "whole" / "000001.png")).astype(int)
    assert np.abs(shown - first).max() <= 1


def test_each_batch_of_a_run_takes_the_conditions_of_its_own_images(conditional: Path, tmp_path: Path) -> None:
    """Batches of two, two and one image, beside each image sampled alone."""
    pipe, chosen = LightningDiTPipeline.from_config(conditional, "cpu"), [0, 1, 2, None, 1]
    run = sample_run(pipe, [0] * 5, 3, tmp_path / "run", None, conditions=chosen)
    for index, path in enumerate(run.paths):
        alone = pipe([0], seed=3, indices=[index], conditions=[chosen[index]], output_type="np").images[0]
        assert np.abs(np.asarray(Image.open(path)).astype(int) - alone).max() <= 1, index


def test_a_grid_has_every_class_under_every_condition(conditional: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(conditional, "--demo", "--classes", "0", "1", "--conditions", "all") == 0
    said = capsys.readouterr().out
    assert "6 of 6 images" in said and "conditions     0 Normal; 1 Backpack; 2 Bag" in said
    (run,) = (conditional.parent / "out").glob("run-*/manifest.json")
    content = json.loads(run.read_text())
    assert list(zip(content["labels"], content["conditions"], strict=True)) == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
    ]  # fmt: skip
    assert sample(conditional, "--demo", "--dry-run") == 0
    assert "conditions     none; --conditions chooses of 0 Normal; 1 Backpack; 2 Bag" in capsys.readouterr().out
    assert sample(conditional, "--demo", "--conditions", "Bog", "--dry-run") == 1
    assert "condition 'Bog' is unknown" in capsys.readouterr().err


def test_a_file_says_class_and_condition_of_each_image(conditional: Path, tmp_path: Path) -> None:
    """The images are those of a call with the same labels; other tables are one line."""
    listed = tmp_path / "labels.csv"
    listed.write_text("class,condition\n2,Bag\n0,none\n2,Normal\n")
    options = ["--config", str(conditional), "--labels", str(listed), "--output", str(tmp_path / "run")]
    assert run_main(lambda: inference.main([*options, "--by-class", "--batch-size", "3"])) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["labels"], manifest["conditions"]) == ([2, 0, 2], [2, None, 0])
    pipe = LightningDiTPipeline.from_config(conditional)
    expected = sample_run(pipe, [2, 0, 2], 0, tmp_path / "other", None, by_class=True, conditions=[2, None, 0])
    for path in filter(None, expected.paths):
        found = tmp_path / "run" / path.relative_to(tmp_path / "other")
        assert np.array_equal(np.asarray(Image.open(found)), np.asarray(Image.open(path)))
    assert run_main(lambda: inference.main([*options, "--dry-run"])) == 0
    for text in ("label\n1\n", "class,condition\n1\n", "class,condition\n1,Bag,2\n", "class\n", "class\n7\n"):
        listed.write_text(text)
        assert run_main(lambda: inference.main([*options, "--dry-run"])) == 1, text
    with pytest.raises(SystemExit):
        inference.parse([*options, "--classes", "1"])
