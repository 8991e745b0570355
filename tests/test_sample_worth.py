"""What samples are worth: seen as asked, copies, utility with its error over passes; and looks at a training's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from LightningDiT import train
from LightningDiT.checkpoint import inspect, load_weights, save_weights
from LightningDiT.config import load_config
from LightningDiT.data.labels import Labels
from LightningDiT.distributed import Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import make_model, model_settings
from LightningDiT.metrics import sample_worth
from LightningDiT.metrics.copies import copy_rates
from LightningDiT.metrics.sample_worth import SampleJudge, share_and_error
from LightningDiT.metrics.window_judge import quick_accuracy, train_judge
from LightningDiT.models import lightningdit
from LightningDiT.radar.level_images import Windows, load_windows
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.training import judged_samples
from LightningDiT.training.choice import CHOSEN
from LightningDiT.training.curves import LiveCurves, read_log
from LightningDiT.training.judged_samples import JudgedSamples, Looks, class_numbers, drawn_conditions, windows_of
from tests.test_window_judge import walkers
from tests.walkers import prepared, render

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_worth, "train_judge", lambda *args, seed: train_judge(*args, steps=15, seed=seed))
    monkeypatch.setattr(LiveCurves, "_draw", lambda self: None)


def windows(pixels: Tensor, people: Tensor, conditions: Sequence[str] | None = None) -> Windows:
    count = len(people)
    numbers = torch.arange(count) % len(conditions or [0])
    names = tuple(f"ID_{number}" for number in range(int(people.max()) + 1))
    told = tuple(conditions) if conditions else None
    return Windows(pixels, people, numbers, torch.arange(count) // 6, torch.arange(count), names, told, None)


def reversed_in_time(pixels: Tensor) -> Tensor:
    return pixels.flip(-1)


def test_the_three_numbers_are_those_of_their_parts() -> None:
    training, validation = windows(*walkers(6, 0)), windows(*walkers(4, 1))
    judge = SampleJudge(training, validation, 3, reversed_in_time, CPU)
    samples, asked = walkers(5, 2)
    asked = asked.clone()
    asked[0] = 2  # one of 15 shows another than was asked for
    worth = judge.worth(samples, asked)
    assert worth.judge_accuracy == pytest.approx(14 / 15)
    assert worth.copies == copy_rates(samples, reversed_in_time(validation.pixels), training.pixels)
    assert worth.utility == quick_accuracy(samples, asked, validation.pixels, validation.people)
    assert worth.row()["copies_real"] == worth.copies.held_out
    assert judge.real_accuracy == 1.0
    assert judge.real_utility == quick_accuracy(training.pixels, training.people, validation.pixels, validation.people)
    copied = judge.worth(training.pixels.roll(3, -1), training.people)
    assert (copied.copies.samples, copied.copies.passes) == (1.0, False)


def test_the_error_counts_passes_not_windows() -> None:
    right = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    share, error = share_and_error(right, torch.tensor([7, 7, 7, 7, 3, 3, 3, 3]))
    assert share == 0.5
    assert error == pytest.approx(0.5)  # two passes, wholly right and wholly wrong: sqrt(2 / 1 (2^2 + 2^2)) / 8
    single = share_and_error(right, torch.arange(8))[1]
    assert single == pytest.approx(float(right.double().std()) / math.sqrt(8))  # each alone: the usual error of a mean
    assert math.isnan(share_and_error(right, torch.zeros(8))[1])


def test_people_are_matched_by_name_and_only_those_with_training_windows() -> None:
    split = windows(*walkers(2, 0))
    split = replace(split, people=torch.where(split.people != 1, split.people, 0))  # nobody trains for ID_1
    assert class_numbers(Labels(3, ("ID_2", "ID_9", "ID_0")), split) == {0: 2, 2: 0}
    assert class_numbers(Labels(3), split) == {0: 0, 2: 2}
    with pytest.raises(LightningDiTError, match="does not know: ID_2"):
        class_numbers(Labels(3, ("ID_0", "ID_1", "ID_3")), split)
    with pytest.raises(LightningDiTError, match="does not know: ID_2"):
        class_numbers(Labels(2), split)


def test_conditions_are_drawn_as_the_persons_training_windows_have_them() -> None:
    pixels, people = walkers(20, 0)
    split = windows(pixels, people, ("Bag", "Normal"))
    split = replace(split, conditions=(people == 1).long() + (people == 2) * (torch.arange(60) < 15))
    asked = torch.tensor([0, 1, 2]).repeat(40)
    found = drawn_conditions(Labels(2, ("Normal", "Bag"), kind="condition"), split, asked, 0)
    assert found is not None
    by_person = [
        [name for name, person in zip(found, asked.tolist(), strict=True) if person == who] for who in range(3)
    ]
    assert (set(by_person[0]), set(by_person[1])) == ({"Bag"}, {"Normal"})
    assert 5 <= by_person[2].count("Normal") <= 18  # 5 of 20 windows expected: 10 of 40 draws
    assert found == drawn_conditions(Labels(2, ("Normal", "Bag"), kind="condition"), split, asked, 0)
    assert drawn_conditions(Labels(2, kind="condition"), split, asked[:2], 0) == [0, 1]  # numbers without names
    assert drawn_conditions(None, split, asked, 0) is None


# ---- in a training

TRAINING = """
train: {{max_steps: 4, global_batch_size: 4, output_dir: runs, log_every: 2, ckpt_every: 2, judge_every: 2,
  judge_samples: 3{more}}}
"""


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walkers")
    name = "Bag_line/ID_{person}/ID{person}_case2_1_Doppler{number}.jpg"
    render(root / "data", {"1": [3, 3, 3], "2": [3, 3, 3]}, name=name)
    name = name.replace("Bag", "Normal").replace("case2", "case1")
    return prepared(root, {"1": [3, 3, 3], "2": [4, 3, 3], "3": [4]}, name=name)


@pytest.fixture
def walking(tiny_folder: Path, levels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of a training with looks, on latents of the training windows of three people."""
    from LightningDiT.extract_features import main

    monkeypatch.setitem(lightningdit.PRESETS, "XXS", (2, 16, 2))
    split = levels / "out" / "split.json"
    places = f"levels_path: {levels / 'levels'}, split_file: {split}"
    data = f"{{data_path: latents, {places}, image_size: 16, num_classes: 3, num_conditions: 2}}"
    text = "\n".join(
        f"data: {data}" if line.startswith("data:") else line
        for line in (tiny_folder / "config.yaml").read_text().splitlines()
    )
    text = text.replace("XS/2", "XXS/2").replace("cfg_scale: 2.0", "cfg_scale: 1.5")
    (tiny_folder / "config.yaml").write_text(text + TRAINING.format(more=""))
    options = ("--levels", levels / "levels", "--split-file", split, "--output", tiny_folder / "latents")
    assert main(["--config", str(tiny_folder / "config.yaml"), *map(str, options)]) == 0
    return tiny_folder / "config.yaml"


def test_a_training_logs_what_its_samples_are_worth(walking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(walking)]) == 0
    out = capsys.readouterr().out
    folder = walking.parent / "runs" / "lightningdit"
    rows = read_log(folder / "log.jsonl")
    assert [row["step"] for row in rows if "utility" in row] == [2, 4]
    looks = json.loads((folder / "choice.json").read_text())["looks"]
    for row, look in zip(rows, looks, strict=True):
        for name in ("judge_accuracy", "copies", "copies_real", "utility"):
            assert row[name] == pytest.approx(look[name], abs=1e-6)
    assert "looks: 9 samples of 3 classes, beside " in out
    # against samples of the last weights by the pipeline of inference
    config = load_config(walking)
    last = replace(config, ckpt_path=str(folder / "last.safetensors"))
    sample = replace(config.sample, sampling_method="fast")
    pipe = LightningDiTPipeline.from_config(replace(last, sample=sample))
    judged = JudgedSamples(config, pipe, 3)
    assert judged.worth(pipe).row() == {name: looks[1][name] for name in judged.worth(pipe).row()}
    assert judged.worth(pipe, draw=1) != judged.worth(pipe)
    assert load_weights(folder / "transformer.safetensors").keys() == load_weights(folder / "last.safetensors").keys()


def test_the_chosen_part_of_a_network_is_an_adapter(walking: Path) -> None:
    network = make_model(model_settings(load_config(walking)))
    save_weights(network.state_dict(), walking.with_name("there.safetensors"))
    more = "weight_init: there.safetensors, trainable: bias, judge_samples"
    walking.write_text(walking.read_text().replace("judge_samples", more))
    assert train.main(["--config", str(walking)]) == 0
    folder = walking.parent / "runs" / "lightningdit"
    chosen, last = (inspect(folder / name) for name in ("adapter.safetensors", "last.safetensors"))
    assert chosen.shapes == last.shapes
    assert "blocks.0.attn.qkv.weight" not in chosen.shapes
    assert chosen.metadata == last.metadata | {CHOSEN: chosen.metadata[CHOSEN]}
    assert json.loads(chosen.metadata[CHOSEN])["step"] == json.loads((folder / "choice.json").read_text())["chosen"]


def test_looks_change_nothing_of_the_training(walking: Path) -> None:
    weights = []
    for every, name in ((2, "last.safetensors"), (0, "transformer.safetensors")):
        path, folder = walking.with_name(f"{every}.yaml"), walking.parent / f"every-{every}"
        path.write_text(walking.read_text().replace("judge_every: 2", f"judge_every: {every}"))
        assert train.main(["--config", str(path), "--output", str(folder)]) == 0
        weights.append(load_weights(folder / name))
        assert (folder / "choice.json").exists() is bool(every)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_samples_that_are_not_finite_are_no_look(
    walking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worth(self: JudgedSamples, pipe: LightningDiTPipeline) -> object:
        raise LightningDiTError("sampling gave values that are not finite", "lower it")

    monkeypatch.setattr(judged_samples.JudgedSamples, "worth", worth)
    assert train.main(["--config", str(walking)]) == 0
    out = capsys.readouterr().out
    assert "note: no look at step 2: sampling gave values that are not finite" in out
    assert "no look had a utility, so the last weights are kept" in out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("levels_path: [^,]*,", "", "data.levels_path is not set"),
        ("model_name: tokenizer.yaml", "model_name: unnamed.yaml", "no tokenizer draws the samples"),
    ],
)
def test_what_looks_need_is_said(before: str, after: str, said: str, walking: Path) -> None:
    tokenizer = walking.with_name("tokenizer.yaml").read_text()
    walking.with_name("unnamed.yaml").write_text(tokenizer.replace("ckpt_path: tokenizer.safetensors", ""))
    walking.write_text(re.sub(before, after, walking.read_text()))
    with pytest.raises(LightningDiTError, match=said):
        train.main(["--config", str(walking)])


def test_a_dry_run_reads_the_windows(walking: Path) -> None:
    assert train.main(["--config", str(walking), "--dry-run"]) == 0
    walking.write_text(re.sub("split_file: [^,]*,", "", walking.read_text()))
    with pytest.raises(LightningDiTError, match=r"data\.split_file is not set"):
        train.main(["--config", str(walking), "--dry-run"])


def test_windows_of_another_size_are_refused(levels: Path, walking: Path) -> None:
    config = load_config(walking)
    assert torch.equal(
        windows_of(config, "validation").rows,
        load_windows(levels / "levels", levels / "out" / "split.json", "validation").rows,
    )
    with pytest.raises(LightningDiTError, match="have 16x16 pixels, samples have 32x32"):
        windows_of(replace(config, data=replace(config.data, image_size=32)), "training")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("judge_samples", "label_dropout: 0.0, judge_samples", "train.label_dropout 0 never trains the null class"),
        (
            "judge_samples",
            "weight_init: there.safetensors, label_dropout: 0.0, judge_samples",
            "training never reached the null class of .*there.safetensors",
        ),
        ("cfg_scale", "guide_ckpt: guide.safetensors, cfg_scale", "that of sample.guide_ckpt is not used"),
        ("judge_samples", "label_dropout: 0.1, judge_samples", ""),
    ],
)
def test_guidance_that_means_nothing_is_left_out_of_looks(
    before: str, after: str, said: str, walking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = make_model(model_settings(load_config(walking)))
    save_weights(network.state_dict(), walking.with_name("there.safetensors"), {"null_trained": "false"})
    walking.write_text(walking.read_text().replace(before, after))
    assert train.main(["--config", str(walking), "--max-steps", "1"]) == 0
    notes = re.findall(f"looks sample without guidance: {said}", capsys.readouterr().out)
    assert len(notes) == bool(said)


def test_all_processes_learn_the_numbers_that_the_main_one_measures(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(Processes):
        def from_main(self, action: Callable[[], object]) -> object:
            return {"utility": 0.5}

    def make() -> tuple[JudgedSamples, LightningDiTPipeline]:
        raise AssertionError("only the main process reads windows and trains a judge")

    assert Looks(make, Other(rank=1, count=2)).observe(3) == {"utility": 0.5}
    assert capsys.readouterr().out == ""
