"""Whether a file of models/ is right: the record of verified files, opening, comparing."""

from __future__ import annotations

import contextlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from LightningDiT.console import Progress
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json, rename_command, write_text
from setup_steps import downloads
from setup_steps.machine import require_torch
from setup_steps.project import PROJECT, REPAIR, step_command
from setup_steps.sources import Source, dangling_links, leads_to, present
from setup_steps.weights import STATS, WeightFile

RECORD = ".downloads.json"


class Record:
    """models/.downloads.json: origin, hash, size and time stamp of each verified file, so that the next run needs
    neither the hub nor the hash of 6 GB.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD
        try:
            rows = read_json(self.path)
        except (OSError, ValueError):
            rows = {}
        self.rows: dict[str, Any] = rows if isinstance(rows, dict) else {}

    def knows(self, path: Path) -> bool:
        """Return whether size and time stamp are those of the verified file."""
        row, stat = self.rows.get(path.name), path.stat()
        return isinstance(row, dict) and (row.get("size"), row.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)

    def other_than_checked(self, path: Path) -> bool:
        """Return whether a file of that name was verified, with another size or time stamp."""
        return path.name in self.rows and not self.knows(path)

    def remote(self, name: str) -> downloads.RemoteFile | None:
        """Return what the hub said of the file when it was verified; None if it did not."""
        try:
            return downloads.RemoteFile(**self.rows[name]["remote"])
        except (KeyError, TypeError):  # no such row, or one of another version
            return None

    def note(self, path: Path, remote: downloads.RemoteFile | None) -> None:
        """Remember that `path` was hashed and equals `remote`, or (None) was opened and is from a folder."""
        stat = path.stat()
        self.rows[path.name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "verified": time.strftime("%Y-%m-%d %H:%M"),
            "remote": vars(remote) if remote else None,
        }
        self._save()

    def forget(self, name: str) -> None:
        """Remove a row, so that the next run hashes the file again."""
        if self.rows.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        with contextlib.suppress(LightningDiTError):  # in a read-only folder the next run hashes again
            write_text(self.path, json.dumps(self.rows, indent=1))


def is_whole(path: Path, remote: downloads.RemoteFile) -> bool:
    """Return whether a file has the size and the hash that the hub says; show progress."""
    is_same = path.stat().st_size == remote.size
    return is_same and (remote.hashed_by is None or downloads.hash_file(path, remote) == remote.etag)


def open_check(file: WeightFile, path: Path) -> str:
    """Open a file safely and return the finding. Raise LightningDiTError if torch is absent, or the file does not open
    or is not what its role promises: a right hash of a wrong file is an error too.
    """
    require_torch(f"opening {file.name}")
    if file.role == "stats":
        return _check_stats(path)
    return _check_checkpoint(file, path)


def fault_of(file: WeightFile, path: Path) -> str | None:
    """Return why a file is not what its role promises, None if it is; raise LightningDiTError if torch is absent."""
    require_torch(f"opening {file.name}")
    try:
        open_check(file, path)
    except LightningDiTError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return None


def bundled_faults(folder: Path) -> list[str]:
    """Return what is wrong with the bundled model's files: which do not open, or if all open (as a truncated YAML may)
    whether they fit each other. Empty if all is well.

    Raises:
        LightningDiTError: torch is absent.
    """
    require_torch("opening the bundled model")
    from LightningDiT.checkpoint import inspect
    from LightningDiT.config import load_config
    from LightningDiT.sampling.calibrated import load_solvers
    from LightningDiT.sampling.dry_run import verify_config
    from LightningDiT.tokenizer.config import load_tokenizer_config
    from LightningDiT.tokenizer.latents import diagnose

    openers: dict[str, Callable[[Path], object]] = {
        "config.yaml": load_config,
        "tokenizer.yaml": load_tokenizer_config,
        "transformer.safetensors": inspect,
        "tokenizer.safetensors": inspect,
        "solvers.yaml": load_solvers,
    }

    def faults_of(name: str, opener: Callable[[Path], object]) -> list[str]:
        try:
            opener(folder / name)
        except LightningDiTError as error:
            return [error.message]
        return []

    faults = [fault for name, opener in openers.items() for fault in faults_of(name, opener)]
    return [*diagnose(folder / STATS.name), *faults] or faults_of("config.yaml", verify_config)


def _check_stats(path: Path) -> str:
    from LightningDiT.tokenizer.latents import diagnose

    faults = diagnose(path, channels=32)
    if faults:
        raise LightningDiTError(f"{path}: {'; '.join(faults)}", step_command(REPAIR, "--stats", str(path)))
    return "opens, 32 means and standard deviations"


def _check_checkpoint(file: WeightFile, path: Path) -> str:
    """Compare names and shapes with the published table; other tensors are allowed."""
    from LightningDiT.checkpoint import inspect

    table = published_table(str(file.table))
    found = {name: tuple(shape) for name, shape in inspect(path).shapes.items()}
    absent = [name for name in table if name not in found]
    other = [name for name in table if name in found and found[name] != table[name]]
    for names, fault in ((absent, "lacks"), (other, "has another shape for")):
        if names:
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            raise LightningDiTError(
                f"{path} {fault} {', '.join(names[:3])}{more}: it is no {file.table} checkpoint",
                f"{rename_command(path, '.other')} && {downloads.again()}",
            )
    return f"opens, {len(table)} tensors named and shaped as published"


def published_table(section: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a published checkpoint, from LightningDiT/checkpoint_keys.json."""
    path = PROJECT / "LightningDiT" / "checkpoint_keys.json"
    rows = json.loads(path.read_text(encoding="utf-8"))[section]
    return {name: tuple(shape) for name, shape in rows.items()}


def verify_present(
    file: WeightFile, folder: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> list[str]:
    """Compare a file that is there, and the converted copies of a transformer, byte by byte with the best reference
    at hand, and open it; fetch nothing (step 2's --verify). Return one line per file; raise LightningDiTError if it is
    absent or damaged.
    """
    paths = present(file, folder)
    if not paths:
        faults = [f"{path} is a link to {path.readlink()}, which is not there" for path in dangling_links(file, folder)]
        faults.append(f"{folder / file.name} is not there")
        raise LightningDiTError(faults[0], downloads.again(without=["--verify"]))
    return [
        f"{path.name}: {_compare(file, path, record, source, patience)}; {open_check(file, path)}" for path in paths
    ]


def _compare(file: WeightFile, path: Path, record: Record, source: Source, patience: downloads.Patience) -> str:
    """Compare the hash with that of the record or the hub, else the content with the file's own checksums."""
    remote, reason = record.remote(path.name) if path.name == file.name else None, ""
    if remote is None and path.name == file.name and source.asks_hub:
        try:
            remote = downloads.describe(file.repo, file.name, patience)
        except LightningDiTError as error:
            reason = f" (not compared with the hub: {error.message})"
    if remote is None:
        return own_checksums(path) + reason
    if not is_whole(path, remote):
        record.forget(path.name)
        where = f"{path} ({leads_to(path)})" if path.is_symlink() else f"{path}"
        fix = downloads.again(*(["--source", "hub"] * path.is_symlink()), without=["--verify", "--source"])
        raise LightningDiTError(f"{where} is not the file that the hub has (size or hash differ)", fix)
    record.note(path, remote)
    return f"{remote.hashed_by or 'size'} right"


def own_checksums(path: Path) -> str:
    """Read a torch archive through, compare each record with its checksum, and return what was compared; raise
    LightningDiTError if one differs.
    """
    if path.suffix != ".pt" or not zipfile.is_zipfile(path):
        return "has no checksums and can only be opened"
    try:
        with (
            zipfile.ZipFile(path) as archive,
            Progress(path.stat().st_size, "byte", label=f"checking {path.name}") as progress,
        ):
            records = archive.infolist()
            if not any(info.CRC for info in records):
                return "was written without checksums and can only be opened"
            for info in records:
                with archive.open(info) as record:
                    while chunk := record.read(downloads.CHUNK):
                        progress.update(len(chunk))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise LightningDiTError(f"{path} is damaged ({error})", downloads.again(without=["--verify"])) from error
    return f"{len(records)} checksums of the archive itself right"
