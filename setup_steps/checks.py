"""Whether a file of models/ is right: the record of what was verified, opening, comparing."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from setup_steps import downloads
from setup_steps.console import Progress, StepError, rename_command
from setup_steps.files import replacing
from setup_steps.machine import require_torch
from setup_steps.sources import Source, at_hand, dangling_links, leads_to
from setup_steps.weights import STATS, WeightFile, usable_names

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
        try:
            return downloads.RemoteFile(**row["remote"])
        except TypeError:  # written by another version
            return None

    def note(self, path: Path, remote: downloads.RemoteFile | None) -> None:
        """Remember that `path` was hashed and equals `remote`, or (None) was opened and comes from a folder."""
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
        # Where nothing can be written (attached data) the next run hashes again; that is all.
        with contextlib.suppress(OSError), replacing(self.path) as fresh:
            fresh.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")


def is_whole(path: Path, remote: downloads.RemoteFile) -> bool:
    """Compare size and hash of a file on the disk with what the hub says; shows progress."""
    if path.stat().st_size != remote.size:
        return False
    return remote.hashed_by is None or downloads.hash_file(path, remote) == remote.etag


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


def fault_of(file: WeightFile, path: Path) -> str | None:
    """Why a file is not what its role promises; None where it is.

    Raises:
        StepError: torch is absent.
    """
    require_torch(f"opening {file.name}")
    from LightningDiT.errors import LightningDiTError

    try:
        open_check(file, path)
    except (StepError, LightningDiTError) as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return None


def bundled_faults(folder: Path) -> list[str]:
    """Open every file of the bundled model and return what is wrong with which; where all open,
    whether they fit each other (a YAML that is cut short may open). Empty where all is well.

    Raises:
        StepError: torch is absent.
    """
    require_torch("opening the bundled model")
    from LightningDiT.checkpoint import inspect
    from LightningDiT.config import load_config
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.loading import verify_config
    from LightningDiT.sampling.calibrated import load_solvers
    from LightningDiT.tokenizer.config import load_tokenizer_config
    from LightningDiT.tokenizer.latents import diagnose

    openers: dict[str, Callable[[Path], object]] = {
        "config.yaml": load_config,
        "tokenizer.yaml": load_tokenizer_config,
        "transformer.safetensors": inspect,
        "tokenizer.safetensors": inspect,
        "solvers.yaml": load_solvers,
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
                f"{rename_command(path, '.other')} && {downloads.again()}",
            )
    return f"opens, {len(table)} tensors named and shaped as published"


def published_table(section: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, from LightningDiT/checkpoint_keys.json."""
    from LightningDiT import checkpoint

    path = Path(checkpoint.__file__).with_name("checkpoint_keys.json")
    rows = json.loads(path.read_text(encoding="utf-8"))[section]
    return {name: tuple(shape) for name, shape in rows.items()}


def verify_present(
    file: WeightFile, folder: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> list[str]:
    """Compare a file that is there, and of a transformer its converted copies, byte by byte with the
    best that is at hand, and open it (step 2's --verify); fetches nothing.

    Returns:
        One line per file that says what was compared.

    Raises:
        StepError: absent or damaged.
    """
    gone = dangling_links(file, folder)
    if gone and not at_hand(file, folder):
        raise StepError(
            f"{gone[0]} is a link to {gone[0].readlink()}, which is not there", downloads.again(without=["--verify"])
        )
    if not at_hand(file, folder):
        raise StepError(f"{folder / file.name} is not there", downloads.again(without=["--verify"]))
    present = [folder / name for name in usable_names(file) if (folder / name).is_file()]
    return [
        f"{path.name}: {_compare(file, path, record, source, patience)}; {open_check(file, path)}" for path in present
    ]


def _compare(file: WeightFile, path: Path, record: Record, source: Source, patience: downloads.Patience) -> str:
    """Hash against the record or the hub, else against the checksums that the file itself carries."""
    if path.name != file.name:
        return own_checksums(path)
    try:
        remote = record.remote(path.name)
        if remote is None and source.asks_hub:
            remote = downloads.describe(file.repo, file.name, patience)
    except StepError as error:
        return f"{own_checksums(path)} (not compared with the hub: {error.message})"
    if remote is None:
        return own_checksums(path)
    if not is_whole(path, remote):
        record.forget(path.name)
        where = f"{path} ({leads_to(path)})" if path.is_symlink() else f"{path}"
        fix = downloads.again(*(["--source", "hub"] * path.is_symlink()), without=["--verify", "--source"])
        raise StepError(f"{where} is not the file that the hub has (size or hash differ)", fix)
    record.note(path, remote)
    return f"{remote.hashed_by or 'size'} right"


def own_checksums(path: Path) -> str:
    """Read a torch archive through and compare each record with the checksum beside it.

    Returns:
        What was compared; that only opening is left where the file carries no checksums.

    Raises:
        StepError: a record differs from its checksum.
    """
    if path.suffix != ".pt" or not zipfile.is_zipfile(path):
        return "carries no checksums, so that opening is all there is"
    progress = Progress(f"checking {path.name}", path.stat().st_size)
    done = 0
    try:
        with zipfile.ZipFile(path) as archive, contextlib.closing(progress):
            records = archive.infolist()
            if not any(info.CRC for info in records):
                return "was written without checksums, so that opening is all there is"
            for info in records:
                with archive.open(info) as record:
                    while chunk := record.read(downloads.CHUNK):
                        done += len(chunk)
                        progress.update(done)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise StepError(f"{path} is damaged ({error})", downloads.again(without=["--verify"])) from error
    return f"{len(records)} checksums of the archive itself right"
