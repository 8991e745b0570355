"""The loop of a training: steps, trouble, log, checkpoints, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from LightningDiT.checkpoint import load_training_state, save_weights
from LightningDiT.config import setting_differences
from LightningDiT.console import StopRequest
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import held_folder
from LightningDiT.training.choice import LAST_NAME, Choice
from LightningDiT.training.curves import LiveCurves
from LightningDiT.training.ema import Ema
from LightningDiT.training.guard import MAX_RETURNS, Guard, GuardSettings, NotFiniteError
from LightningDiT.training.log_rows import AverageMeter, row_text
from LightningDiT.training.run_dir import RunDir, random_state, require_form, restoring, set_random_state, step_of

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and the end of a job's time
GRACE = 5.0  # seconds: a launcher passes on a Ctrl-C that the terminal has sent to all of its processes already
STOPPING = f"stopping after the current step; Ctrl-C again, {GRACE:g} seconds later or more, ends at once"
LISTED = 4  # differences between a checkpoint and the run
#: Settings that may change within a run: activation checkpointing, and the step at which times become uniform.
CHANGEABLE = ("model.use_checkpoint", "lognorm_until_step")


class Trainable(Protocol):
    """What `train` drives: one optimizer step at a time, and everything that a resumed run needs.

    Attributes:
        ema: the averaged weights, which the run ends with.
        metadata: of the file of these weights.
        settings: what a resumed run must have in common with its checkpoint, apart from `CHANGEABLE`.
        rate_scale: factor on the learning rate of every optimizer, which the loop lowers after trouble.
        learning_rate: of the newest step, with that factor.
    """

    ema: Ema
    metadata: dict[str, str]
    settings: dict[str, Any]
    rate_scale: float
    learning_rate: float

    def step(self, step: int) -> Mapping[str, float]:
        """Take one optimizer step and return its terms; `loss` is checked for spikes.

        Raises:
            NotFiniteError: a loss or gradient is not finite; the weights are then as they were.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values alone."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass(frozen=True)
class Monitor:
    """Something to observe every `every` steps, such as the validation loss.

    All processes call `observe` with the number of steps done; it returns numbers for the log.
    """

    every: int
    observe: Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class LoopSettings:
    """How long a run takes, how often it is logged and saved, and when it goes back."""

    max_steps: int
    batch_size: int  # of all processes together
    log_every: int
    ckpt_every: int
    resume: bool = True  # go on from the newest checkpoint
    guard: GuardSettings = field(default_factory=GuardSettings)


def train(
    trainer: Trainable,
    run: RunDir,
    settings: LoopSettings,
    weights_name: str,
    processes: Processes = ALONE,
    monitors: Sequence[Monitor] = (),
    choice: Choice | None = None,
) -> Path:
    """Train up to `settings.max_steps` and return the file of the averaged weights.

    With a choice the file holds the chosen weights, `LAST_NAME` the last ones, and the run may end earlier. Ctrl-C
    ends after the current step and saves; running the same command again goes on from there.

    Raises:
        LightningDiTError: the folder holds a run of other settings or foreign files, or trouble comes again and again.
    """
    path = run.path / weights_name
    with contextlib.ExitStack() as held:
        processes.from_main(lambda: held.enter_context(held_folder(run.path, "training")))
        processes.from_main(run.refuse_foreign)
        with LiveCurves(run.path) as curves:
            _Loop(trainer, run, settings, processes, monitors, curves, choice).run_to_end()
        processes.from_main(lambda: _save_result(trainer, path, choice))
    return path


def _save_result(trainer: Trainable, path: Path, choice: Choice | None) -> None:
    """Write the averaged weights; with a choice the chosen ones, and beside them the last ones."""
    if choice is None or choice.best is None:
        _save_average(trainer.ema, path, trainer.metadata)
    else:
        save_weights(choice.weights, path, trainer.metadata | choice.metadata())
    if choice is not None:
        _save_average(trainer.ema, path.with_name(LAST_NAME), trainer.metadata)
        choice.save_looks(path.parent)
        print(choice.text(), flush=True)


def _save_average(ema: Ema, path: Path, metadata: Mapping[str, str]) -> None:
    damaged = [name for name, value in ema.weights.items() if not torch.isfinite(value).all()]
    if damaged:
        raise LightningDiTError(
            f"{len(damaged)} tensors of the averaged weights are not finite ({damaged[0]}); {path} is not written",
            "delete the newest checkpoints of the run, lower optimizer.lr, and run the command again",
        )
    save_weights(ema.weights, path, metadata)


class _Loop:
    """A run under way; `done` is the number of steps taken."""

    def __init__(
        self,
        trainer: Trainable,
        run: RunDir,
        settings: LoopSettings,
        processes: Processes,
        monitors: Sequence[Monitor],
        curves: LiveCurves,
        choice: Choice | None = None,
    ) -> None:
        self.trainer, self.run, self.settings, self.processes = trainer, run, settings, processes
        self.monitors, self.curves, self.choice = monitors, curves, choice
        self.guard = Guard(settings.guard)
        self.meter = AverageMeter(settings.max_steps, settings.batch_size)
        self.done = 0

    def run_to_end(self) -> None:
        """Take all steps that are left; raise LightningDiTError if none of the run was finite."""
        self._start()
        # looked at between steps, so that no half step is ever saved
        with StopRequest(signals=STOP_SIGNALS, grace=GRACE, message=STOPPING, quiet=not self.processes.is_main) as stop:
            while self.done < self.settings.max_steps and not self._has_enough():
                if self._take_step():
                    self._go_back()
                    continue
                stopping = self.processes.any(stop.asked)
                last = stopping or self.done == self.settings.max_steps
                self._log(last)
                last = last or self._has_enough()
                regular = self.done % self.settings.ckpt_every == 0 and not self.guard.trouble
                if regular:
                    self.guard.passed()
                if last or regular:
                    self._save()
                if stopping:
                    self.processes.end_by_interrupt()
        if self.choice and self.done < self.settings.max_steps:
            self.processes.say(f"step {self.done}: {self.choice.ending()}")
        if self.guard.last_finite < 0:
            raise LightningDiTError(
                f"none of the {self.done} steps had a finite loss and gradient, so nothing was trained",
                "look at the latents or images, lower optimizer.lr, and choose another --output",
            )

    def _has_enough(self) -> bool:
        """Whether the choice of the weights ends the run; all processes know the same looks."""
        return self.choice is not None and self.choice.has_ended

    def _start(self) -> None:
        """Go on from the newest undamaged checkpoint, or write the first one, to which a run may have to go back."""
        path = self.processes.from_main(self._find_start)
        if path is None:
            self._save()
            return
        self.guard.load_state_dict(self._load(path)["guard"])
        self.trainer.rate_scale = self.guard.rate_scale
        self.processes.say(f"going on from step {self.done} of {path}")
        if self.done > self.settings.max_steps:
            self.processes.say(f"note: that is beyond max_steps, {self.settings.max_steps}; nothing is undone")

    def _find_start(self) -> Path | None:
        self.run.sweep()
        path = self.run.newest()
        if path is None:
            if damaged := self.run.checkpoints():
                raise LightningDiTError(
                    f"all {len(damaged)} checkpoints in {self.run.path} are damaged",
                    "delete them to begin anew, or choose another --output",
                )
            return None
        if not self.settings.resume:
            raise LightningDiTError(
                f"{self.run.path} holds checkpoints and train.resume is false",
                "choose another --output, or set train.resume: true",
            )
        state = load_training_state(path)
        now = self.trainer.settings | _shapes(self.trainer.state_dict())
        with restoring(path):
            changed = setting_differences(state.get("settings", {}) | _shapes(state), now, ignored=CHANGEABLE)
        if changed:
            more = [f"and {len(changed) - LISTED} more"] if len(changed) > LISTED else []
            raise LightningDiTError(
                f"{self.run.path} holds a run of other settings ({'; '.join(changed[:LISTED] + more)})",
                "choose another --output",
            )
        if "guard" not in state:
            raise LightningDiTError(f"{path} was written by an older version", "choose another --output")
        return path

    def _load(self, path: Path) -> dict[str, Any]:
        """Give the trainer the state in `path` and return it."""
        state = self.processes.agree(lambda: load_training_state(path))
        with restoring(path):
            require_form(state, {"guard": self.guard.state_dict(), "random": {}} | self.trainer.state_dict())
            self.trainer.load_state_dict(state)
            set_random_state(state["random"])
            if choice := self.choice:  # looks after this step are forgotten
                note = choice.load_state_dict(state.get("choice", {}), self.trainer.ema.weights)
        if choice:
            if note:
                self.processes.say(f"note: {note}")
            self.processes.from_main(lambda: choice.save_looks(self.run.path))
        self.done = step_of(path)
        return state

    def _save(self) -> None:
        state = {"settings": self.trainer.settings, "guard": self.guard.state_dict(), "random": random_state()}
        state |= {"choice": self.choice.state_dict()} if self.choice else {}
        self.processes.from_main(lambda: self.run.save(self.done, state | self.trainer.state_dict()))

    def _take_step(self) -> bool:
        """Take the next step and count it; return whether the run must go back."""
        step = self.done
        terms: dict[str, float] = {}
        self.done += 1
        must_return = False
        if not self.guard.skips(step):
            try:
                terms = dict(self.trainer.step(step))
                must_return = self.guard.finite_step(step, terms["loss"])
            except NotFiniteError as error:
                if error.counts:
                    must_return = self.guard.non_finite_step(step)
                    self.processes.say(f"step {step} is skipped: {error.message}")
        self.meter.add(terms)
        return must_return

    def _go_back(self) -> None:
        """Return to the newest regular checkpoint at a lower learning rate.

        Raises:
            LightningDiTError: see `_find_return`.
        """
        trouble, reached = self.guard.trouble, self.done
        path = self.processes.from_main(self._find_return)
        reason = (
            f"{len(trouble)} steps in a row were not finite"
            if len(trouble) >= self.settings.guard.max_skips
            else f"the loss rose above {self.settings.guard.spike_factor:g} times its median"
        )
        self.guard.go_back(self._load(path)["guard"])
        self.trainer.rate_scale = self.guard.rate_scale
        self.meter.reset()
        self.processes.say(
            f"step {reached - 1}: {reason}; going back to step {step_of(path)} at {self.guard.rate_scale:g} of the"
            f" learning rate, skipping the batches of steps {trouble[0]} to {trouble[-1]}"
        )

    def _find_return(self) -> Path:
        """Return the checkpoint to which a run in trouble goes back.

        Raises:
            LightningDiTError: there is none, or the run went back too often without getting beyond its trouble.
        """
        path = self.run.newest(up_to=self.done - 1, regular=True)
        if path is None or self.guard.returns >= MAX_RETURNS:
            raise LightningDiTError(
                f"training does not get beyond step {self.done}: it went back {self.guard.returns} times, and the"
                f" learning rate is {self.guard.rate_scale:g} of the configured one",
                "lower optimizer.lr, set optimizer.max_grad_norm: 1.0 or model.use_qknorm: true, and look at the data",
            )
        return path

    def _log(self, last: bool) -> None:
        """Write and print a row if one is due, or a monitor is."""
        row: dict[str, float] = {}
        if self.done % self.settings.log_every == 0 or last:
            row |= self.meter.row(self.done)
            row["learning_rate"] = self.trainer.learning_rate
            row |= {"skipped_steps": self.guard.skipped, "rate_scale": self.guard.rate_scale}
        for monitor in self.monitors:
            if self.done % monitor.every == 0:
                row |= monitor.observe(self.done)
        row = {"step": float(self.done)} | row if row else {}
        if (choice := self.choice) and choice.see(row, self.trainer.ema):
            self.processes.from_main(lambda: choice.save_looks(self.run.path))
        if row and self.processes.is_main:
            self.run.log(row)
            print(row_text(row), flush=True)
            self.curves.add(row)


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the shapes of the model's tensors in a checkpoint; none if it holds no model."""
    return {f"tensor {name}": str(list(value.shape)) for name, value in state.get("model", {}).items()}
