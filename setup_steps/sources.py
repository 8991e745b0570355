"""Where step 2 takes a file from: the hub, or a folder that is searched by file name and linked to.

An attached data set is read-only and as good as local: a link costs neither the time nor the disk
of a 6 GB copy.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from setup_steps.console import Progress, StepError, format_bytes
from setup_steps.downloads import CHUNK, again, require_disk
from setup_steps.files import replacing
from setup_steps.weights import Tree, WeightFile, usable_names

SOURCE_OPTIONS = ("--source", "--attached", "--folder")
KINDS = ("auto", "hub", "attached", "folder")


@dataclass(frozen=True)
class Source:
    """Where the files of a run may come from.

    Args:
        kind: "auto" (what is attached, then the hub), "hub", "attached" or "folder".
        folder: searched by file name at any depth; None where no folder is.
    """

    kind: str = "hub"
    folder: Path | None = None

    @property
    def asks_hub(self) -> bool:
        return self.kind in ("auto", "hub")

    @cached_property
    def _tree(self) -> Tree:
        """What the folder holds, read once for all files."""
        return Tree(self.folder)

    def candidates(self, file: WeightFile, models: Path) -> list[Path]:
        """Files below the folder that carry one of the file's names, the best first, but for those
        that are in `models` already.
        """
        there = {os.path.realpath(models / name) for name in usable_names(file)}
        return [path for path in self._tree.paths(file) if path.is_file() and os.path.realpath(path) not in there]

    def find(self, file: WeightFile, models: Path, fault_of: Callable[[WeightFile, Path], str | None]) -> Path | None:
        """The first candidate without a fault; those with one are named."""
        paths = self.candidates(file, models)
        if self.folder and self.asks_hub and not paths:
            print(f"  {file.name}: not below {self.folder}, so the hub is asked")
        for path in paths:
            fault = fault_of(file, path)
            if fault is None:
                return path
            print(f"  {path} is passed over: {fault}")
        return None

    def explain_absence(self, file: WeightFile) -> StepError:
        """What to say where the folder holds no usable copy of a file and the hub is not to be asked."""
        names = ", ".join(usable_names(file))
        return StepError(
            f"{self.folder} holds no usable {file.name} at any depth (searched for {names})",
            f"{self._other_folder()}, or {again('--source', 'hub', without=SOURCE_OPTIONS)}",
        )

    def require_folder(self) -> None:
        """Raise StepError where the folder to search is none; a missing one is only said where the
        hub comes after it.
        """
        if self.folder is None or self.folder.is_dir():
            return
        fault = f"{self.folder} is {'a file' if self.folder.exists() else 'not there'}"
        if self.asks_hub:
            print(f"  {fault}; no attached folder is searched")
            return
        raise StepError(f"{fault}, the folder to search was expected", self._other_folder())

    def _other_folder(self) -> str:
        if self.kind == "folder":
            return again("--folder", "FOLDER", without=SOURCE_OPTIONS)
        return again("--source", "attached", "--attached", "FOLDER", without=SOURCE_OPTIONS)


def dangling_links(file: WeightFile, models: Path) -> list[Path]:
    """Links under the file's names that lead nowhere, as those to a detached data set do."""
    paths = [models / name for name in usable_names(file)]
    return [path for path in paths if path.is_symlink() and not path.exists()]


def at_hand(file: WeightFile, folder: Path) -> list[Path]:
    """The published file in `folder`; where it is absent, the converted copies of it."""
    if (folder / file.name).is_file():
        return [folder / file.name]
    return [folder / name for name in usable_names(file) if (folder / name).is_file()]


def leads_to(path: Path) -> str:
    """Where a link leads, in words; nothing for a file."""
    return f"linked to {path.resolve()}" if path.is_symlink() else ""


def link(source: Path, target: Path, aside: Path | None = None) -> str:
    """Make `target` a link to `source`, or a copy of it where links are not to be had (Windows
    without the right to make them, some network disks). What had the name is renamed to `aside` when
    the link or the copy is there, or replaced where that is not given.

    Returns:
        What was done, for the report.

    Raises:
        StepError: the disk has no room for the copy.
    """
    source = source.resolve()
    with replacing(target, aside) as fresh:
        try:
            fresh.symlink_to(source)
            return f"linked to {source}"
        except (OSError, NotImplementedError) as error:
            _copy(source, fresh)
            return f"copied from {source} (no link: {getattr(error, 'strerror', None) or error})"


def _copy(source: Path, target: Path) -> None:
    """Copy with progress and bring the copy to the disk.

    Raises:
        StepError: too little disk, or `source` gave fewer bytes than it has.
    """
    size = source.stat().st_size
    require_disk(target.parent, size)
    progress = Progress(f"copying {source.name}", size)
    with source.open("rb") as reader, target.open("wb") as writer, contextlib.closing(progress):
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            progress.update(writer.tell())
        writer.flush()
        os.fsync(writer.fileno())
    if target.stat().st_size != size:
        copied = format_bytes(target.stat().st_size)
        raise StepError(
            f"{source} gave {copied} of {format_bytes(size)}", f"ls -l {shlex.quote(str(source))}; {again()}"
        )
