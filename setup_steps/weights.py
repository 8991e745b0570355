"""The search for the weights that the registry of the library names, and the folders that they lie in."""

from __future__ import annotations

import contextlib
import os
import re
import time
from argparse import ArgumentParser
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from LightningDiT.console import format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import rename_command
from LightningDiT.hub.registry import (  # noqa: F401 - the steps read the registry from here
    DIT,
    MODELS_VARIABLE,
    PRECISIONS,
    ROLES,
    SETS,
    STATS,
    VAVAE,
    WeightFile,
    converted_name,
    files_of,
    usable_names,
)
from setup_steps.project import PROJECT, STEP2, absolute, again, step_command

MODELS = PROJECT / "models"
BUNDLED = MODELS / "fashion-mnist"
KAGGLE_INPUT, KAGGLE_WORKING = Path("/kaggle/input"), Path("/kaggle/working")
KEPT_BYTES = 20_000_000_000  # the most that Kaggle keeps of /kaggle/working
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # lines break at some, others are no UTF-8
ATTACHED_VARIABLE = "LIGHTNINGDIT_ATTACHED"
SAY_EVERY = 5.0  # seconds between two lines of a long walk


RESTORE_BUNDLED = "git restore models/fashion-mnist, or clone the project again"
BUNDLED_FILES = (
    "config.yaml",
    "tokenizer.yaml",
    "transformer.safetensors",
    "tokenizer.safetensors",
    "latents_stats.pt",
    "solvers.yaml",
)


def published_in(folder: Path) -> list[str]:
    """Return the names of the published files in `folder`, whole or damaged."""
    return [file.name for file in SETS["all"] if (folder / file.name).exists()]


def require_bundled() -> None:
    """Raise LightningDiTError if files of the bundled model are absent or empty."""
    paths = [BUNDLED / name for name in BUNDLED_FILES]
    missing = [path.name for path in paths if not path.is_file() or not path.stat().st_size]
    if missing:
        raise LightningDiTError(f"{BUNDLED} lacks {', '.join(missing)}", RESTORE_BUNDLED)


def add_models_option(parser: ArgumentParser) -> None:
    """Add --models-dir to the command line of a step."""
    words = f"folder of the published weights; default: {MODELS_VARIABLE}, else models/"
    parser.add_argument("--models-dir", type=Path, metavar="FOLDER", help=words)


def models_folder(named: Path | None, script: str = STEP2, said: bool = True) -> Path:
    """Return the folder of the published weights, made absolute: the one that --models-dir names, else that in
    LIGHTNINGDIT_MODELS, else models/. A line says which it is unless it is models/.

    Args:
        script: the step that a fix names if none of the project's scripts runs.
        said: print that line.

    Raises:
        LightningDiTError: it is a file, or the folder of the bundled model, whose files have the same names.
    """
    variable = os.environ.get(MODELS_VARIABLE, "")
    whose = "--models-dir" if named else MODELS_VARIABLE
    fix = partial(again, script, "--models-dir", without=["--models-dir"])
    if not named and (bare := variable.strip(" \t\"'")) != variable:
        message = f"{whose} is {variable!r}, a path without quotation marks and spaces around it was expected"
        raise LightningDiTError(message, f"%env {whose}={bare or 'FOLDER'}, or {fix(bare or 'FOLDER')}")
    if not (named or variable):
        return MODELS
    given = named or Path(variable)
    if CONTROL.search(str(given)):
        message = f"{whose} is {str(given)!r}, which holds characters that are none of a text"
        raise LightningDiTError(message, fix("FOLDER"))
    if given.is_symlink() and not given.exists():
        message = f"{whose} {given} is a link to {given.readlink()}, which is not there: the data set is detached"
        raise LightningDiTError(message, fix("FOLDER"))
    folder = absolute(given)
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir():
        message = f"{whose} {folder} cannot be a folder: {above} is a file, a folder was expected"
        raise LightningDiTError(message, fix(str(above.parent)))
    if folder == BUNDLED.resolve():
        message = f"{whose} {folder} is the folder of the bundled model, whose files have the same names"
        raise LightningDiTError(message, fix("FOLDER"))
    if said and folder != MODELS.resolve():
        print(f"The published weights are in {folder} ({whose}).")
    return folder


def named_models(named: Path | None) -> list[str]:
    """Return the option that tells the next step of a folder which --models-dir named."""
    return ["--models-dir", str(absolute(named))] if named else []


def say_unused(named: Path | None) -> None:
    """Say that --models-dir has no effect on the bundled model."""
    if named:
        print(f"  --models-dir has no effect: the bundled model is in {BUNDLED}")


def keeps_on_kaggle(folder: Path, needed: int) -> str:
    """Return a line that says whether Kaggle keeps what is written to a folder; empty elsewhere.

    Raises:
        LightningDiTError: `needed` bytes more than the rest are beyond what Kaggle keeps.
    """
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        return ""
    kept, elsewhere = KAGGLE_WORKING.resolve(), KAGGLE_WORKING.with_name("temp") / "models"
    option = partial(again, STEP2, "--models-dir", without=["--models-dir"])
    if not folder.is_relative_to(kept):
        return f"{folder} is gone when the session ends; to keep the files: {option(str(kept / 'models'))}"
    there = sum(path.lstat().st_size for path in kept.rglob("*") if path.is_file() and not path.is_symlink())
    if there + needed > KEPT_BYTES:
        rest = f"{kept} holds {format_bytes(there)}, and Kaggle keeps {format_bytes(KEPT_BYTES)} of it"
        raise LightningDiTError(f"the files take {format_bytes(needed)}; {rest}", option(str(elsewhere)))
    words = f"Save Version keeps {folder}: {format_bytes(there + needed)} of {format_bytes(KEPT_BYTES)} are then used"
    return f"{words}; not to keep it: {option(str(elsewhere))}"


def attached_folder() -> Path | None:
    """Return the folder of attached data sets: that in LIGHTNINGDIT_ATTACHED, or /kaggle/input on Kaggle; else None."""
    named = os.environ.get(ATTACHED_VARIABLE)
    if named:
        return absolute(Path(named))
    return KAGGLE_INPUT if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else None


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield every folder from `folder` down with the names of its folders and files.

    Links to folders are followed, each folder is read once, and a long walk reports its progress.
    """
    seen = set()
    said = time.monotonic()
    for name, folders, files in os.walk(folder, followlinks=True):
        stat = Path(name).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            print(f"  searching {folder}: {len(seen)} folders so far", flush=True)
        yield Path(name), folders, files


def newest_first(path: Path) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts paths by name, and folders that are numbers, as Kaggle calls versions, from the highest
    one down.
    """
    return tuple((-int(part), "") if re.fullmatch("[0-9]{1,9}", part) else (1, part) for part in path.parts)


def is_newer(path: Path, other: Path) -> bool:
    """Return whether two paths differ in one folder, a number that is higher in `path`."""
    if len(path.parts) != len(other.parts):
        return False
    differing = [pair for pair in zip(newest_first(path), newest_first(other), strict=True) if pair[0] != pair[1]]
    return len(differing) == 1 and max(differing[0])[0] <= 0 and differing[0][0] < differing[0][1]


def newer_version(path: Path) -> Path | None:
    """Return the file at the same place in the folder with the highest number that is higher than the path's own; None
    if there is none.
    """
    found = [path]
    for index, part in enumerate(path.parts):
        if re.fullmatch("[0-9]{1,9}", part):
            with contextlib.suppress(OSError):  # a folder that may be entered and not listed
                beside = Path(*path.parts[:index]).iterdir()
                found += [folder.joinpath(*path.parts[index + 1 :]) for folder in beside]
    newest = min(
        (other for other in found if other == path or (is_newer(other, path) and other.is_file())), key=newest_first
    )
    return None if newest == path else newest


def search(folder: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """Return the files and folders with one of `names` at any depth below `folder`, by name; the highest version comes
    first, else they are in order.
    """
    found: dict[str, list[Path]] = {name: [] for name in names}
    for path, folders, files in walk(folder):
        for name in found.keys() & {*folders, *files}:
            found[name].append(path / name)
    return {name: sorted(paths, key=newest_first) for name, paths in found.items()}


class Tree:
    """The published files and their converted copies below a folder, found by one walk at the first question: with a
    million files attached it takes minutes. The folder is None if nothing is attached.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._found: dict[str, list[Path]] | None = None

    def paths(self, file: WeightFile) -> list[Path]:
        """Return the files and folders with one of the file's names, the best name first."""
        if self._found is None:
            names = [name for published in SETS["all"] for name in usable_names(published)]
            self._found = search(self.folder, names) if self.folder else {}
        return [path for name in usable_names(file) for path in self._found.get(name, [])]


def find_file(file: WeightFile, models: Path, attached: Tree | None) -> Path | None:
    """Return the path of a file, or of a converted copy of it, in `models` or at any depth of `attached`; raise
    LightningDiTError if a folder has the name.
    """
    here = [models / name for name in usable_names(file)]
    found = next(filter(Path.is_file, here), None)
    there = attached.paths(file) if attached and not found else []
    found = found or next(filter(Path.is_file, there), None)
    folder = next(filter(Path.is_dir, (*here, *there)), None)
    if folder and not found:
        raise LightningDiTError(
            f"{folder} is a folder, the file {folder.name} was expected there",
            f"{rename_command(folder, '.folder')} && {step_command(STEP2)}",
        )
    return found


def bytes_to_come(file: WeightFile, models: Path, attached: Tree) -> int:
    """Return about how many bytes a download of a file will still write; none for one that is here."""
    return 0 if find_file(file, models, attached) else bytes_left(models / file.name, file.approx_bytes)


def bytes_left(target: Path, size: int) -> int:
    """Return how many of `size` bytes are not yet in NAME.part, the file of an interrupted download."""
    part = target.with_name(f"{target.name}.part")
    return max(0, size - (part.stat().st_size if part.is_file() else 0))
