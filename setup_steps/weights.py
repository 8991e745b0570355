"""The registry of weights: what each file is called, where it lies and what it is for."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from setup_steps.console import PROJECT, StepError, absolute, rename_command, step_command

MODELS = PROJECT / "models"
BUNDLED = MODELS / "fashion-mnist"
KAGGLE_INPUT = Path("/kaggle/input")
ATTACHED_VARIABLE = "LIGHTNINGDIT_ATTACHED"
SAY_EVERY = 5.0  # seconds between two lines of a long walk
PRECISIONS = ("fp32", "bf16", "fp16")
"""What a transformer's weights can be converted to, the ones with the same numbers first."""


@dataclass(frozen=True)
class WeightFile:
    """One published file.

    Args:
        name: file name on the hub and in models/.
        repo: repository on the hub.
        approx_bytes: size for plans and dry runs; the exact one comes from the hub.
        role: "vavae" (tokenizer), "stats" (latent statistics) or "dit" (diffusion transformer).
        table: section of LightningDiT/checkpoint_keys.json that its tensors are compared with.
    """

    name: str
    repo: str
    approx_bytes: int
    role: str
    table: str | None


_VAVAE_REPO = "hustvl/vavae-imagenet256-f16d32-dinov2"
VAVAE = WeightFile("vavae-imagenet256-f16d32-dinov2.pt", _VAVAE_REPO, 800_000_000, "vavae", "vavae-f16d32")
STATS = WeightFile("latents_stats.pt", _VAVAE_REPO, 1_000, "stats", None)
DIT = {
    epochs: WeightFile(
        f"lightningdit-xl-imagenet256-{epochs}.pt",
        f"hustvl/lightningdit-xl-imagenet256-{epochs}",
        6_000_000_000,
        "dit",
        "LightningDiT-XL/1",
    )
    for epochs in ("800ep", "64ep")
}

SETS: dict[str, tuple[WeightFile, ...]] = {
    "800ep": (VAVAE, STATS, DIT["800ep"]),
    "64ep": (VAVAE, STATS, DIT["64ep"]),
    "all": (VAVAE, STATS, DIT["800ep"], DIT["64ep"]),
    "bundled": (),  # comes with the project, see BUNDLED_FILES
}
ROLES = ("vavae", "stats", "dit")
RESTORE_BUNDLED = "git restore models/fashion-mnist, or clone the project again"
BUNDLED_FILES = (
    "config.yaml",
    "tokenizer.yaml",
    "transformer.safetensors",
    "tokenizer.safetensors",
    "latents_stats.pt",
    "solvers.yaml",
)


def files_of(model: str, only: str | None = None) -> tuple[WeightFile, ...]:
    """The published files of a model set, or those of one role among them."""
    return tuple(file for file in SETS[model] if only in (None, file.role))


def published_in(folder: Path) -> list[str]:
    """Names of the published files that `folder` holds, whole or damaged."""
    return [file.name for file in SETS["all"] if (folder / file.name).exists()]


def missing_bundled() -> list[str]:
    """Names of the bundled model's files that are absent or empty."""
    return [name for name in BUNDLED_FILES if not (BUNDLED / name).is_file() or not (BUNDLED / name).stat().st_size]


def attached_folder() -> Path | None:
    """Where data sets are attached: what LIGHTNINGDIT_ATTACHED names, or /kaggle/input on Kaggle;
    None elsewhere.
    """
    named = os.environ.get(ATTACHED_VARIABLE)
    if named:
        return absolute(Path(named))
    return KAGGLE_INPUT if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else None


def converted_name(name: str, precision: str) -> str:
    """'a.pt', 'fp16' -> 'a.fp16.safetensors'."""
    return f"{Path(name).stem}.{precision}.safetensors"


def usable_names(file: WeightFile) -> tuple[str, ...]:
    """Names that the file may have, the best first: of a transformer also the converted copies, the
    one in fp32 (same numbers, mapped faster) before the original and the others after it.
    """
    if file.role != "dit":
        return (file.name,)
    exact, *rounded = (converted_name(file.name, precision) for precision in PRECISIONS)
    return (exact, file.name, *rounded)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder from `folder` down, with the names of the folders and of the files in it. Links to
    folders are followed, each folder is read once, and a walk that takes long says that it goes on.
    """
    seen = set()
    said = time.monotonic()
    for place, folders, files in os.walk(folder, followlinks=True):
        stat = Path(place).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            print(f"  searching {folder}: {len(seen)} folders so far", flush=True)
        yield Path(place), folders, files


def search(folder: Path, names: Collection[str]) -> dict[str, list[Path]]:
    """What carries one of `names` at any depth below `folder`, files and folders, by name and in order."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    for place, folders, files in walk(folder):
        for name in found.keys() & {*folders, *files}:
            found[name].append(place / name)
    return {name: sorted(paths) for name, paths in found.items()}


class Tree:
    """The published files and their converted copies below a folder. It is read in one walk for all of
    them, and not before it is asked: with a million files attached a walk takes minutes.

    Args:
        folder: None where nothing is attached.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._found: dict[str, list[Path]] | None = None

    def paths(self, file: WeightFile) -> list[Path]:
        """What carries one of the file's names, files and folders, the best name first."""
        if self._found is None:
            names = [name for published in SETS["all"] for name in usable_names(published)]
            self._found = search(self.folder, names) if self.folder else {}
        return [path for name in usable_names(file) for path in self._found.get(name, [])]


def find_file(file: WeightFile, models: Path, attached: Path | Tree | None) -> Path | None:
    """Look for a file, or a converted copy of it, in `models`, then at any depth below `attached`, which
    is a Tree where one walk serves several files.

    Raises:
        StepError: what carries the name is a folder.
    """
    tree = attached if isinstance(attached, Tree) else Tree(attached)
    here = [models / name for name in usable_names(file)]
    for path in here:
        if path.is_file():
            return path
    there = tree.paths(file)
    for path in there:
        if path.is_file():
            return path
    for path in (*here, *there):
        if path.is_dir():
            raise StepError(
                f"{path} is a folder, the file {path.name} was expected there",
                f"{rename_command(path, '.folder')} && {step_command('step2_download_models.py')}",
            )
    return None


def bytes_to_come(file: WeightFile, models: Path, attached: Tree) -> int:
    """About how many bytes a download of a file will still write: none where it is at hand, else all but
    what an interrupted one has left in NAME.part.
    """
    if find_file(file, models, attached):
        return 0
    part = models / (file.name + ".part")
    return max(0, file.approx_bytes - (part.stat().st_size if part.is_file() else 0))
