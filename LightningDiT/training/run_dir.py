"""The folder of a run: its checkpoints, the random states in them, and its log."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LightningDiT.checkpoint import load_training_state, save_training_state
from LightningDiT.device import gpu_random_states, set_gpu_random_states
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import disk_errors

STEP_DIGITS = 7  # at least
CHECKPOINT = re.compile(rf"checkpoint-(\d{{{STEP_DIGITS},}})\.pt")
#: Temporary files of `atomic_path` that a killed process leaves behind.
LEFTOVERS = (".checkpoint-*.pt.*.tmp", ".*.safetensors.*.tmp", ".curves.png.*.tmp", "samples/.step-*.png.*.tmp")


class RunDir:
    """Checkpoints and log of one training run.

    A checkpoint is `checkpoint-<step>.pt`; a run goes on from the newest undamaged one. `log.jsonl` has a line per
    logged step.

    Args:
        keep: the number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are kept too; 0 is off.
        regular: steps between two regular checkpoints. A run in trouble goes back to the newest one of these, so it
            is kept whatever Ctrl-C saves after it.
    """

    def __init__(self, path: str | Path, keep: int = 2, keep_every: int = 0, regular: int = 1) -> None:
        self.path = Path(path)
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

    def sweep(self) -> None:
        """Delete the temporary files and the torn last line of the log that a killed process left behind."""
        for pattern in LEFTOVERS:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        if self._log.is_file() and not (content := self._log.read_bytes()).endswith(b"\n"):
            with self._log.open("r+b") as stream:
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
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(line)

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
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                return f"its part {part} is damaged"
        load_training_state(path)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"it is cut short ({error})"
    except LightningDiTError as error:
        return error.message
    return None


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
