"""What step 2 does with one file: keep it, fetch it, check it, open it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setup_steps import downloads
from setup_steps.console import Progress, StepError, format_bytes, format_seconds
from setup_steps.machine import require_torch
from setup_steps.weights import STATS, WeightFile

RECORD = ".downloads.json"


class Record:
    """models/.downloads.json: of each verified file its origin, hash, size and time stamp, so that
    the next run need neither hash 6 GB nor reach the hub.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows = {}
        self.rows: dict[str, dict[str, object]] = rows if isinstance(rows, dict) else {}

    def knows(self, path: Path) -> bool:
        """True where the file is the one that was verified, judged by size and time stamp."""
        row = self.rows.get(path.name)
        stat = path.stat()
        return isinstance(row, dict) and (row.get("size"), row.get("mtime_ns")) == (
            stat.st_size,
            stat.st_mtime_ns,
        )

    def remote(self, name: str) -> downloads.RemoteFile | None:
        """What the hub said of the file when it was verified."""
        row = self.rows.get(name)
        if not isinstance(row, dict) or not isinstance(row.get("remote"), dict):
            return None
        return downloads.RemoteFile(**row["remote"])  # type: ignore[arg-type]

    def note(self, path: Path, remote: downloads.RemoteFile) -> None:
        """Remember that `path` was hashed and equals `remote`."""
        stat = path.stat()
        self.rows[path.name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "verified": time.strftime("%Y-%m-%d %H:%M"),
            "remote": vars(remote),
        }
        self._save()

    def forget(self, name: str) -> None:
        """Remove a row, so that the next run hashes the file again."""
        if self.rows.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        fresh.replace(self.path)


@dataclass(frozen=True)
class Plan:
    """What has to be done for one file. `remote` is None where the hub was not asked (the record
    knows the file) or did not answer (`unverified` then says why).
    """

    file: WeightFile
    target: Path
    remote: downloads.RemoteFile | None
    fetch: bool
    unverified: str | None = None


def free_name(path: Path, tag: str) -> Path:
    """The first of NAME.tag-1, NAME.tag-2, ... that is not taken."""
    number = 1
    while path.with_name(f"{path.name}.{tag}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{tag}-{number}")


def make_plan(file: WeightFile, folder: Path, record: Record, patience: downloads.Patience) -> Plan:
    """Decide whether a file must be fetched: it is absent, or its hash is not the hub's.

    Raises:
        StepError: a folder carries its name, or it is absent and the hub does not answer.
    """
    target = folder / file.name
    if target.is_dir():
        raise StepError(
            f"{target} is a folder, the file {file.name} belongs there",
            f"mv '{target}' '{target}.folder' && {downloads.AGAIN}",
        )
    if target.is_file() and record.knows(target):
        return Plan(file, target, None, fetch=False)
    try:
        remote = downloads.describe(file.repo, file.name, patience)
    except StepError as error:
        if target.is_file() and target.stat().st_size:
            return Plan(file, target, None, fetch=False, unverified=error.message)
        raise
    if target.is_file() and is_whole(target, remote):
        record.note(target, remote)
        return Plan(file, target, remote, fetch=False)
    return Plan(file, target, remote, fetch=True)


def is_whole(path: Path, remote: downloads.RemoteFile) -> bool:
    """Compare size and hash of a file on the disk with what the hub says; shows progress."""
    if path.stat().st_size != remote.size:
        return False
    if remote.hashed_by is None:
        return True
    progress = Progress(f"hashing {path.name}", remote.size)
    return downloads.hash_file(path, remote, progress) == remote.etag


def carry_out(plan: Plan, record: Record, patience: downloads.Patience) -> str:
    """Fetch if the plan says so, open the file, and return the line that reports it.

    Raises:
        StepError: the download failed, or the file is not what its name promises.
    """
    file, target = plan.file, plan.target
    if plan.fetch and plan.remote is not None:
        line = _fetch(plan, plan.remote, record, patience)
    elif plan.unverified:
        line = f"already there, not compared with the hub ({plan.unverified})"
    else:
        line = "already there and verified"
    return f"{file.name}: {line}; {open_check(file, target)}"


def _fetch(plan: Plan, remote: downloads.RemoteFile, record: Record, patience: downloads.Patience) -> str:
    """Download beside what is there, which is set aside only when the new file is whole."""
    target, aside = plan.target, None
    if target.exists():
        print(f"  {target.name}: the one that is there is not the hub's; fetching the hub's")
        aside = free_name(target, "bad")
    result = downloads.download(remote, target, downloads.hub_token(), patience, aside)
    record.note(target, remote)
    speed = f"{format_bytes(result.fetched / max(result.seconds, 1e-6))}/s"
    checked = "hash right" if remote.hashed_by else "size right, the hub gives no hash"
    line = f"{format_bytes(result.fetched)} in {format_seconds(result.seconds)} ({speed}), {checked}"
    return f"{line}, the earlier one is kept as {aside.name}" if aside else line


def open_check(file: WeightFile, path: Path) -> str:
    """Open a file safely and compare it with what its role promises: a right hash of a wrong file
    is still an error.

    Raises:
        StepError: torch is absent, the file does not open or holds something else.
    """
    require_torch(f"opening {file.name}")
    if file.role == "stats":
        return _check_stats(path)
    return _check_checkpoint(file, path)


def bundled_faults(folder: Path) -> list[str]:
    """Open every file of the bundled model and return what is wrong with which; where all open,
    whether they fit each other (a YAML that is cut short may open). Empty where all is well.

    Raises:
        StepError: torch is absent.
    """
    require_torch("opening the bundled model")
    from LightningDiT.checkpoint import inspect
    from LightningDiT.config import load_config, load_tokenizer_config
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.pipeline import verify_config
    from LightningDiT.tokenizer.latents import diagnose

    openers: dict[str, Callable[[Path], object]] = {
        "config.yaml": load_config,
        "tokenizer.yaml": load_tokenizer_config,
        "transformer.safetensors": inspect,
        "tokenizer.safetensors": inspect,
    }
    faults = diagnose(folder / STATS.name)
    for name, opener in openers.items():
        try:
            opener(folder / name)
        except LightningDiTError as error:
            faults.append(error.message)
    if not faults:
        try:
            verify_config(folder / "config.yaml")
        except LightningDiTError as error:
            faults.append(error.message)
    return faults


def _check_stats(path: Path) -> str:
    from LightningDiT.tokenizer.latents import diagnose

    faults = diagnose(path, channels=32)
    if faults:
        raise StepError(f"{path}: {'; '.join(faults)}", f"python fix_latents_stats.py --stats {shlex.quote(str(path))}")
    return "opens, 32 means and standard deviations"


def _check_checkpoint(file: WeightFile, path: Path) -> str:
    """Compare names and shapes with the published table; tensors beside it are counted."""
    from LightningDiT.checkpoint import inspect

    table = published_table(str(file.table))
    found = {name: tuple(shape) for name, shape in inspect(path).shapes.items()}
    absent = [name for name in table if name not in found]
    other = [name for name in table if name in found and found[name] != table[name]]
    for names, fault in ((absent, "lacks"), (other, "has another shape for")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise StepError(
                f"{path} {fault} {', '.join(names[:3])}{more}: it is no {file.table} checkpoint",
                f"mv '{path}' '{path}.other' && {downloads.AGAIN}",
            )
    return f"opens, {len(table)} tensors named and shaped as published"


def published_table(section: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, from LightningDiT/checkpoint_keys.json."""
    from LightningDiT import checkpoint

    path = Path(checkpoint.__file__).with_name("checkpoint_keys.json")
    rows = json.loads(path.read_text(encoding="utf-8"))[section]
    return {name: tuple(shape) for name, shape in rows.items()}


def verify_present(file: WeightFile, folder: Path, record: Record, patience: downloads.Patience) -> str:
    """Hash a file that is there again and open it (step 2's --verify); fetches nothing.

    Raises:
        StepError: absent, damaged, or the hub is needed for its hash and does not answer.
    """
    target = folder / file.name
    if not target.is_file():
        raise StepError(f"{target} is not there", downloads.AGAIN)
    remote = record.remote(file.name) or downloads.describe(file.repo, file.name, patience)
    if not is_whole(target, remote):
        record.forget(file.name)
        raise StepError(f"{target} is not the file that the hub has (size or hash differ)", downloads.AGAIN)
    record.note(target, remote)
    return f"{file.name}: {remote.hashed_by or 'size'} right; {open_check(file, target)}"
