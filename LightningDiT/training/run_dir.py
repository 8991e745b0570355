"""The folder of a run: its checkpoints, the random states in them, and its log."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.checkpoint import kind_of, load_training_state, save_training_state
from LightningDiT.device import gpu_random_states, set_gpu_random_states
from LightningDiT.errors import LightningDiTError, first_line, is_out_of_memory
from LightningDiT.files import append_text, disk_errors, open_own, open_regular, remove_leftovers, require_unicode
from LightningDiT.training.curves import CURVES

STEP_DIGITS = 7  # at least
OPTIONAL = ("last_finite", "decoupled_weight_decay")  # entries that checkpoints of older releases, or torch's, lack
OPTIMIZERS = ("opt", "optimizer", "judges")  # entries for `load_optimizer`
FLAGS = ("amsgrad", "capturable", "differentiable", "maximize")  # of an optimizer, which change its step
KERNELS = ("foreach", "fused")  # flags of an optimizer that choose the code of the same step
ADAM_STATE = {"step", "exp_avg", "exp_avg_sq"}
CHECKPOINT = re.compile(rf"checkpoint-(\d{{{STEP_DIGITS},}})\.pt")


class RunDir:
    """Checkpoints and log of one training run.

    A checkpoint is `checkpoint-<step>.pt`; a run goes on from the newest undamaged one. `log.jsonl` has a line per
    logged step.

    Args:
        keep: the number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept too; 0 is off.
        regular: steps between two regular checkpoints. A run in trouble goes back to the newest one of these, so it
            is kept whatever Ctrl-C saves after it.
        results: names of the files that the run writes at its end.
    """

    def __init__(
        self, path: str | Path, keep: int = 2, keep_every: int = 0, regular: int = 1, results: Sequence[str] = ()
    ) -> None:
        require_unicode(path)  # else its checkpoints could be written, and not read
        self.path, self.results = Path(path), results
        self.keep, self.keep_every, self.regular = keep, keep_every, regular
        self._damage: dict[Path, str | None] = {}  # of the checkpoints that were read so far

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint files, the oldest first."""
        return sorted((path for path in self.path.glob("*.pt") if CHECKPOINT.fullmatch(path.name)), key=step_of)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps, and delete the checkpoints that no rule keeps."""
        path = self.path / f"checkpoint-{step:0{STEP_DIGITS}d}.pt"
        save_training_state({"step": step, **state}, path)
        self._damage.pop(path, None)
        self.prune()
        return path

    def prune(self) -> None:
        """Delete the checkpoints that no rule keeps; damaged ones are neither counted nor deleted."""
        found = [path for path in self.checkpoints() if not self._damage.get(path)]
        kept = set(found[-self.keep :])
        kept |= {path for path in found if self.keep_every and step_of(path) % self.keep_every == 0}
        kept |= set([path for path in found if step_of(path) % self.regular == 0][-1:])
        for path in found:
            if path not in kept:
                path.unlink(missing_ok=True)

    def refuse_foreign(self) -> None:
        """Raise LightningDiTError if a file that the run would write lies in a folder without its checkpoints.

        A run writes its first checkpoint before anything else.
        """
        there = [name for name in (self._log.name, CURVES, *self.results) if os.path.lexists(self.path / name)]
        if there and not self.checkpoints():
            raise LightningDiTError(
                f"{self.path} holds {there[0]} and no checkpoint, so it is of another origin",
                "choose another --output, or move it away",
            )

    def sweep(self) -> None:
        """Delete the temporary files and the torn last line of the log that a killed process left behind."""
        for folder in (self.path, self.path / "samples"):
            remove_leftovers(folder, alone=True)
        if self._log.is_file():
            with open_own(self._log) as stream:
                stream.seek(0)
                content = stream.read()
                stream.truncate(content.rfind(b"\n") + 1)

    def newest(self, up_to: int | None = None, regular: bool = False) -> Path | None:
        """Return the newest undamaged checkpoint, or None, and name the damaged ones that are newer.

        Args:
            up_to: consider those of at most this many steps.
            regular: consider those at multiples of `self.regular` steps.
        """
        for path in reversed(self.checkpoints()):
            step = step_of(path)
            if (up_to is not None and step > up_to) or (regular and step % self.regular):
                continue
            if path not in self._damage:
                self._damage[path] = damage_of(path)
                if self._damage[path]:
                    print(f"note: {path} is passed over: {self._damage[path]}", flush=True)
            if self._damage[path] is None:
                return path
        return None

    def log(self, row: Mapping[str, float]) -> None:
        """Append a line of numbers to the log.

        Raises:
            LightningDiTError: the folder cannot be written, or the disk is full.
        """
        line = json.dumps({key: _shortened(value) for key, value in row.items()}) + "\n"
        with disk_errors(self._log):
            self.path.mkdir(parents=True, exist_ok=True)
            append_text(self._log, line)

    @property
    def _log(self) -> Path:
        return self.path / "log.jsonl"


def _shortened(value: float) -> float:
    """Return a number with six digits behind the point; a small one, such as a learning rate, with six digits."""
    return float(f"{value:.6g}") if abs(value) < 1 else round(value, 6)


def step_of(path: Path) -> int:
    """Return the number of steps in a checkpoint's name."""
    return int(path.stem.removeprefix("checkpoint-"))


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; every part is read and its checksum compared."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if part := archive.testzip():
                return f"its part {part} is damaged"
        step = load_training_state(path).get("step")
    except PermissionError as error:
        return f"it cannot be read ({error.strerror})"
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, OSError, EOFError) as error:
        return f"it is cut short ({error})"
    except LightningDiTError as error:
        return error.message
    return None if step == step_of(path) else f"its name says step {step_of(path)}, its content {step!r:.40}"


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn what odd entries of the checkpoint `path` raise while a run restores them into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"entry {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise LightningDiTError(
            f"{path} does not fit this run ({reason})",
            "delete it to go on from the checkpoint before it, or choose another --output",
        ) from error


def require_form(found: object, own: object, name: str = "the checkpoint") -> None:
    """Raise ValueError unless the entries of a checkpoint have the forms of a run's own ones.

    Dictionaries have the same names, tensors the same shapes and kinds, numbers are finite. Optimizers, for which there
    is `load_optimizer`, and values of other types are not looked at.

    Args:
        name: of the entry, for the message.
    """
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is {type(found).__name__}, a dictionary is expected")
        for key in own:
            if key in found and key not in OPTIMIZERS:
                require_form(found[key], own[key], f"entry {key}")
            elif key not in found and key not in OPTIONAL:
                raise ValueError(f"entry {key} is missing")
    elif isinstance(own, Tensor):
        if not isinstance(found, Tensor) or (found.shape, kind_of(found)) != (own.shape, kind_of(own)):
            given = f"{kind_of(found)} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name} is {given}, {kind_of(own)} {list(own.shape)} is expected")
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple) or not all(_is_number(value) for value in found):
            raise ValueError(f"{name} is no list of finite numbers")
    elif isinstance(own, int | float) and not _is_number(found):
        raise ValueError(f"{name} is {found!r:.40}, a finite number is expected")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore what the `state_dict` of an Adam or AdamW returned.

    Raises:
        ValueError: an entry has another form.
    """
    groups = optimizer.state_dict()["param_groups"]
    for found, own in zip(state["param_groups"], groups, strict=True):
        require_form(found, own, "a group of the optimizer")
        if changed := [name for name in FLAGS if found.get(name, own.get(name)) != own.get(name)]:
            raise ValueError(f"{changed[0]} of the optimizer is {found[changed[0]]!r:.40}")
    for values in state["state"].values():
        for name, value in values.items():
            if isinstance(value, Tensor) and kind_of(value) != "real":  # torch would convert it
                raise ValueError(f"{name} of the optimizer is {kind_of(value)}, real numbers are expected")
    # a checkpoint of a GPU may go on on a CPU and the reverse, each with its own kernels
    kept = [
        own | found | {name: own[name] for name in KERNELS}
        for found, own in zip(state["param_groups"], groups, strict=True)
    ]
    optimizer.load_state_dict(copy.deepcopy({**state, "param_groups": kept}))  # else it would go on reading the file
    for parameter, values in optimizer.state.items():
        if missing := ADAM_STATE - set(values):
            raise ValueError(f"entry {min(missing)} of the optimizer is missing")
        for name, value in values.items():
            require_form(value, torch.zeros(()) if name == "step" else parameter.detach(), f"{name} of the optimizer")


def random_state() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy and torch as tensors and plain values.

    The trainings draw from generators of (seed, step, sample); these states serve layers and packages that do not.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "gpus": gpu_random_states(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    keys, position, has_gauss, numpy_gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].clone())
    set_gpu_random_states([value.clone() for value in state["gpus"]])
