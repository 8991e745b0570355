"""The sweep of guidance: what is recommended and why, and that it resumes, refuses and says how long it takes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import SampleConfig, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import make_model, model_settings
from LightningDiT.metrics import sample_worth
from LightningDiT.metrics.copies import CopyRates
from LightningDiT.metrics.sample_worth import Worth
from LightningDiT.metrics.window_judge import train_judge
from LightningDiT.models import lightningdit
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tools import sweep_guidance
from LightningDiT.tools.sweep_guidance import Result, Setting, cost_of, main, recommended, sample_of, settings_of
from LightningDiT.training.judged_samples import JudgedSamples
from tests.conftest import seed_weights
from tests.walkers import prepared


def result(scale: float, start: float, utility: float, copies: float = 0.05, error: float = 0.04) -> Result:
    return Result(scale, start, utility, error, 0.9, copies, 0.06)


@pytest.mark.parametrize(
    ("results", "scale", "start"),
    [
        ([result(1, 0, 0.55), result(1.5, 0, 0.67), result(2, 0, 0.70)], 1.5, 0),
        ([result(1, 0, 0.66), result(1.5, 0, 0.67), result(2, 0, 0.70)], 1, 0),  # just one error below
        ([result(1, 0, 0.66), result(2, 0, 0.70, error=0.02)], 2, 0),
        ([result(1, 0, 0.66), result(1.5, 0, 0.60, error=0.2), result(2, 0, 0.70, error=0.02)], 2, 0),  # the best's
        ([result(1.5, 0, 0.68), result(1.5, 0.3, 0.69), result(1.5, 0.1, 0.61), result(2, 0, 0.70)], 1.5, 0.3),
        ([result(1, 0, 0.40), result(1.5, 0, 0.50), result(3, 0, 0.90, copies=0.13)], 1.5, 0),
        ([result(1, 0, 0.40, 0.3), result(1.5, 0, 0.50, 0.2), result(2, 0, 0.6, 0.2)], 2, 0),  # all copy
    ],
)
def test_the_smallest_scale_within_one_error_of_the_best_without_copies(
    results: list[Result], scale: float, start: float
) -> None:
    for order in (results, results[::-1]):
        advice = recommended(order)
        assert (advice.result.scale, advice.result.start) == (scale, start)
        assert f"cfg_scale: {scale:g}\n" in advice.text() + "\n"
        assert ("cfg_interval_start" in advice.text()) == (scale != 1)


def test_the_reason_says_what_was_left_out() -> None:
    assert "1 of 2 settings have too many copies" in recommended([result(1, 0, 0.4), result(2, 0, 0.9, 0.5)]).reason
    assert "the best (40.0% at 1 from t = 0)" in recommended([result(1, 0, 0.4), result(2, 0, 0.9, 0.5)]).reason
    assert "no setting has at most twice as many" in recommended([result(2, 0, 0.9, 0.5)]).reason


def test_without_guidance_there_is_one_setting() -> None:
    guided = [Setting(1.5, 0.0), Setting(1.5, 0.1), Setting(2.0, 0.0), Setting(2.0, 0.1)]
    assert settings_of([2.0, 1.0, 1.5, 2.0], [0.1, 0.0]) == [Setting(1.0, 0.0), *guided]
    assert settings_of([1.5, 2.0], [0.0, 0.1]) == guided


def test_settings_change_guidance_alone_and_its_cost_follows() -> None:
    usual = SampleConfig(cfg_interval_end=0.9, num_sampling_steps=7)
    sample = sample_of(usual, Setting(1.5, 0.3))
    assert (sample.cfg_scale, sample.cfg_interval_start, sample.num_sampling_steps) == (1.5, 0.3, 7)
    assert cost_of(sample) == pytest.approx(1.6)
    assert cost_of(usual) == 1
    for setting, said in ((Setting(1.5, 0.95), "after sample.cfg_interval_end"), (Setting(-1, 0), "--scales is -1")):
        with pytest.raises(LightningDiTError, match=said):
            sample_of(usual, setting)


def test_results_are_means_over_draws() -> None:
    worths = [Worth(0.5, CopyRates(0.1, 0.05, 0.3), 0.4, 0.02), Worth(0.7, CopyRates(0.2, 0.05, 0.3), 0.6, math.nan)]
    found = Result.of(Setting(2.0, 0.1), worths)
    assert found == Result(
        2.0, 0.1, pytest.approx(0.5), 0.01, pytest.approx(0.6), pytest.approx(0.15), pytest.approx(0.05)
    )
    assert found.cells() == ("2", "0.1", "50.0%", "1.0%", "60.0%", "15.0%", "5.0%")


# ---- as a command


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("walkers"), {"1": [3, 3, 3], "2": [3, 3, 3]})


@pytest.fixture
def config(tiny_folder: Path, levels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sample_worth, "train_judge", lambda *args, seed: train_judge(*args, steps=5, seed=seed))
    monkeypatch.setitem(lightningdit.PRESETS, "XXS", (2, 16, 2))
    places = f"levels_path: {levels / 'levels'}, split_file: {levels / 'out' / 'split.json'}"
    data = f"data: {{data_path: ., {places}, image_size: 16, num_classes: 2, class_names: [ID_2, ID_1]}}"
    path = tiny_folder / "config.yaml"
    path.write_text(re.sub("data: .*", data, path.read_text()).replace("XS/2", "XXS/2"))
    weights = seed_weights(make_model(model_settings(load_config(path)))).state_dict()
    save_weights(weights, tiny_folder / "transformer.safetensors")
    return path


def arguments(config: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--samples", "2", "--draws", "2", *more]


def test_a_sweep_is_what_the_pipeline_samples_and_resumes(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = arguments(config, "--scales", "1", "3", "--starts", "0", "0.25")
    real = JudgedSamples.worth

    def stopped(self: JudgedSamples, pipe: LightningDiTPipeline, draw: int = 0) -> Worth:
        if pipe.config.sample.cfg_interval_start == 0.25:
            raise KeyboardInterrupt
        return real(self, pipe, draw)

    monkeypatch.setattr(JudgedSamples, "worth", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(options)
    file = config.with_name("config-guidance.json")
    assert [entry["scale"] for entry in json.loads(file.read_text())["results"]] == [1, 3]
    taken = []
    monkeypatch.setattr(
        JudgedSamples,
        "worth",
        lambda self, pipe, draw=0: taken.append(pipe.config.sample) or real(self, pipe, draw),
    )
    assert main(options) == 0
    assert [(sample.cfg_scale, sample.cfg_interval_start) for sample in taken] == [(3, 0.25)] * 2
    content, out = json.loads(file.read_text()), capsys.readouterr().out
    assert "1 of 3 settings, 2 x 4 samples each by euler, 4 points, shift 0: about " in out
    assert content["recommended"]["reason"] in out
    pipe = LightningDiTPipeline.from_config(config)
    guided = pipe.with_sample(sample_of(pipe.config.sample, Setting(3.0, 0.25)))
    judged = JudgedSamples(load_config(config), pipe, 2)
    assert judged.classes == [1, 0, 1, 0]  # by name: the model counts ID_2 first
    images = guided(judged.classes * 2, output_type="pt").images.mean(1, keepdim=True).clamp(-1, 1)
    worths = [judged.judge.worth(part, torch.tensor([0, 1, 0, 1])) for part in images.split(4)]
    expected = Result.of(Setting(3.0, 0.25), worths)
    assert Result(**content["results"][2]) == expected


def test_a_dry_run_writes_nothing_and_says_how_long_it_takes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(config, "--dry-run")) == 0
    assert re.search(r"10 of 10 settings, 2 x 4 samples each .*: about \d+ s", capsys.readouterr().out)
    assert not config.with_name("config-guidance.json").exists()


def test_other_settings_and_foreign_files_are_refused(config: Path) -> None:
    file = config.with_name("here.json")
    options = arguments(config, "--scales", "1", "--output", str(file))
    assert main(options) == 0
    assert main([*options, "--scales", "1", "2", "--starts", "0"]) == 0  # more settings of the same sweep
    with pytest.raises(LightningDiTError, match="holds a sweep of other settings .seed: 0 there, 1 now"):
        main([*options, "--seed", "1"])
    file.write_text(json.dumps({"format": "sweep of guidance, 1"}))
    with pytest.raises(LightningDiTError, match="cannot be read"):
        main(options)
    results = {"scale": 1, "start": 0, "utility": 0, "error": 0, "judge_accuracy": 0, "copies": 0, "copies_real": 0}
    for changed, words in (({"scale": [1]}, "results: scale is .1.; float is"), ({"more": 1}, "unknown key 'more'")):
        file.write_text(json.dumps({"format": "sweep of guidance, 1", "settings": {}, "results": [results | changed]}))
        with pytest.raises(LightningDiTError, match=f"here.json cannot be read .*{words}.*; fix: choose another --out"):
            main(options)
    file.write_text("a letter")
    with pytest.raises(LightningDiTError):
        main(options)
    assert file.read_text() == "a letter"


def test_a_null_class_that_was_never_trained_allows_no_guidance(config: Path) -> None:
    file = config.with_name("transformer.safetensors")
    save_weights(load_weights(file), file, {"null_trained": "false"})
    with pytest.raises(LightningDiTError, match="never reached the null class"):
        main(arguments(config, "--scales", "1", "2"))
    assert main(arguments(config, "--scales", "1")) == 0
    assert sweep_guidance.is_sweep(config.with_name("config-guidance.json"))


def test_windows_are_needed(config: Path) -> None:
    config.write_text(re.sub("levels_path: [^,]*,", "", config.read_text()))
    with pytest.raises(LightningDiTError, match=r"data\.levels_path is not set"):
        main(arguments(config))
