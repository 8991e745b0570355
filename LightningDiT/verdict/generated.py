"""Generated windows on disk: a folder for each person, written by a run of sampling or by any other generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LightningDiT.data.image_files import WHITE_16_BIT, find_images, shown
from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, Labels, natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json
from LightningDiT.radar.level_images import LevelFiles, condition_names, raw_pixels
from LightningDiT.radar.split import MOST_BYTES
from LightningDiT.radar.written import levels_digest
from LightningDiT.sampling.resumable_run import BY_CLASS, CONDITIONS, LAYOUT, LEVELS, MANIFEST, PIXELS, class_folders
from LightningDiT.verdict.rows import Generated

UNKNOWN = -1  # number of a condition that nothing says
UNTESTED = ("training", "guard")  # parts whose windows a generator may give back
AGAIN = "generate these windows again"
GENERATE = "generate them as levels: grey PNG files of 16 bits, 65535 for level 1, in a folder for each person"


@dataclass(frozen=True)
class Files:
    """Files of generated windows with the names of their people and conditions; None for an unknown condition."""

    paths: Sequence[Path]
    people: Sequence[str]
    conditions: Sequence[str | None]


def manifest_of(folder: Path) -> Mapping[str, Any]:
    """Return the manifest of a run of sampling; empty if the folder has none.

    Raises:
        LightningDiTError: it is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return {}
    try:
        content = read_json(file, MOST_BYTES)
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise LightningDiTError(
            f"{file} cannot be read ({first_line(error)})", "generate these windows again"
        ) from error
    return content


def find_generated(folder: Path) -> Files:
    """Return the files of a folder, in the order in which they were asked for, or of their names.

    Raises:
        LightningDiTError: there are none, or the run that wrote the folder is not complete.
    """
    content = manifest_of(folder)
    files = _of_run(folder, content) if content.get(LAYOUT) == BY_CLASS else _of_folders(folder)
    if not files.paths:
        raise LightningDiTError(f"{folder} holds no folder of a person with generated windows", GENERATE)
    return files


def _of_run(folder: Path, content: Mapping[str, Any]) -> Files:
    try:
        if content.get(PIXELS) != LEVELS:
            raise ValueError("its images are no levels")
        names, labels = content[CLASS_NAMES], content["labels"]
        folders = class_folders(Labels(len(names), tuple(names), tuple(names)))
        paths = [folder / folders[label] / f"{at:06d}.png" for at, label in enumerate(labels)]
        people = [names[label] for label in labels]
        numbers, words = content.get(CONDITIONS) or [None] * len(labels), content.get(CONDITION_NAMES)
        conditions = [words[number] if words and number is not None else None for number in numbers]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise LightningDiTError(f"{folder} is no run of generated windows ({first_line(error)})", GENERATE) from error
    if missing := sum(not path.is_file() for path in paths):
        raise LightningDiTError(
            f"{folder} lacks {missing} of {len(paths)} generated windows", "run the command that generates them again"
        )
    return Files(paths, people, conditions)


def _of_folders(folder: Path) -> Files:
    if not folder.is_dir():
        raise LightningDiTError(f"{folder} is no folder of generated windows that is there", GENERATE)
    paths, people = [], []
    for person in sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: natural_key(path.name)):
        own = sorted(find_images(person).files, key=lambda path: natural_key(str(path)))
        paths += own
        people += [person.name] * len(own)
    return Files(paths, people, [None] * len(paths))


def read_generated(folder: Path, opened: LevelFiles, fold: int) -> Generated:
    """Return the generated windows of a folder with the numbers that the split's people and conditions have.

    Args:
        opened: the real windows.
        fold: whose test and validation windows must not be among them.

    Raises:
        LightningDiTError: see `find_generated`; or people or conditions are unknown, a file is no window of this size
            and one channel, or holds a real window of the test.
    """
    files, split = find_generated(folder), opened.split
    people = {name: number for number, name in enumerate(split.people)}
    if unknown := [name for name in files.people if name not in people]:
        raise LightningDiTError(
            f"{folder} has windows of {unknown[0]!r}, and the split has no such person ({', '.join(people)})",
            "name each folder after a person of the split",
        )
    names = condition_names(split) or ()
    numbers = [names.index(name) if name in names else UNKNOWN for name in files.conditions]
    tested = {opened.files[at][1]: row.name for at, row in enumerate(split.rows) if row.parts[fold] not in UNTESTED}
    pixels, coarse = torch.empty(len(files.paths), 1, *opened.size), 0
    for at, path in enumerate(files.paths):
        grey = _grey(path, opened.size)
        is_coarse = grey.dtype == np.uint8
        coarse += is_coarse
        grey = grey.astype(np.int64) * 257 if is_coarse else grey.astype(np.int64).clip(0, WHITE_16_BIT)
        if (known := tested.get(levels_digest(grey))) is not None:
            raise LightningDiTError(
                f"{shown(path)} is the real window {known}, which fold {fold} tests or validates on",
                "generate windows by a model that saw training windows alone",
            )
        pixels[at, 0] = torch.from_numpy((grey / WHITE_16_BIT * 2 - 1).astype(np.float32))
    if coarse:
        print(f"note: {coarse} of {len(pixels)} generated windows have 8 bits, the real ones have 16", flush=True)
    return Generated(
        pixels,
        torch.tensor([people[name] for name in files.people]),
        torch.tensor(numbers) if names else torch.zeros(len(numbers), dtype=torch.long),
    )


def _grey(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (H, W) of a file, which has one channel and the size of the real windows."""
    grey = raw_pixels(path, GENERATE)
    if grey.shape != size:
        sides = "x".join(map(str, grey.shape[1::-1]))
        channels = f" and {grey.shape[2]} channels" if grey.ndim == 3 else ""
        raise LightningDiTError(
            f"{shown(path)} has {sides} pixels{channels}, the real windows have {size[1]}x{size[0]} and one channel",
            GENERATE,
        )
    return grey


def lacking(people: torch.Tensor, real: torch.Tensor, times: int, names: Sequence[str]) -> str:
    """Return a line that names people with fewer than `times` generated windows for each real one; empty without any.

    Args:
        people, real: (N,), (M,) the person of each generated and of each real window.
    """
    made, wanted = Counter(people.tolist()), Counter(real.tolist())
    short = [person for person in sorted(wanted) if made[person] < times * wanted[person]]
    if not short:
        return ""
    first = short[0]
    return (
        f"note: fewer generated windows than {times} for each real one of {len(short)} people, such as {names[first]}:"
        f" {made[first]} for {wanted[first]}; rows take what there is"
    )
