"""What step 2 does with one file: keep it, or replace it by a link or a download."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from LightningDiT.console import duration, format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_name, rename_command, set_aside
from setup_steps import convert, downloads
from setup_steps.checks import Record, fault_of, is_whole, open_check
from setup_steps.project import REPAIR, step_command
from setup_steps.sources import Source, at_hand, dangling_links, leads_to, link
from setup_steps.weights import WeightFile, bytes_left, converted_name, newer_version, usable_names


@dataclass(frozen=True)
class Plan:
    """What has to be done for one file.

    Args:
        target: the file that models/ will hold: the published one, or a converted copy of a transformer.
        said: what is known of the file if it is there and stays, else empty.
        remote: the file to fetch, if any.
        found: the file to link to, if any.
        bad: files in models/ that go aside for it.
        renews: the link that is there is replaced by one to a newer version.
    """

    file: WeightFile
    target: Path
    said: str = ""
    remote: downloads.RemoteFile | None = None
    found: Path | None = None
    bad: tuple[Path, ...] = ()
    renews: bool = False


@dataclass(frozen=True)
class Examined:
    """A file in models/ and the findings about it.

    Args:
        path: the file.
        said: how good it is; empty if it cannot stay.
        fault: why it cannot.
        remote: the hub's file of that name, if the hub answered.
        unreachable: the error of a hub that did not answer.
    """

    path: Path
    said: str = ""
    fault: str = ""
    remote: downloads.RemoteFile | None = None
    unreachable: LightningDiTError | None = None


def make_plan(
    file: WeightFile, folder: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> Plan:
    """Decide whether a file stays (if it is good), is linked (if the source's folder holds it) or is fetched. Raise
    LightningDiTError if a folder has its name or no source has it.
    """
    target = folder / file.name
    if target.is_dir():
        raise LightningDiTError(
            f"{target} is a folder, the file {file.name} belongs there",
            f"{rename_command(target, '.folder')} && {downloads.again()}",
        )
    for path in dangling_links(file, folder):
        print(f"  {path.name}: the link to {path.readlink()} leads nowhere (a data set that is no longer attached?)")
    here = [examine(file, path, record, source, patience) for path in at_hand(file, folder)]
    for examined in here:
        linked = examined.said and examined.path.is_symlink() and source.kind != "hub"
        newer = newer_version(examined.path.resolve()) if linked else None
        if newer and fault_of(file, newer) is None:
            print(f"  {examined.path.name}: {examined.path.resolve()} has a newer version, {newer}")
            return Plan(file, examined.path, found=newer, renews=True)
        if examined.said:
            source.say_passed_over(file, examined.path)
            return Plan(file, examined.path, examined.said + _better_names_aside(file, examined.path))
        print(f"  {examined.path.name}: the one that is there {examined.fault}")
    bad = tuple(examined.path for examined in here)
    found = source.find(file, folder, fault_of)
    if found:
        return Plan(file, folder / found.name, found=found, bad=bad)
    if not source.asks_hub:
        raise source.explain_absence(file)
    for examined in here:
        if error := examined.unreachable:
            raise LightningDiTError(f"{examined.path} {examined.fault}; {error.message}", error.fix)
    remote = here[0].remote if here else None
    return Plan(file, target, remote=remote or downloads.describe(file.repo, file.name, patience), bad=bad)


def _better_names_aside(file: WeightFile, good: Path) -> str:
    """Rename damaged copies that step 3 would take before the good one, and say so."""
    names = usable_names(file)
    before = [good.with_name(name) for name in names[: names.index(good.name)]]
    return _set_aside(tuple(path for path in before if path.is_file() and fault_of(file, path)), good)


def examine(
    file: WeightFile, path: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> Examined:
    """Return whether a file in models/ can stay. The hub is asked only about one of its own files that the record does
    not know, and only if the source may be the hub.
    """
    if path.name != file.name:
        return _examine_by_opening(file, path, leads_to(path) or "converted from the original")
    verified = record.remote(path.name)
    if record.knows(path) and (verified or source.kind != "hub"):
        known = leads_to(path) or ("verified" if verified else "checked before")
        return Examined(path, f"already there and {known}")
    if not source.asks_hub or (path.is_symlink() and source.kind != "hub"):
        return _examine_linked(file, path, record)
    try:
        remote = downloads.describe(file.repo, file.name, patience)
    except LightningDiTError as error:
        examined = _examine_by_opening(file, path, f"not compared with the hub ({error.message})")
        return replace(examined, unreachable=error)
    if is_whole(path, remote):
        record.note(path, remote)
        return Examined(path, "already there and verified")
    return Examined(path, fault="is not the hub's", remote=remote)


def _examine_linked(file: WeightFile, path: Path, record: Record) -> Examined:
    """Open a file that is not compared with the hub; say so if its bytes are other ones than those checked before."""
    known, other = leads_to(path) or "not compared with the hub", record.other_than_checked(path)
    examined = _examine_by_opening(file, path, f"{known}, which changed since it was checked" if other else known)
    if examined.said and other:
        record.note(path, None)
    return examined


def _examine_by_opening(file: WeightFile, path: Path, known: str) -> Examined:
    fault = fault_of(file, path)
    return Examined(path, fault=f"is not usable ({fault})") if fault else Examined(path, f"already there, {known}")


def bytes_to_write(plan: Plan, precision: str | None) -> int:
    """Return the bytes that a plan adds to the disk: those of the download and of a converted copy that is asked for
    and not there yet; a link adds none.
    """
    fetched = bytes_left(plan.target, plan.remote.size) if plan.remote else 0
    if precision is None or plan.file.role != "dit":
        return fetched
    copy = plan.target.with_name(converted_name(plan.file.name, precision))
    made = copy == plan.target or (copy.exists() and not plan.remote)
    return fetched + (0 if made else convert.bytes_needed(plan.file, precision))


def carry_out(plan: Plan, record: Record, patience: downloads.Patience = downloads.PATIENCE) -> str:
    """Link or fetch the file as planned, open it, and return the line that reports it. Raise LightningDiTError if that
    failed or the file is not what its name promises; a fetched one then goes aside.
    """
    file, target = plan.file, plan.target
    line = plan.said
    if plan.remote or plan.found:
        # both are made beside what is there, which goes aside only when the new file is whole
        aside = free_name(target, "bad") if target.exists() and not plan.renews else None
        line = _fetch(plan.remote, target, aside, patience) if plan.remote else link(plan.found, target, aside)
        record.note(target, plan.remote)
        line += f", the earlier one is kept as {aside.name}" if aside else ""
        line += _set_aside(plan.bad, target)
    for path in dangling_links(file, target.parent):
        path.unlink()
    try:
        return f"{target.name}: {line}; {open_check(file, target)}"
    except Exception as error:
        record.forget(target.name)  # the next run compares it with the hub again
        if plan.remote and isinstance(error, LightningDiTError):
            raise _refuse_fetched(plan, error) from error
        raise


def _fetch(remote: downloads.RemoteFile, target: Path, aside: Path | None, patience: downloads.Patience) -> str:
    result = downloads.download(remote, target, downloads.hub_token(), patience, aside)
    speed = f"{format_bytes(result.fetched / max(result.seconds, 1e-6))}/s"
    checked = "hash right" if remote.hashed_by else "size right, the hub gives no hash"
    return f"{format_bytes(result.fetched)} in {duration(result.seconds)} ({speed}), {checked}"


def _refuse_fetched(plan: Plan, error: LightningDiTError) -> LightningDiTError:
    """Set a file aside that is the hub's but not what its name promises, so that no later step takes it; return the
    error to raise.
    """
    aside = set_aside(plan.target, "bad")
    fix = f"another --endpoint, or --source folder --folder FOLDER: {downloads.again()}"
    if plan.file.role == "stats":
        fix = step_command(REPAIR, "--stats", str(plan.target))
    return LightningDiTError(f"{error.message}; it came so from the hub and is kept as {aside.name}", fix)


def _set_aside(paths: tuple[Path, ...], target: Path) -> str:
    """Rename the files that cannot stay, except `target`, and say so."""
    said = ""
    for path in paths:
        if path != target:
            said += f", the damaged {path.name} is kept as {set_aside(path, 'bad').name}"
    return said


def foresee(file: WeightFile, folder: Path, source: Source) -> str:
    """Return what a run would do for one file, by names alone: nothing is opened, nobody is asked."""
    for path in at_hand(file, folder):
        return f"{path.name}: is there ({format_bytes(path.stat().st_size)}), would be checked"
    for path in source.candidates(file, folder):
        return f"{path.name}: absent, would be linked to {path}"
    if not source.asks_hub:
        return f"{file.name}: absent, and not below {source.folder}"
    return f"{file.name}: absent, about {format_bytes(file.approx_bytes)} from {file.repo} to {folder}"
