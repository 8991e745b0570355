"""Reading a run's checkpoints: odd and missing entries are one line that names the file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from LightningDiT.checkpoint import load_training_state, save_training_state
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import UNFINISHED
from LightningDiT.training.ema import Ema
from LightningDiT.training.loop import LoopSettings, train
from LightningDiT.training.run_dir import RunDir, load_optimizer
from LightningDiT.training.scaler import LossScaler

NEWEST = "checkpoint-0000004.pt"


class Line:
    """The smallest thing that `train` drives: a line through points."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.ema = Ema(self.model, 0.9)
        self.scaler = LossScaler(enabled=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.settings: dict[str, object] = {"seed": 0}
        self.metadata: dict[str, str] = {}
        self.rate_scale = self.learning_rate = 1.0

    def step(self, step: int) -> dict[str, float]:
        loss = (self.model(torch.full((4, 3), float(step))) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update()
        return {"loss": float(loss)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.weights,
            "ema_steps": self.ema.steps,
            "opt": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict({"weights": state["ema"], "steps": state["ema_steps"]})
        load_optimizer(self.optimizer, state["opt"])
        self.scaler.load_state_dict(state["scaler"])


def run(folder: Path, steps: int) -> Path:
    return train(Line(), RunDir(folder, regular=2), LoopSettings(steps, 4, 10, 2), "line.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The state of a run of 4 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, 4)
    return load_training_state(folder / NEWEST)


#: Entries of a checkpoint, as paths of keys.
ENTRIES = [
    *("settings", "guard", "random", "model", "ema", "ema_steps", "opt", "scaler"),
    *(f"guard/{name}" for name in ("rate_scale", "skipped", "returns", "trouble", "left_out", "last_finite", "recent")),
    *(f"random/{name}" for name in ("python", "numpy", "torch", "gpus")),
    *("model/weight", "ema/bias", "scaler/scale", "scaler/good_steps"),
    *(
        "opt/state",
        "opt/param_groups",
        "opt/state/0",
        "opt/state/0/step",
        "opt/state/0/exp_avg",
        "opt/state/1/exp_avg_sq",
    ),
    *("opt/param_groups/0", "opt/param_groups/0/betas", "opt/param_groups/0/eps", "opt/param_groups/0/params"),
]
VALUES: dict[str, object] = {
    "None": None,
    "text": "text",
    "list": ["a"],
    "dictionary": {"a": 1},
    "not finite": float("nan"),
    "a tensor of another shape": torch.zeros(7),
    "a tensor of another kind": torch.zeros(2, dtype=torch.long),
}
#: Older checkpoints lack the one, and an optimizer begins anew for a parameter without a state.
MISSING_IS_FINE = {"guard/last_finite", "opt/state/0"}
#: States of another machine's GPUs are ignored, whatever they are, if their number is not ours.
IGNORED = {"random/gpus"}


def changed(state: dict[str, Any], entry: str, value: object = None, removed: bool = False) -> dict[str, Any]:
    result = copy.deepcopy(state)
    *parents, last = [int(key) if key.isdigit() else key for key in entry.split("/")]
    holder: Any = result
    for key in parents:
        holder = holder[key]
    if removed:
        del holder[last]
    else:
        holder[last] = value
    return result


def go_on(state: dict[str, Any], folder: Path) -> None:
    save_training_state(state, folder / NEWEST)
    run(folder, 6)


def test_a_good_checkpoint_goes_on(whole: dict[str, Any], tmp_path: Path) -> None:
    go_on(whole, tmp_path / "again")
    run(tmp_path / "whole", 6)
    for name in ("again", "whole"):
        assert (tmp_path / name / "checkpoint-0000006.pt").is_file()
    again, straight = (load_training_state(tmp_path / n / "checkpoint-0000006.pt")["ema"] for n in ("again", "whole"))
    torch.testing.assert_close(again, straight, atol=0, rtol=0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_missing_entry_is_one_line(entry: str, whole: dict[str, Any], tmp_path: Path) -> None:
    state = changed(whole, entry, removed=True)
    if entry in MISSING_IS_FINE:
        go_on(state, tmp_path)
        return
    with pytest.raises(LightningDiTError) as raised:
        go_on(state, tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in IGNORED])
def test_an_odd_entry_is_one_line(entry: str, kind: str, whole: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError) as raised:
        go_on(changed(whole, entry, VALUES[kind]), tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("step", [None, "4", 3, [4], torch.tensor(4.5)])
def test_a_checkpoint_under_another_name_is_passed_over(
    step: object, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 2)
    save_training_state(changed(whole, "step", step), tmp_path / NEWEST)
    assert RunDir(tmp_path).newest() == tmp_path / "checkpoint-0000002.pt"
    assert "is passed over: its name says step 4, its content" in capsys.readouterr().out


def test_what_a_kill_left_of_the_weights_is_removed_by_the_next_run(tmp_path: Path) -> None:
    """Also the file of safetensors itself, which has the full size."""
    left = tmp_path / ".tmpa1B2c3"
    left.write_bytes((64).to_bytes(8, "little") + b'{"weight":')
    (tmp_path / f".transformer.safetensors.x1y2z3w4{UNFINISHED}").write_bytes(b"half")
    RunDir(tmp_path).sweep()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_kernels_or_an_older_torch_goes_on(whole: dict[str, Any]) -> None:
    """As one of a GPU, whose optimizer is fused: the step is the same and the choice of its code is the device's."""
    ends = []
    for flags in ({}, {"fused": True, "foreach": False}):
        line, group = Line(), whole["opt"]["param_groups"][0] | flags
        if flags:
            group.pop("decoupled_weight_decay", None)  # which torch 2.2 does not have
        line.load_state_dict(whole | {"opt": whole["opt"] | {"param_groups": [group]}})
        assert [line.optimizer.param_groups[0][name] for name in ("fused", "foreach")] == [None, None]
        line.step(4)
        ends.append(line.model.weight.detach())
    assert torch.equal(*ends)
