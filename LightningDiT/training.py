"""What both training scripts share: order of the data, EMA, learning rate, checkpoints and the log."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import load_training_state, save_training_state, save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.seeds import generator_for

KEPT_CHECKPOINTS = 2
STEP_DIGITS = 7


class BatchOrder:
    """Which samples step `s` sees: a fresh permutation an epoch, known from the seed and the step alone.

    A resumed run asks for the same step and gets the same samples; no position has to be stored.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise LightningDiTError(f"a batch of {batch_size} is asked of {count} samples", "ask for a smaller batch")
        self.batch_size = batch_size
        self.count = count
        self.seed = seed
        self.steps_per_epoch = count // batch_size
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """Return the sample numbers of `step`, (batch_size,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self.count, generator=generator_for(self.seed, 0, epoch))
        return self._permutation[position * self.batch_size :][: self.batch_size]


class Ema:
    """Exponential moving average of a module's parameters (Polyak and Juditsky, 1992)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module; early steps weigh more, so that the start is forgotten."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the number of updates."""
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])  # keeps the device that the module is on
        self.steps = int(state["steps"])


def learning_rate(step: int, base: float, warmup: int, decay: int, total: int) -> float:
    """Return the rate of `step`: a linear rise over `warmup` steps, `base`, a cosine fall over `decay` ones."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = max(0, total - step)
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / decay)) if decay else 1.0
    return base * rise * fall


class RunFolder:
    """Checkpoints and log of one training run.

    A checkpoint is `checkpoint-<step>.pt`, written whole or not at all; the newest by step is resumed and
    the two newest are kept. `log.jsonl` has a line per logged step.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint files, the oldest first."""
        return sorted(self.folder.glob(f"checkpoint-{'[0-9]' * STEP_DIGITS}.pt"))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps and drop all but the newest checkpoints."""
        path = self.folder / f"checkpoint-{step:0{STEP_DIGITS}d}.pt"
        save_training_state({"step": step, **state}, path)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """Return the newest state with its "step", or None where there is none."""
        found = self.checkpoints()
        return load_training_state(found[-1]) if found else None

    def log(self, row: Mapping[str, float]) -> None:
        """Append a line of numbers to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: round(value, 6) for key, value in row.items()}) + "\n")


class Meter:
    """Averages the loss terms between two log lines and knows speed and time left."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.started = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the scalar loss terms of one step."""
        self.count += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())

    def row(self, step: int, batch_size: int) -> dict[str, float]:
        """Return the averages since the last call with step, images per second and seconds left."""
        done = step - self.first_step
        seconds = time.monotonic() - self.started
        row = {"step": float(step)} | {name: value / self.count for name, value in self.sums.items()}
        row["images_per_second"] = done * batch_size / seconds
        row["seconds_left"] = (self.total_steps - step) * seconds / done
        self.sums, self.count = {}, 0
        return row


def describe(row: Mapping[str, float]) -> str:
    """Return one readable line for a row of the log."""
    terms = [f"{name} {value:.4f}" for name, value in row.items() if name not in _SPECIAL]
    return (
        f"step {int(row['step'])}: {', '.join(terms)}"
        f" ({row['images_per_second']:.0f} images/s, {row['seconds_left'] / 60:.1f} min left)"
    )


_SPECIAL = ("step", "images_per_second", "seconds_left")


class Trainable(Protocol):
    """What `train` drives: one optimizer step at a time, and everything that a resumed run needs."""

    ema: Ema
    settings: dict[str, Any]  # what a resumed run must have in common with its checkpoint

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Take one optimizer step and return its scalar loss terms."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values alone."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""


@dataclass(frozen=True)
class Schedule:
    """How long a run takes and how often it is logged and saved."""

    max_steps: int
    batch_size: int
    log_every: int
    ckpt_every: int
    resume: bool = True  # go on from the newest checkpoint


def start(trainer: Trainable, run: RunFolder, resume: bool) -> int:
    """Load the newest checkpoint of `run`, if any, and return the number of steps that it has behind it.

    Raises:
        LightningDiTError: the folder holds a run of other settings, or a run that is not to be resumed.
    """
    state = run.latest()
    if state is None:
        return 0
    if not resume:
        raise LightningDiTError(
            f"{run.folder} holds checkpoints and train.resume is false",
            "choose another --output, or set train.resume: true",
        )
    known = state.get("settings", {})
    changed = [
        f"{key}: {known.get(key)} there, {value} now"
        for key, value in trainer.settings.items()
        if known.get(key) != value
    ]
    if changed:
        raise LightningDiTError(
            f"{run.folder} holds a run of other settings ({'; '.join(changed)})", "choose another --output"
        )
    trainer.load_state_dict(state)
    print(f"going on from step {state['step']} of {run.checkpoints()[-1]}")
    return int(state["step"])


@contextlib.contextmanager
def held_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event that is looked at between steps, so that no half step is ever saved.

    A second Ctrl-C ends at once; the newest checkpoint is then that of the last regular saving.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread alone
        return

    def on_interrupt(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("Ctrl-C: ending after this step (press again to end at once)", flush=True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def require_finite(name: str, value: Tensor, step: int) -> None:
    """Stop a run before a loss or gradient that is not finite reaches the weights.

    Raises:
        LightningDiTError: `value` is NaN or infinite.
    """
    if not bool(torch.isfinite(value.detach()).all()):
        raise LightningDiTError(
            f"the {name} of step {step} is not finite; the newest checkpoint is whole",
            "lower the learning rate or set max_grad_norm: 1.0, and give the same command again",
        )


def train(trainer: Trainable, run: RunFolder, schedule: Schedule, weights_name: str) -> Path:
    """Train up to `schedule.max_steps` and return the file of the averaged weights.

    Ctrl-C ends after the current step and saves; running the same command again goes on from there.

    Raises:
        LightningDiTError: see `start` and `require_finite`.
    """
    first = start(trainer, run, schedule.resume)
    meter = Meter(schedule.max_steps, first)
    with held_interrupt() as interrupted:
        for done in range(first + 1, schedule.max_steps + 1):
            meter.add(trainer.step(done - 1))
            last = done == schedule.max_steps or interrupted.is_set()
            if done % schedule.log_every == 0 or last:
                row = meter.row(done, schedule.batch_size)
                run.log(row)
                print(describe(row), flush=True)
            if done % schedule.ckpt_every == 0 or last:
                run.save(done, {"settings": trainer.settings, **trainer.state_dict()})
            if interrupted.is_set():
                raise KeyboardInterrupt
    path = run.folder / weights_name
    save_weights(trainer.ema.weights, path)
    return path
