"""The levels that step 5 wrote, as windows in memory and as an image set: one channel of 16 bits, part by part.

Nothing between the PNG and the tokenizer has 8 bits.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from LightningDiT.data.image_files import WHITE_16_BIT, open_image, shown
from LightningDiT.data.image_sets import Classes, ImageBatch, ImageSet, Unreadable, evenly_spaced
from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json
from LightningDiT.radar.arrays import Levels
from LightningDiT.radar.augmentation import ASSUMED_SPAN, NAMES, Augmentation, augmented
from LightningDiT.radar.split import FOLDS, MOST_BYTES, PARENT_FILE, Row, Split, load_split
from LightningDiT.radar.written import FORMAT, MANIFEST, MEASURED, levels_digest

NO_CONDITION = "none"  # name of the condition of windows without one, beside others
LISTED = 5  # people in a note
MOST_SIDE = 2**15  # pixels
PROBED = 16  # windows whose draws are looked at before the first is used

#: (height, width), and by the row of each window in the split its file and the digest of its levels.
_Files = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Windows:
    """The windows of one part of a split.

    Attributes:
        pixels: (N, 1, H, W) float32 in [-1, 1]: level 0 is -1, level 1 is 1.
        people: (N,) int64, numbers in the natural order of all people of the split.
        conditions: (N,) int64, numbers in the natural order of all conditions of the split; zeros if it has one.
        passes: (N,) int64, no number is that of passes of two people.
        rows: (N,) int64, rows of the split, from 0.
        class_names: the people; condition_names: None if the split has one condition.
        db_range: dB of the levels 0 and 1; None where it is unknown.
    """

    pixels: Tensor
    people: Tensor
    conditions: Tensor
    passes: Tensor
    rows: Tensor
    class_names: tuple[str, ...]
    condition_names: tuple[str, ...] | None
    db_range: tuple[float, float] | None


@dataclass(frozen=True)
class LevelFiles:
    """A folder of levels that was checked against its split.

    Attributes:
        size: (height, width) of every window.
        files: by the row of the split, the file and the digest of its levels.
        is_measured: whether the dB range is that of the training windows of fold 0.
    """

    folder: Path
    split: Split
    size: tuple[int, int]
    files: _Files
    db_range: tuple[float, float] | None
    is_measured: bool
    split_file: Path

    def again(self) -> str:
        """Return the command that writes the folder, with the same size and range."""
        return f"{self.again_in()} --size {self.size[1]}x{self.size[0]}"

    def again_in(self) -> str:
        """Return the command that writes the folder in another size, which is to be added."""
        given = self.db_range if self.db_range and not self.is_measured else ()
        ranged = f" --db-range {' '.join(f'{value:g}' for value in given)}" if given else ""
        return again(self.split, self.split_file, self.folder) + ranged

    def read(self, row: int) -> Levels:
        """Return levels (H, W) in 0 to 1 of a row of the split.

        Raises:
            LightningDiTError: the file is missing, damaged, of another size, or holds other levels.
        """
        name, digest = self.files[row]
        path = self.folder / "levels" / name
        grey = raw_pixels(path, self.again())
        if grey.shape != self.size:
            sides = "x".join(map(str, grey.shape[:2][::-1]))
            raise LightningDiTError(
                f"{shown(path)} has {sides} pixels, the windows have {self.size[1]}x{self.size[0]} and one channel",
                self.again(),
            )
        if levels_digest(grey) != digest:
            raise LightningDiTError(f"{shown(path)} does not hold the levels that step 5 wrote", self.again())
        return (grey / WHITE_16_BIT).astype(np.float32)


def raw_pixels(path: Path, fix: str) -> NDArray[Any]:
    """Return the pixels of an image as they are: (H, W), or (H, W, C) in colours.

    Args:
        fix: for the message.

    Raises:
        LightningDiTError: the file is missing or damaged.
    """
    try:
        with open_image(path) as image:
            return np.asarray(image)
    except (MemoryError, LightningDiTError):
        raise
    except Exception as error:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
        raise LightningDiTError(f"{shown(path)} cannot be read ({first_line(error)})", fix) from error


def open_level_files(levels: Path, split_file: Path) -> LevelFiles:
    """Return the files of a folder that `step5_prepare_spectrograms.py --write` made, by the rows of its split.

    A restricted split has the windows, and so the levels, of the split that it is of.

    Raises:
        LightningDiTError: the folder is no such folder, is not complete, or is of another split.
    """
    split = load_split(split_file)
    fix = again(split, split_file, levels)
    try:
        content = read_json(levels / MANIFEST, MOST_BYTES)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        digest, digests = content.get("split"), content.get("digests")
        files, size, db_range = content["files"], content.get("pixels"), content["db_range"]
    except (OSError, ValueError, KeyError) as error:
        raise LightningDiTError(f"{levels} holds no levels of step 5 ({first_line(error)})", fix) from error
    if digest not in (split.digest, split.parent or split.digest):
        reason = "another split than" if digest else "an earlier release, which did not name the split;"
        raise LightningDiTError(
            f"the levels in {levels} are of {reason} {split_file}", f"name the split of these levels, or {fix}"
        )
    if not digests or not size:
        raise LightningDiTError(f"the levels in {levels} are not complete", fix)
    try:
        found = {at: (files[row.name], digests[row.name]) for at, row in enumerate(split.rows)}
        known = _checked_numbers(found, size, db_range)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise LightningDiTError(
            f"the levels in {levels} lack windows of {split_file} or say them wrongly ({first_line(error)})", fix
        ) from error
    is_measured = content.get("db_range_of") == MEASURED
    return LevelFiles(levels, split, (size[0], size[1]), found, known, is_measured, split_file)


def _checked_numbers(files: _Files, size: Any, db_range: Any) -> tuple[float, float] | None:
    """Return the dB range of a manifest, None where it is unknown; raises ValueError for what cannot be."""
    if not all(isinstance(text, str) for texts in files.values() for text in texts):
        raise ValueError("files and digests are no texts")
    if len(size) != 2 or not all(type(side) is int and 0 < side < MOST_SIDE for side in size):
        raise ValueError(f"windows of {str(size)[:40]} pixels")
    if db_range is None:
        return None
    low, high = map(float, db_range)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"a range from {low} to {high} dB")
    return low, high


def again(split: Split, split_file: Path, levels: Path) -> str:
    """Return the command that writes the levels of a split; options of other settings are those of the first run."""
    # not the restricted split, which step 5 does not write
    whole = Path(split.settings.get(PARENT_FILE, split_file))
    words = ["python", "step5_prepare_spectrograms.py", "--data", split.data, "--output", str(whole.parent)]
    if seed := split.settings.get("seed", 0):
        words += ["--seed", str(seed)]
    if split.folds != FOLDS:
        words += ["--folds", str(split.folds)]
    return shlex.join([*words, "--write", str(levels)])  # quoted: the split's texts may be a stranger's


# ---- the numbers of people and conditions


def condition_names(split: Split) -> tuple[str, ...] | None:
    """Return all conditions of a split in their natural order; None if it has one."""
    names = sorted({_condition(row) for row in split.rows}, key=natural_key)
    return tuple(names) if len(names) > 1 else None


def _condition(row: Row) -> str:
    return row.condition or NO_CONDITION


def _pass_numbers(split: Split) -> dict[tuple[str, int], int]:
    """Return a number for each pass of each person, counted over all people of the split."""
    found = sorted({(row.person, row.pass_number) for row in split.rows}, key=lambda one: (natural_key(one[0]), one[1]))
    return {key: number for number, key in enumerate(found)}


def _of_part(split: Split, split_file: Path, part: str, fold: int) -> list[int]:
    """Return the rows of a part; raises LightningDiTError if there are none, or a test window is trained on."""
    chosen = {row.name for row in split.part(part, fold)}
    rows = [at for at, row in enumerate(split.rows) if row.name in chosen]
    if not rows:
        raise LightningDiTError(
            f"fold {fold} of {split_file} has no {part} windows: nobody has enough passes for it",
            "choose another fold, or record three passes or more of each person",
        )
    if part == "training":
        split.refuse_tested(chosen, [split.rows[at].digest for at in rows], fold)
    return rows


def has_windows(split_file: Path, part: str, fold: int = 0) -> bool:
    """Whether a part of a split has windows; with one pass each, people have no validation."""
    return bool(load_split(split_file).part(part, fold))


def load_windows(levels: Path, split_file: Path, part: str, fold: int = 0) -> Windows:
    """Return the windows of a part of a split.

    Args:
        part: of `split.PARTS`.

    Raises:
        LightningDiTError: see `open_level_files` and `LevelFiles.read`; or the part is empty.
    """
    opened = open_level_files(levels, split_file)
    split, rows = opened.split, _of_part(opened.split, split_file, part, fold)
    pixels = torch.empty(len(rows), 1, *opened.size)
    for at, row in enumerate(rows):
        pixels[at, 0] = torch.from_numpy(opened.read(row) * 2 - 1)
    return _windows(split, rows, pixels, opened.db_range)


def listed_windows(split: Split, part: str, fold: int = 0) -> Windows:
    """Return the windows of a part without their pixels, (N, 1, 0, 0); there may be none."""
    rows = [at for at, row in enumerate(split.rows) if row.parts[fold] == part]
    return _windows(split, rows, torch.empty(len(rows), 1, 0, 0), None)


def _windows(split: Split, rows: Sequence[int], pixels: Tensor, db_range: tuple[float, float] | None) -> Windows:
    conditions, passes = condition_names(split), _pass_numbers(split)
    people = {name: number for number, name in enumerate(split.people)}
    chosen = [split.rows[row] for row in rows]
    return Windows(
        pixels,
        torch.tensor([people[row.person] for row in chosen], dtype=torch.long),
        torch.tensor([conditions.index(_condition(row)) if conditions else 0 for row in chosen], dtype=torch.long),
        torch.tensor([passes[row.person, row.pass_number] for row in chosen], dtype=torch.long),
        torch.tensor(rows, dtype=torch.long),
        tuple(people),
        conditions,
        db_range,
    )


# ---- an image set


def open_levels(
    levels: Path,
    split_file: Path,
    part: str,
    fold: int = 0,
    draws: int = 1,
    seed: int = 0,
    augmentation: Augmentation | None = None,
) -> LevelImages:
    """Return the windows of a part as square images of one channel, each in several draws.

    Args:
        part: of `split.PARTS`; only training windows have several draws.
        draws: of each window, the first of which is the window itself.
        seed: of the others.
        augmentation: what they change; by default `Augmentation()`.

    Raises:
        LightningDiTError: see `load_windows`; or the windows are not square, or others than training windows are to
            be augmented.
    """
    opened = open_level_files(levels, split_file)
    height, width = opened.size
    if height != width:
        raise LightningDiTError(
            f"the windows in {levels} have {width}x{height} pixels, and networks take squares",
            f"{opened.again_in()} --size {_near_square(height, width)}",
        )
    if draws > 1 and part != "training":
        raise LightningDiTError(
            f"{draws} draws of {part} windows are asked for, which are used as they are", "give --draws 1"
        )
    rows = _of_part(opened.split, split_file, part, fold)
    return LevelImages(opened, rows, part, fold, draws, seed, augmentation or Augmentation())


def _near_square(height: int, width: int) -> int:
    """Return a power of two near the longer side, from 32 to 256."""
    return min(256, max(32, 2 ** round(np.log2(max(height, width)))))


class LevelImages(ImageSet):
    """Windows of levels; image n is draw n % draws of window n // draws.

    Attributes:
        rows: of the split, one for each window.
        span: dB from level 0 to level 1, as the augmentation counts it.
    """

    def __init__(
        self,
        opened: LevelFiles,
        rows: Sequence[int],
        part: str,
        fold: int,
        draws: int,
        seed: int,
        augmentation: Augmentation,
    ) -> None:
        self.opened, self.rows, self.part, self.fold = opened, rows, part, fold
        self.draws, self.seed, self.augmentation = draws, seed, augmentation
        self.has_statistics = part == "training"
        split = opened.split
        people = {name: number for number, name in enumerate(split.people)}
        labels = torch.tensor([people[split.rows[row].person] for row in rows]).repeat_interleave(draws)
        source = f"{part} windows of fold {fold} in {opened.folder}"
        super().__init__(source, len(rows) * draws, Classes(labels, tuple(people)))
        self.condition_names = condition_names(split)
        names = self.condition_names
        self._conditions = [names.index(_condition(split.rows[row])) if names else 0 for row in rows]
        low, high = opened.db_range or (0.0, ASSUMED_SPAN)
        self.span = high - low
        self.notes = (*self._notes(tuple(people)), *(self._draw_notes() if draws > 1 else ()))

    def _notes(self, people: tuple[str, ...]) -> list[str]:
        notes = []
        there = {self.opened.split.rows[row].person for row in self.rows}
        if lacking := [name for name in people if name not in there]:
            more = f" and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
            never = ", which are never trained" if self.part == "training" else ""
            names = ", ".join(map(shown, lacking[:LISTED]))
            notes.append(f"people without {self.part} windows in fold {self.fold}{never}: {names}{more}")
        if self.fold and self.opened.is_measured:
            notes.append(f"the dB range of {self.opened.folder} is that of the training windows of fold 0")
        return notes

    def _draw_notes(self) -> list[str]:
        """Return what the draws do, and how many values leave the range by it."""
        lost, total = 0, 0
        for window in evenly_spaced(len(self.rows), PROBED):
            levels = self.opened.read(self.rows[window])
            drawn, _ = augmented(levels, self.augmentation, self.span, self.seed, self.rows[window], 1)
            lost += int((drawn == 0).sum()) - int((levels == 0).sum())
            total += levels.size
        assumed = "" if self.opened.db_range else f"; the dB range is unknown, {ASSUMED_SPAN:g} dB are assumed"
        return [
            f"{self.draws} draws of each window: {self.augmentation.text}; {max(0, lost) / total:.1%} more values at"
            f" the low end of the range{assumed}"
        ]

    @property
    def windows(self) -> Tensor:
        """(N,) int64, the row of the split that each image comes from."""
        return torch.tensor(self.rows).repeat_interleave(self.draws)

    def levels(self, number: int) -> tuple[Levels, NDArray[np.float32]]:
        """Return levels (H, W) in 0 to 1 of an image, and the vector (A,) of its augmentation."""
        window, draw = divmod(number, self.draws)
        row = self.rows[window]
        return augmented(self.opened.read(row), self.augmentation, self.span, self.seed, row, draw)

    def cropped(self, size: int | None, fit: str = "crop") -> ImageSet:
        """Return the same images; raises LightningDiTError if they have another size, since nothing is cut here."""
        side = self.opened.size[0]
        if size not in (None, side):
            raise LightningDiTError(
                f"the windows in {self.opened.folder} have {side}x{side} pixels, {size}x{size} are asked for",
                f"set data.image_size: {side}, or {self.opened.again_in()} --size {size}",
            )
        images = copy.copy(self)
        images.size, images.fit = size, fit
        return images

    def _row(self, number: int, unreadable: Unreadable) -> Any:
        """Return number, levels and vector; a damaged file raises LightningDiTError, whatever `unreadable` is."""
        return number, *self.levels(number)

    def _batch(self, rows: Sequence[Any]) -> ImageBatch:
        numbers, levels, vectors = zip(*rows, strict=True)
        count, windows = len(numbers), [number // self.draws for number in numbers]
        return ImageBatch(
            torch.from_numpy(np.stack(levels)).unsqueeze(1) * 2 - 1,
            torch.tensor([self._label(number) for number in numbers]),
            torch.ones(count, dtype=torch.bool),
            [],
            torch.zeros(count),
            torch.tensor([self._conditions[window] for window in windows]) if self.condition_names else None,
            torch.from_numpy(np.stack(vectors)) if self.draws > 1 else None,
            torch.tensor([self.rows[window] for window in windows]),
        )

    def name(self, number: int) -> str:
        return shown(self.opened.folder / "levels" / self.opened.files[self.rows[number // self.draws]][0])

    @property
    def extras(self) -> dict[str, Tensor]:
        numbers, vectors = torch.zeros(0, dtype=torch.long), torch.zeros(0, len(NAMES))
        return {
            **({"conditions": numbers} if self.condition_names else {}),
            **({"augmentation": vectors} if self.draws > 1 else {}),
            "windows": numbers,
        }

    @property
    def settings(self) -> dict[str, Any]:
        split = {"digest": self.opened.split.digest, "fold": self.fold, "part": self.part}
        drawn = {"seed": self.seed, "span": self.span, **self.augmentation.settings} if self.draws > 1 else {}
        return {"split": split, "draws": self.draws, **({"augmentation": drawn} if drawn else {})}

    @property
    def facts(self) -> dict[str, Any]:
        split = {"digest": self.opened.split.digest, "fold": self.fold, "part": self.part}
        names = list(NAMES) if self.draws > 1 else None
        return {"condition_names": self.condition_names, "augmentation": names, "draws": self.draws, "split": split}

    @property
    def key(self) -> str:
        digests = [self.opened.files[row] for row in self.rows]
        labels = self.labels.tolist() if self.labels is not None else []
        content = [digests, labels, self.class_names, self.settings, self.opened.size]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
