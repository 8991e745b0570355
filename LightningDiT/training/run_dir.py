"""The folder of a run: checkpoints that are whole or passed over, and the log."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import load_training_state, save_training_state
from LightningDiT.errors import LightningDiTError

STEP_DIGITS = 7  # at least
CHECKPOINT = re.compile(rf"checkpoint-(\d{{{STEP_DIGITS},}})\.pt")
#: What `atomic_path` leaves behind where a process is killed.
TORN = (".checkpoint-*.pt.*.tmp", ".*.safetensors.*.tmp", ".curves.png.*.tmp", "samples/.step-*.png.*.tmp")


class RunFolder:
    """Checkpoints and log of one training run.

    A checkpoint is `checkpoint-<step>.pt`, written whole or not at all. The newest whole one by step is resumed.
    `log.jsonl` has a line per logged step.

    Args:
        keep: how many of the newest checkpoints are kept.
        keep_every: those after a multiple of so many steps are kept besides; 0 is off.
        regular: checkpoints come every so many steps. The newest of these stays, whatever Ctrl-C has saved since:
            it is what a run in trouble goes back to.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_every: int = 0, regular: int = 1) -> None:
        self.folder = Path(folder)
        self.keep, self.keep_every, self.regular = keep, keep_every, regular
        self._damage: dict[Path, str | None] = {}  # of checkpoints that were read through

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint files, the oldest first."""
        return sorted((path for path in self.folder.glob("*.pt") if CHECKPOINT.fullmatch(path.name)), key=step_of)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps and drop the checkpoints that are not to be kept."""
        path = self.folder / f"checkpoint-{step:0{STEP_DIGITS}d}.pt"
        save_training_state({"step": step, **state}, path)
        self._damage.pop(path, None)
        self.prune()
        return path

    def prune(self) -> None:
        """Delete the checkpoints that no rule keeps; torn ones are neither counted nor deleted."""
        found = [path for path in self.checkpoints() if not self._damage.get(path)]
        kept = set(found[-self.keep :])
        kept |= {path for path in found if self.keep_every and step_of(path) % self.keep_every == 0}
        kept |= set([path for path in found if step_of(path) % self.regular == 0][-1:])
        for path in found:
            if path not in kept:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what a killed process left of the files that it was writing, and of the last line of the log."""
        for pattern in TORN:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        if self._log.is_file() and not (content := self._log.read_bytes()).endswith(b"\n"):
            with self._log.open("r+b") as stream:
                stream.truncate(content.rfind(b"\n") + 1)

    def newest(self, below: int | None = None, regular: bool = False) -> Path | None:
        """Return the newest whole checkpoint, and say which newer ones are torn; None where there is none.

        Args:
            below: of those after at most so many steps.
            regular: of those that come every `regular` steps.
        """
        for path in reversed(self.checkpoints()):
            step = step_of(path)
            if (below is not None and step > below) or (regular and step % self.regular):
                continue
            if path not in self._damage:
                self._damage[path] = damage_of(path)
                if self._damage[path]:
                    print(f"note: {path} is passed over: {self._damage[path]}", flush=True)
            if self._damage[path] is None:
                return path
        return None

    def latest(self) -> dict[str, Any] | None:
        """Return the newest whole state with its "step", or None where there is none."""
        found = self.newest()
        return load_training_state(found) if found else None

    def log(self, row: Mapping[str, float]) -> None:
        """Append a line of numbers to the log.

        Raises:
            LightningDiTError: the folder cannot be written, or the disk is full.
        """
        line = json.dumps({key: round(value, 6) for key, value in row.items()}) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:
            raise LightningDiTError(
                f"{self._log} cannot be written ({error.strerror})",
                "free space on that disk, and give the same command again",
            ) from error

    @property
    def _log(self) -> Path:
        return self.folder / "log.jsonl"


def step_of(path: Path) -> int:
    """Return the number of steps that a checkpoint has behind it, from its name."""
    return int(path.stem.removeprefix("checkpoint-"))


def damage_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None: each part is read and compared with its checksum."""
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
