"""Where step 2 takes a file from: the hub, or a folder that is searched by file name and linked to.

An attached data set is read-only and as good as local: a link saves the time and the disk of a 6 GB copy.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from LightningDiT.console import Progress, format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, bring_to_disk, open_regular, remove_leftovers, rename_command
from setup_steps.downloads import CHUNK, again, require_disk
from setup_steps.weights import Tree, WeightFile, is_newer, usable_names

SOURCE_OPTIONS = ("--source", "--attached", "--folder")
KINDS = ("auto", "hub", "attached", "folder")


@dataclass(frozen=True)
class Source:
    """Where the files of a run may come from.

    Args:
        kind: "auto" (attached folder, then the hub), "hub", "attached" or "folder".
        folder: searched by file name at any depth; None for the hub alone.
    """

    kind: str = "hub"
    folder: Path | None = None

    @property
    def asks_hub(self) -> bool:
        return self.kind in ("auto", "hub")

    @cached_property
    def _tree(self) -> Tree:
        """The folder's weights files, found once for all."""
        return Tree(self.folder)

    def candidates(self, file: WeightFile, models: Path) -> list[Path]:
        """Return the files below the folder with one of the file's names, the best first, without those in `models`."""
        there = {os.path.realpath(models / name) for name in usable_names(file)}
        return [path for path in self._tree.paths(file) if path.is_file() and os.path.realpath(path) not in there]

    def find(self, file: WeightFile, models: Path, fault_of: Callable[[WeightFile, Path], str | None]) -> Path | None:
        """Return the first candidate without a fault, and print those with one."""
        paths = self.candidates(file, models)
        if self.folder and self.asks_hub and not paths:
            print(f"  {file.name}: not below {self.folder}, so the hub is asked")
        for index, path in enumerate(paths):
            fault = fault_of(file, path)
            if fault is None:
                self._say_others(path, paths[index:])
                return path
            print(f"  {path} is passed over: {fault}")
        return None

    def _say_others(self, taken: Path, paths: list[Path]) -> None:
        """Say which file was taken if others have its name, unless they are links to it."""
        others = {path.resolve() for path in paths if path.name == taken.name} - {taken.resolve()}
        if others:
            is_newest = any(is_newer(taken, path) for path in paths)
            rule = "the highest version is taken" if is_newest else "the first is taken, another by --folder FOLDER"
            print(f"  {taken.name}: {1 + len(others)} files of that name below {self.folder}; {rule}: {taken}")

    def say_passed_over(self, file: WeightFile, kept: Path) -> None:
        """Say that a good file stays though the folder that was asked for has one of another size."""
        for path in self.candidates(file, kept.parent) if self.kind in ("attached", "folder") else ():
            if path.name == kept.name and path.stat().st_size != kept.stat().st_size:
                command = f"{rename_command(kept, '.old')} && {again()}"
                print(f"  {kept.name}: {path} has another size and is not taken; to take it: {command}")

    def explain_absence(self, file: WeightFile) -> LightningDiTError:
        """Return the error for a folder without a usable copy of a file, if the hub is not to be asked."""
        names = ", ".join(usable_names(file))
        return LightningDiTError(
            f"{self.folder} holds no usable {file.name} at any depth (searched for {names})",
            f"{self._other_folder()}, or {again('--source', 'hub', without=SOURCE_OPTIONS)}",
        )

    def require_folder(self) -> None:
        """Raise LightningDiTError if the folder to search is not one; only print that if the hub comes after it."""
        if self.folder is None or self.folder.is_dir():
            return
        fault = f"{self.folder} is {'a file' if self.folder.exists() else 'not there'}"
        if self.asks_hub:
            print(f"  {fault}; no attached folder is searched")
            return
        raise LightningDiTError(f"{fault}, the folder to search was expected", self._other_folder())

    def _other_folder(self) -> str:
        if self.kind == "folder":
            return again("--folder", "FOLDER", without=SOURCE_OPTIONS)
        return again("--source", "attached", "--attached", "FOLDER", without=SOURCE_OPTIONS)


def dangling_links(file: WeightFile, models: Path) -> list[Path]:
    """Return the links under the file's names that lead nowhere, as to a detached data set."""
    paths = [models / name for name in usable_names(file)]
    return [path for path in paths if path.is_symlink() and not path.exists()]


def at_hand(file: WeightFile, folder: Path) -> list[Path]:
    """Return the published file in `folder`, or if it is absent its converted copies."""
    published = folder / file.name
    return [published] if published.is_file() else present(file, folder)


def present(file: WeightFile, folder: Path) -> list[Path]:
    """Return the published file and its converted copies in `folder`, the best first."""
    return [folder / name for name in usable_names(file) if (folder / name).is_file()]


def leads_to(path: Path) -> str:
    """Return where a link leads, in words; empty for a file."""
    return f"linked to {path.resolve()}" if path.is_symlink() else ""


def link(source: Path, target: Path, aside: Path | None = None) -> str:
    """Make `target` a link to `source`, or a copy if the system makes no links (Windows without the right to make
    them, some network disks).

    Args:
        aside: new name of the file that was there, once the link or the copy is complete; by default it is replaced.

    Returns:
        What was done, for the report.

    Raises:
        LightningDiTError: the disk has no room for the copy.
    """
    source = source.resolve()
    remove_leftovers(target.parent)  # a copy takes 6 GB
    with atomic_path(target, aside, over_link=True) as fresh:
        fresh.unlink()
        try:
            fresh.symlink_to(source)
            return f"linked to {source}"
        except (OSError, NotImplementedError) as error:
            _copy(source, fresh)
            return f"copied from {source} (no link: {getattr(error, 'strerror', None) or error})"


def _copy(source: Path, target: Path) -> None:
    """Copy with progress to the disk; raise LightningDiTError if it is too small or `source` gives too few bytes."""
    size = source.stat().st_size
    require_disk(target.parent, size)
    with (
        open_regular(source) as reader,
        target.open("wb") as writer,
        Progress(size, "byte", label=f"copying {source.name}") as progress,
    ):
        while chunk := reader.read(CHUNK):
            progress.update(writer.write(chunk))
    bring_to_disk(target)
    if target.stat().st_size != size:
        copied, fix = format_bytes(target.stat().st_size), f"ls -l {shlex.quote(str(source))}; {again()}"
        raise LightningDiTError(f"{source} gave {copied} of {format_bytes(size)}", fix)
