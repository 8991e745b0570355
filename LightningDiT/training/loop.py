"""The loop that drives a training: steps, trouble, log, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from LightningDiT.checkpoint import load_training_state, save_weights
from LightningDiT.config import setting_differences
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import held_folder
from LightningDiT.training.ema import Ema
from LightningDiT.training.log_rows import Meter, describe
from LightningDiT.training.run_dir import RunFolder, step_of

from .guard import MAX_RETURNS, Guard, GuardSettings, NotFiniteError
from .randomness import random_state, set_random_state

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and the end of a job's time
AGAIN = "Ctrl-C again in 5 seconds or later ends at once"
SAME_REQUEST = 5.0  # seconds: a launcher passes a Ctrl-C on that the terminal has sent to all of its processes already
LISTED = 4  # differences between a checkpoint and the run
#: Settings that a run may change on its way: what its memory holds, and the step at which its times become uniform.
CHANGEABLE = ("model.use_checkpoint", "lognorm_until_step")


class Trainable(Protocol):
    """What `train` drives: one optimizer step at a time, and everything that a resumed run needs.

    Attributes:
        ema: the averaged weights, which the run ends with.
        settings: what a resumed run must have in common with its checkpoint, apart from `CHANGEABLE`.
        rate_scale: factor on the learning rate of every optimizer, which the loop lowers after trouble.
    """

    ema: Ema
    settings: dict[str, Any]
    rate_scale: float

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take one optimizer step and return its scalar terms, of which `loss` is judged.

        Raises:
            NotFiniteError: see `require_finite`; the weights are then as they were.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values alone."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""


@dataclass(frozen=True)
class Watcher:
    """Something that looks at the run every `every` steps and gives figures for the log.

    `look` is called by all processes with the number of steps done.
    """

    every: int
    look: Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How long a run takes, how often it is logged and saved, and when it goes back."""

    max_steps: int
    batch_size: int  # of all processes together
    log_every: int
    ckpt_every: int
    resume: bool = True  # go on from the newest checkpoint
    guard: GuardSettings = field(default_factory=GuardSettings)


def train(
    trainer: Trainable,
    run: RunFolder,
    schedule: Schedule,
    weights_name: str,
    processes: Processes = ALONE,
    watchers: Sequence[Watcher] = (),
    sinks: Sequence[Callable[[Mapping[str, float]], None]] = (),
) -> Path:
    """Train up to `schedule.max_steps` and return the file of the averaged weights.

    Ctrl-C ends after the current step and saves; running the same command again goes on from there.

    Args:
        sinks: called by the main process with every row of the log.

    Raises:
        LightningDiTError: the folder holds a run of other settings, or trouble comes again and again.
    """
    loop = _Loop(trainer, run, schedule, processes, watchers, sinks)
    with contextlib.ExitStack() as held:
        processes.from_main(lambda: held.enter_context(held_folder(run.folder, "training")))
        loop.run_to_end()
        path = run.folder / weights_name
        processes.from_main(lambda: _save_average(trainer.ema, path))
    return path


def _save_average(ema: Ema, path: Path) -> None:
    damaged = [name for name, value in ema.weights.items() if not torch.isfinite(value).all()]
    if damaged:
        raise LightningDiTError(
            f"{len(damaged)} tensors of the averaged weights are not finite ({damaged[0]}); {path} is not written",
            "delete the newest checkpoints of the run, lower optimizer.lr, and give the same command again",
        )
    save_weights(ema.weights, path)


class _Loop:
    """One run under way; `done` is the number of steps behind it."""

    def __init__(
        self,
        trainer: Trainable,
        run: RunFolder,
        schedule: Schedule,
        processes: Processes,
        watchers: Sequence[Watcher],
        sinks: Sequence[Callable[[Mapping[str, float]], None]],
    ) -> None:
        self.trainer, self.run, self.schedule, self.processes = trainer, run, schedule, processes
        run.regular = schedule.ckpt_every
        self.watchers, self.sinks = watchers, sinks
        self.guard = Guard(schedule.guard)
        self.meter = Meter(schedule.max_steps, schedule.batch_size)
        self.done = 0

    def run_to_end(self) -> None:
        self._start()
        with held_interrupt(quiet=not self.processes.is_main) as interrupted:
            while self.done < self.schedule.max_steps:
                if self._take_step():
                    self._go_back()
                    continue
                stopping = self.processes.any(interrupted.is_set())
                last = stopping or self.done == self.schedule.max_steps
                self._log(last)
                stands_well = self.done % self.schedule.ckpt_every == 0 and not self.guard.trouble
                if stands_well:
                    self.guard.passed(self.done)
                if last or stands_well:
                    self._save()
                if stopping:
                    self.processes.end_by_interrupt()

    def _start(self) -> None:
        """Go on from the newest whole checkpoint, or write the first one, to which a run may have to go back."""
        path = self.processes.from_main(self._find_start)
        if path is None:
            self._save()
        else:
            self.guard.load_state_dict(self._load(path)["guard"])
            self.trainer.rate_scale = self.guard.rate_scale
            self.processes.say(f"going on from step {self.done} of {path}")
            if self.done > self.schedule.max_steps:
                self.processes.say(f"note: that is beyond max_steps, {self.schedule.max_steps}; nothing is undone")

    def _find_start(self) -> Path | None:
        self.run.sweep()
        path = self.run.newest()
        if path is None:
            if torn := self.run.checkpoints():
                raise LightningDiTError(
                    f"none of the {len(torn)} checkpoints in {self.run.folder} is whole",
                    "delete them to begin anew, or choose another --output",
                )
            return None
        if not self.schedule.resume:
            raise LightningDiTError(
                f"{self.run.folder} holds checkpoints and train.resume is false",
                "choose another --output, or set train.resume: true",
            )
        state = load_training_state(path)
        now = self.trainer.settings | _shapes(self.trainer.state_dict())
        if changed := setting_differences(state.get("settings", {}) | _shapes(state), now, ignored=CHANGEABLE):
            more = [f"and {len(changed) - LISTED} more"] if len(changed) > LISTED else []
            raise LightningDiTError(
                f"{self.run.folder} holds a run of other settings ({'; '.join(changed[:LISTED] + more)})",
                "choose another --output",
            )
        if "guard" not in state:
            raise LightningDiTError(f"{path} was written by an older version", "choose another --output")
        return path

    def _load(self, path: Path) -> dict[str, Any]:
        """Give the trainer the state in `path` and return it."""
        state = self.processes.agree(lambda: load_training_state(path))
        self.trainer.load_state_dict(state)
        set_random_state(state["random"])
        self.done = int(state["step"])
        return state

    def _save(self) -> None:
        state = {"settings": self.trainer.settings, "guard": self.guard.state_dict(), "random": random_state()}
        self.processes.from_main(lambda: self.run.save(self.done, state | self.trainer.state_dict()))

    def _take_step(self) -> bool:
        """Take the next step and count it; return whether the run must go back."""
        step = self.done
        terms: dict[str, float] = {}
        self.done += 1
        must_return = False
        if not self.guard.leaves_out(step):
            try:
                terms = {name: float(_plain(value)) for name, value in self.trainer.step(step).items()}
                must_return = self.guard.good(step, terms["loss"])
            except NotFiniteError as error:
                if error.counts:
                    must_return = self.guard.bad(step)
                    self.processes.say(f"step {step} is skipped: {error.message}")
        self.meter.add(terms)
        return must_return

    def _go_back(self) -> None:
        """Return to the newest regular checkpoint with a lower rate.

        Raises:
            LightningDiTError: see `_find_return`.
        """
        trouble, reached = self.guard.trouble, self.done
        path = self.processes.from_main(self._find_return)
        what = (
            f"{len(trouble)} steps in a row were not finite"
            if len(trouble) >= self.schedule.guard.max_skips
            else f"the loss leapt above {self.schedule.guard.spike_factor:g} times its median"
        )
        self.guard.go_back(self._load(path)["guard"])
        self.trainer.rate_scale = self.guard.rate_scale
        self.meter.restart()
        self.processes.say(
            f"step {reached - 1}: {what}; going back to step {step_of(path)} with {self.guard.rate_scale:g} of the"
            f" rate, without the batches of steps {trouble[0]} to {trouble[-1]}"
        )

    def _find_return(self) -> Path:
        """Return the checkpoint to which a run in trouble goes back.

        Raises:
            LightningDiTError: there is none, or the run has gone back too often without getting beyond its trouble.
        """
        path = self.run.newest(below=self.done - 1, regular=True)
        if path is None or self.guard.returns >= MAX_RETURNS:
            raise LightningDiTError(
                f"training does not get beyond step {self.done}: it went back {self.guard.returns} times, and the rate"
                f" is {self.guard.rate_scale:g} of what was asked for",
                "lower optimizer.lr, set optimizer.max_grad_norm: 1.0 or model.use_qknorm: true, and look at the data",
            )
        return path

    def _log(self, last: bool) -> None:
        """Write and print a row where a line or a watcher is due."""
        row: dict[str, float] = {}
        if self.done % self.schedule.log_every == 0 or last:
            row |= self.meter.row(self.done)
            row |= {"skipped_steps": self.guard.skipped, "rate_scale": self.guard.rate_scale}
        for watcher in self.watchers:
            if self.done % watcher.every == 0:
                row |= watcher.look(self.done)
        if row and self.processes.is_main:
            row = {"step": float(self.done)} | row
            self.run.log(row)
            print(describe(row), flush=True)
            for sink in self.sinks:
                sink(row)


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the shapes of the model's tensors in a checkpoint; none where it holds no model."""
    return {f"tensor {name}": str(list(value.shape)) for name, value in state.get("model", {}).items()}


def _plain(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def held_interrupt(*, quiet: bool = False) -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event that is looked at between steps, so that no half step is ever saved.

    A second one, more than `SAME_REQUEST` seconds later, ends at once; the newest checkpoint is then that of the last
    regular saving.
    """
    event, asked = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread alone
        return

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if event.is_set():
            if time.monotonic() - asked > SAME_REQUEST:
                raise KeyboardInterrupt
            return
        event.set()
        asked = time.monotonic()
        if not quiet:  # not by print, which may be what the signal interrupted
            os.write(2, f"\nasked to stop: ending after this step ({AGAIN})\n".encode())

    previous = {number: signal.signal(number, on_interrupt) for number in STOP_SIGNALS}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
