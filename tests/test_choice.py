"""Which weights a run keeps: by each rule, after each stop, and on the way back to a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from LightningDiT.checkpoint import inspect, load_weights
from LightningDiT.config import Config, SampleConfig, TrainConfig
from LightningDiT.errors import LightningDiTError
from LightningDiT.training import loop
from LightningDiT.training.choice import CHOSEN, RULES, Choice, choice_of
from LightningDiT.training.curves import LiveCurves, draw
from LightningDiT.training.ema import Ema
from LightningDiT.training.guard import GuardSettings
from LightningDiT.training.loop import LoopSettings, Monitor, train
from LightningDiT.training.run_dir import RunDir

#: A run in small: it learns the walkers, gets better, copies, and its loss is best before it knows anybody.
LOOKS: dict[int, dict[str, float]] = {
    10: {"valid_loss": 0.80, "judge_accuracy": 0.13, "utility": 0.15, "copies": 0.01, "copies_real": 0.06},
    20: {"valid_loss": 0.85, "judge_accuracy": 0.60, "utility": 0.50, "copies": 0.04, "copies_real": 0.06},
    30: {"valid_loss": 0.90, "judge_accuracy": 0.80, "utility": 0.62, "copies": 0.12, "copies_real": 0.06},
    40: {"valid_loss": 0.95, "judge_accuracy": 0.85, "utility": 0.60, "copies": 0.08, "copies_real": 0.06},
    50: {"valid_loss": 1.40, "judge_accuracy": 0.97, "utility": 0.70, "copies": 0.53, "copies_real": 0.06},
}


def ema_at(value: float) -> Ema:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return Ema(module, 0.5)


def seen(rule: str, looks: Mapping[int, Mapping[str, float]], patience: int = 0) -> Choice:
    choice = Choice(rule, "test", patience)
    for step, look in looks.items():
        assert choice.see({"step": float(step), "loss": 1.0, **look}, ema_at(step))
    return choice


def changed(**looks: dict[str, float]) -> dict[int, dict[str, float]]:
    """Return `LOOKS` with other numbers; the keys are s10, s20, ..."""
    return {step: {**look, **looks.get(f"s{step}", {})} for step, look in LOOKS.items()}


def test_each_criterion_alone_chooses_another_step() -> None:
    assert max(LOOKS, key=lambda step: LOOKS[step]["judge_accuracy"]) == 50  # consistency chooses copies
    assert max(LOOKS, key=lambda step: LOOKS[step]["utility"]) == 50  # so does utility without the bound
    assert seen("valid_loss", LOOKS).best == 10  # knows nobody
    assert seen("utility", LOOKS).best == 30


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        (changed(s30={"copies": 0.1201}), 40),  # just above twice the held-out rate
        (changed(s50={"copies": 0.12}), 50),
        (changed(s50={"copies_real": 0.265}), 50),
        (changed(s20={"utility": 0.62}), 20),  # of equal utilities the one with fewer copies
        (changed(s40={"utility": 0.62, "copies": 0.12}), 30),  # equal in both: the first
        ({step: {**look, "copies": look["copies"] + 0.2} for step, look in LOOKS.items()}, 10),  # none passes
        ({step: {**look, "copies": 0.3} for step, look in LOOKS.items()}, 50),  # equally many: the best utility
        (changed(s10={"copies_real": 0.0}), 30),
        ({20: {**LOOKS[20], "copies": 0.1, "copies_real": 0.0}, 50: LOOKS[50]}, 20),  # a rate of 0 counts as 5 %
    ],
)
def test_the_best_utility_among_the_looks_with_few_copies(looks: dict[int, dict[str, float]], best: int) -> None:
    choice = seen("utility", looks)
    assert choice.best == best
    assert choice.weights["weight"].item() == best
    backwards = seen("utility", dict(sorted(looks.items(), reverse=True)))
    if best != 30:  # the order decides nothing but equal looks
        assert backwards.best == best


def test_weights_are_a_copy_of_the_average_of_their_step() -> None:
    ema, choice = ema_at(3.0), Choice("valid_loss", "test")
    choice.see({"step": 1.0, "valid_loss": 1.0}, ema)
    ema.weights["weight"].fill_(7.0)
    choice.see({"step": 2.0, "valid_loss": 1.5}, ema)
    assert (choice.best, choice.weights["weight"].item()) == (1, 3.0)


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_the_numbers_and_numbers_that_are_not_finite_are_no_looks(rule: str) -> None:
    choice = Choice(rule, "test", 1)
    assert not choice.see({"step": 5.0, "loss": 1.0}, ema_at(5))
    assert not choice.see({}, ema_at(5))
    for name in RULES[rule][0]:
        assert not choice.see({"step": 5.0, **LOOKS[10], name: math.nan}, ema_at(5))
    assert (choice.looks, choice.best, choice.has_ended) == ({}, None, False)


@pytest.mark.parametrize(("patience", "ends_at"), [(0, None), (1, 20), (2, 30), (4, 50), (5, None)])
def test_looks_without_a_better_one_end_the_run(patience: int, ends_at: int | None) -> None:
    choice, ended = Choice("valid_loss", "test", patience), None
    for step, look in LOOKS.items():
        choice.see({"step": float(step), **look}, ema_at(step))
        ended = ended or (step if choice.has_ended else None)
    assert ended == ends_at


def test_what_is_kept_is_said_with_the_reason() -> None:
    assert "step 10 are kept: lowest valid_loss 0.8" in seen("valid_loss", LOOKS).text()
    assert "step 30 are kept: best utility 62.0% (copies 12.0%, 6.0% of held-out" in seen("utility", LOOKS).text()
    none = seen("utility", {50: LOOKS[50]}).text()
    assert "of the fewest copies: no look has at most 2 times as many as held-out windows" in none
    assert "the last weights are kept" in Choice("utility", "test").text()


def test_the_rule_follows_from_the_settings() -> None:
    def rule(**train: Any) -> str | None:
        choice = choice_of(Config(train=TrainConfig(**train), source="c.yaml"))
        return choice and choice.rule

    assert rule() is None
    assert rule(valid_every=5) is None
    assert rule(judge_every=5) == "utility"
    assert rule(judge_every=5, choose="last") is None
    assert rule(judge_every=5, valid_every=5, choose="valid_loss") == "valid_loss"
    for choose, every in (("utility", "judge_every"), ("valid_loss", "valid_every")):
        with pytest.raises(LightningDiTError, match=f"train.choose is {choose}, and train.{every} is 0"):
            rule(choose=choose)


def test_looks_of_another_measure_do_not_count() -> None:
    def choice(**changes: Any) -> Choice:
        sample = SampleConfig(cfg_scale=changes.pop("scale", 1.0))
        made = choice_of(Config(train=TrainConfig(judge_every=5, valid_every=5, **changes), sample=sample))
        assert made is not None
        return made

    first = choice()
    first.see({"step": 5.0, **LOOKS[20]}, ema_at(5))
    state = first.state_dict()
    assert (choice().load_state_dict(state, first.weights), choice().best) == ("", None)
    for other in (choice(scale=2.0), choice(judge_samples=9), choice(choose="valid_loss")):
        assert "do not count" in other.load_state_dict(state, first.weights)
        assert (other.looks, other.best, other.weights) == ({}, None, {})
    patient = choice(patience=3)
    assert patient.load_state_dict(state, first.weights) == ""
    assert (patient.best, patient.looks) == (5, first.looks)
    state["weights"]["weight"].fill_(9)  # a checkpoint's tensors lie in its file
    assert patient.weights["weight"].item() == 5
    assert patient.load_state_dict({}, first.weights) == ""  # of a run that began without a choice
    assert patient.best is None


@pytest.mark.parametrize(
    "damage",
    [
        {"best": 7},
        {"best": "5"},
        {"looks": {"5": {"utility": 0.5}}},
        {"looks": {"five": {}}},
        {"weights": {}},
        {"weights": {"weight": torch.zeros(2, 1)}},
        {"kind": None},
    ],
)
def test_a_damaged_choice_in_a_checkpoint_is_refused(damage: dict[str, Any]) -> None:
    first = seen("utility", {5: LOOKS[20]})
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):  # which `restoring` makes one line
        Choice("utility", "test").load_state_dict(first.state_dict() | damage, first.weights)


# ---- in the loop


class Toy:
    """A trainer whose average is a number that counts its steps, times the learning rate's factor."""

    def __init__(self, spike: int | None = None) -> None:
        self.metadata, self.settings = {"class_names": '["a"]'}, {"toy": 1}
        self.rate_scale, self.learning_rate, self.spike = 1.0, 0.1, spike
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.ema = Ema(self.model, 0.0)

    def step(self, step: int) -> dict[str, float]:
        self.ema.weights["weight"] += self.rate_scale
        return {"loss": 100.0 if step == self.spike else 1.0}

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema.weights, "ema_steps": self.ema.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ema.load_state_dict({"weights": state["ema"], "steps": state["ema_steps"]})


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveCurves, "_draw", lambda self: None)  # each takes a second


def utilities(values: Mapping[int, float], killed_at: int | None = None) -> Monitor:
    """Return looks with these utilities at every second step; copies are none."""

    def observe(step: int) -> dict[str, float]:
        if step == killed_at:
            raise KilledError
        return {
            "utility": values[step],
            "copies": 0.0,
            "copies_real": 0.05,
        }

    return Monitor(2, observe)


def run(
    folder: Path,
    values: Mapping[int, float],
    steps: int = 12,
    patience: int = 0,
    killed_at: int | None = None,
    spike: int | None = None,
    ckpt_every: int = 4,
) -> Choice:
    toy, choice = Toy(spike), Choice("utility", "toy", patience)
    settings = LoopSettings(steps, 1, 100, ckpt_every, guard=GuardSettings(spike_factor=4.0))
    results = ("transformer.safetensors", "last.safetensors", "choice.json")
    place = RunDir(folder, regular=ckpt_every, results=results)
    train(toy, place, settings, results[0], monitors=[utilities(values, killed_at)], choice=choice)
    return choice


def kept(folder: Path) -> tuple[float, float]:
    """Return the number in the chosen and in the last weights."""
    files = [load_weights(folder / f"{name}.safetensors") for name in ("transformer", "last")]
    return files[0]["weight"].item(), files[1]["weight"].item()


RISE_AND_FALL = {2: 0.2, 4: 0.3, 6: 0.6, 8: 0.5, 10: 0.4, 12: 0.55}


def test_best_and_last_are_kept_with_all_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, RISE_AND_FALL)
    assert kept(tmp_path) == (6.0, 12.0)
    content = json.loads((tmp_path / "choice.json").read_text())
    assert (content["chosen"], content["rule"], content["ended_by_patience"]) == (6, "utility", False)
    assert [(look["step"], look["utility"]) for look in content["looks"]] == list(RISE_AND_FALL.items())
    assert "weights of step 6 are kept: best utility 60.0%" in capsys.readouterr().out.splitlines()[-1]
    metadata = inspect(tmp_path / "transformer.safetensors").metadata
    assert json.loads(metadata[CHOSEN]) == {"step": 6, "by": "utility"}
    assert metadata["class_names"] == inspect(tmp_path / "last.safetensors").metadata["class_names"] == '["a"]'
    assert CHOSEN not in inspect(tmp_path / "last.safetensors").metadata
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["utility"] for row in rows if "utility" in row] == list(RISE_AND_FALL.values())


def test_an_early_stop_is_said_saved_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, RISE_AND_FALL, patience=2)
    out = capsys.readouterr().out
    assert "step 10: 2 looks without a better one than that of step 6 end the run (train.patience)" in out
    assert kept(tmp_path) == (6.0, 10.0)
    assert json.loads((tmp_path / "choice.json").read_text())["ended_by_patience"]
    before = (tmp_path / "log.jsonl").read_text()
    run(tmp_path, RISE_AND_FALL, patience=2)  # the same command again trains no step
    assert (tmp_path / "log.jsonl").read_text() == before
    assert kept(tmp_path) == (6.0, 10.0)
    run(tmp_path, RISE_AND_FALL, patience=3)  # more patience goes on
    assert kept(tmp_path) == (6.0, 12.0)
    assert RunDir(tmp_path).checkpoints()[-1].name == "checkpoint-0000012.pt"


@pytest.mark.parametrize(("killed_at", "ckpt_every"), [(2, 4), (8, 4), (8, 5), (12, 5)])
def test_killed_at_a_look_it_goes_on_as_if_nothing_had_happened(
    killed_at: int, ckpt_every: int, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, RISE_AND_FALL, killed_at=killed_at, ckpt_every=ckpt_every)
    (tmp_path / "choice.json").unlink(missing_ok=True)
    choice = run(tmp_path, RISE_AND_FALL, ckpt_every=ckpt_every)
    assert list(choice.looks) == list(RISE_AND_FALL)
    assert kept(tmp_path) == (6.0, 12.0)


def test_the_best_weights_survive_a_kill_after_a_better_look_that_does_not_come_again(tmp_path: Path) -> None:
    """The weights of step 6 beat those of step 2 and are forgotten with the steps after the checkpoint at 5."""
    with pytest.raises(KilledError):
        run(tmp_path, {2: 0.4, 4: 0.3, 6: 0.9, 8: 0.1}, killed_at=8, ckpt_every=5)
    assert json.loads((tmp_path / "choice.json").read_text())["chosen"] == 6
    choice = run(tmp_path, {6: 0.2, 8: 0.1, 10: 0.3, 12: 0.2}, ckpt_every=5)
    assert (choice.best, kept(tmp_path)) == (2, (2.0, 12.0))
    assert [look["utility"] for look in json.loads((tmp_path / "choice.json").read_text())["looks"]] == [
        0.4, 0.3, 0.2, 0.1, 0.3, 0.2
    ]  # fmt: skip


def test_going_back_after_trouble_forgets_later_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[int, float] = dict.fromkeys(range(2, 41, 2), 0.1) | {24: 0.5, 26: 0.9, 28: 0.2}

    choice = run(tmp_path, values, steps=32, spike=27, ckpt_every=25)
    assert "going back to step 25" in capsys.readouterr().out
    # 26 came again at half the rate: 25 steps of 1, then of 0.5
    assert (choice.best, choice.weights["weight"].item()) == (26, 25.5)
    assert list(choice.looks) == list(range(2, 33, 2))
    assert kept(tmp_path)[0] == 25.5


def test_a_run_without_a_look_keeps_the_last_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, {}, steps=1)
    assert kept(tmp_path) == (1.0, 1.0)
    assert "no look had a utility, so the last weights are kept" in capsys.readouterr().out


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").write_bytes(b"")
    with pytest.raises(LightningDiTError, match=r"holds last\.safetensors and no checkpoint"):
        run(tmp_path, RISE_AND_FALL)


def test_a_checkpoint_with_a_damaged_choice_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, RISE_AND_FALL, steps=4)
    real = loop.load_training_state

    def damaged(path: Path) -> dict[str, Any]:
        state = real(path)
        state["choice"]["best"] = 3
        return state

    monkeypatch.setattr(loop, "load_training_state", damaged)
    with pytest.raises(LightningDiTError, match="does not fit this run .the best look 3 is none of the looks"):
        run(tmp_path, RISE_AND_FALL)


def test_a_run_that_began_without_a_choice_goes_on_with_one(tmp_path: Path) -> None:
    toy = Toy()
    train(toy, RunDir(tmp_path), LoopSettings(3, 1, 100, 4), "transformer.safetensors")
    assert not (tmp_path / "choice.json").exists()
    assert "choice" not in loop.load_training_state(RunDir(tmp_path).checkpoints()[-1])
    choice = run(tmp_path, RISE_AND_FALL)
    assert list(choice.looks) == [4, 6, 8, 10, 12]
    assert kept(tmp_path) == (6.0, 12.0)


def test_copies_and_those_of_real_windows_share_a_panel() -> None:
    rows = [{"step": 2.0, "copies": 0.1, "copies_real": 0.05, "utility": 0.5}, {"step": 4.0, "copies": 0.3}]
    figure = draw({"run": rows})
    assert [panel.get_ylabel() for panel in figure.axes] == ["copies", "utility"]
    lines = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert lines == [[0.1, 0.3], [0.05]]
    assert figure.axes[0].lines[1].get_label() == "of real windows"
