"""What step 2 does with one file: it stays, or a link or a download takes its place."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from setup_steps import convert, downloads
from setup_steps.checks import Record, fault_of, is_whole, open_check
from setup_steps.console import StepError, format_bytes, format_seconds, library_error, rename_command
from setup_steps.files import free_name
from setup_steps.sources import Source, at_hand, dangling_links, leads_to, link
from setup_steps.weights import WeightFile, converted_name, usable_names


@dataclass(frozen=True)
class Plan:
    """What has to be done for one file.

    Args:
        target: the file that models/ will hold: the published one, or of a transformer perhaps a
            converted copy of it.
        said: what is known of the file that is there and stays; empty where it is to be had first.
        remote: what to fetch; None where nothing is.
        found: what to link to; None where nothing is.
        bad: files in models/ that go aside for it.
    """

    file: WeightFile
    target: Path
    said: str = ""
    remote: downloads.RemoteFile | None = None
    found: Path | None = None
    bad: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A file in models/ and what was found out about it.

    Args:
        path: the file.
        said: how good it is; empty for a file that cannot stay.
        fault: why it cannot.
        remote: what the hub has in its place, where the hub was asked and answered.
        unreachable: the hub was asked and did not answer.
    """

    path: Path
    said: str = ""
    fault: str = ""
    remote: downloads.RemoteFile | None = None
    unreachable: StepError | None = None


def make_plan(
    file: WeightFile, folder: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> Plan:
    """Decide whether a file stays, is linked or is fetched. What is good in `folder` stays; else
    what the source's folder holds; else what the hub has.

    Raises:
        StepError: a folder carries its name, or none of the places that may be asked has it.
    """
    target = folder / file.name
    if target.is_dir():
        raise StepError(
            f"{target} is a folder, the file {file.name} belongs there",
            f"{rename_command(target, '.folder')} && {downloads.again()}",
        )
    for path in dangling_links(file, folder):
        print(f"  {path.name}: the link to {path.readlink()} leads nowhere (a data set that is no longer attached?)")
    here = [judge(file, path, record, source, patience) for path in at_hand(file, folder)]
    for judged in here:
        if judged.said:
            return Plan(file, judged.path, judged.said + _better_names_aside(file, judged.path))
        print(f"  {judged.path.name}: the one that is there {judged.fault}")
    bad = tuple(judged.path for judged in here)
    found = source.find(file, folder, fault_of)
    if found:
        return Plan(file, folder / found.name, found=found, bad=bad)
    if not source.asks_hub:
        raise source.explain_absence(file)
    for judged in here:
        if judged.unreachable:
            raise StepError(f"{judged.path} {judged.fault}; {judged.unreachable.message}", judged.unreachable.fix)
    remote = here[0].remote if here else None
    return Plan(file, target, remote=remote or downloads.describe(file.repo, file.name, patience), bad=bad)


def _better_names_aside(file: WeightFile, good: Path) -> str:
    """Rename copies that are damaged and that step 3 would take before the good one; say so."""
    names = usable_names(file)
    before = [good.with_name(name) for name in names[: names.index(good.name)]]
    return _set_aside(tuple(path for path in before if path.is_file() and fault_of(file, path)), good)


def judge(
    file: WeightFile, path: Path, record: Record, source: Source, patience: downloads.Patience = downloads.PATIENCE
) -> Judged:
    """Find out whether a file in models/ can stay. The hub is asked only about a file of its own
    that the record does not know, and only where the source may be the hub.
    """
    if path.name != file.name:
        return _judge_by_opening(file, path, f"already there, {leads_to(path) or 'converted from the original'}")
    if record.knows(path) and (record.remote(path.name) or source.kind != "hub"):
        known = "verified" if record.remote(path.name) else "checked before"
        return Judged(path, f"already there and {leads_to(path) or known}")
    if not source.asks_hub or (path.is_symlink() and source.kind != "hub"):
        return _judge_by_opening(file, path, f"already there, {leads_to(path) or 'not compared with the hub'}")
    try:
        remote = downloads.describe(file.repo, file.name, patience)
    except StepError as error:
        judged = _judge_by_opening(file, path, f"already there, not compared with the hub ({error.message})")
        return replace(judged, unreachable=error)
    if is_whole(path, remote):
        record.note(path, remote)
        return Judged(path, "already there and verified")
    return Judged(path, fault="is not the hub's", remote=remote)


def _judge_by_opening(file: WeightFile, path: Path, said: str) -> Judged:
    fault = fault_of(file, path)
    return Judged(path, fault=f"is not usable ({fault})") if fault else Judged(path, said)


def bytes_to_write(plan: Plan, precision: str | None) -> int:
    """Bytes that a plan adds to the disk: the download, and the converted copy where one is asked
    for that is not there yet; a link adds none.
    """
    fetched = downloads.bytes_to_fetch(plan.remote, plan.target) if plan.remote else 0
    if precision is None or plan.file.role != "dit":
        return fetched
    copy = plan.target.with_name(converted_name(plan.file.name, precision))
    made = copy == plan.target or (copy.exists() and not plan.remote)
    return fetched + (0 if made else convert.bytes_needed(plan.file, precision))


def carry_out(plan: Plan, record: Record, patience: downloads.Patience = downloads.PATIENCE) -> str:
    """Link or fetch if the plan says so, open the file, and return the line that reports it.

    Raises:
        StepError: the download failed, or the file is not what its name promises; one that was fetched
            is then set aside.
    """
    file, target = plan.file, plan.target
    if plan.remote:
        line = _fetch(plan, plan.remote, record, patience)
    elif plan.found:
        line = _link(plan, plan.found)
        record.note(target, None)
    else:
        line = plan.said
    for path in dangling_links(file, target.parent):
        path.unlink()
    try:
        opened = open_check(file, target)
    except Exception as error:
        record.forget(target.name)  # the next run compares it with the hub again
        if plan.remote and isinstance(error, (StepError, library_error())):
            raise _refuse_fetched(plan, error) from error
        raise
    return f"{target.name}: {line}; {opened}"


def _fetch(plan: Plan, remote: downloads.RemoteFile, record: Record, patience: downloads.Patience) -> str:
    """Download beside what is there, which is set aside only when the new file is whole."""
    target = plan.target
    aside = _name_aside(target)
    result = downloads.download(remote, target, downloads.hub_token(), patience, aside)
    record.note(target, remote)
    kept = _kept(aside) + _set_aside(plan.bad, target)
    speed = f"{format_bytes(result.fetched / max(result.seconds, 1e-6))}/s"
    checked = "hash right" if remote.hashed_by else "size right, the hub gives no hash"
    return f"{format_bytes(result.fetched)} in {format_seconds(result.seconds)} ({speed}), {checked}{kept}"


def _link(plan: Plan, found: Path) -> str:
    """Link beside what is there, which is set aside only when the link, or the copy, is there."""
    aside = _name_aside(plan.target)
    done = link(found, plan.target, aside)
    return done + _kept(aside) + _set_aside(plan.bad, plan.target)


def _refuse_fetched(plan: Plan, error: StepError) -> StepError:
    """Set a file aside that the hub really has but that is not what its name promises, so that no later
    step takes it; returns what to say.
    """
    aside = free_name(plan.target, "bad")
    plan.target.replace(aside)
    fix = f"another --endpoint, or --source folder --folder FOLDER: {downloads.again()}"
    if plan.file.role == "stats":
        fix = f"python fix_latents_stats.py --stats {shlex.quote(str(plan.target))}"
    return StepError(f"{error.message}; it came so from the hub and is kept as {aside.name}", fix)


def _name_aside(target: Path) -> Path | None:
    """The name under which what is there is kept; None where nothing is."""
    return free_name(target, "bad") if target.exists() else None


def _kept(aside: Path | None) -> str:
    return f", the earlier one is kept as {aside.name}" if aside else ""


def _set_aside(paths: tuple[Path, ...], target: Path) -> str:
    """Rename the files but for `target` that cannot stay, and return what to say of it."""
    said = ""
    for path in paths:
        if path != target:
            aside = free_name(path, "bad")
            path.replace(aside)
            said += f", the damaged {path.name} is kept as {aside.name}"
    return said


def foresee(file: WeightFile, folder: Path, source: Source) -> str:
    """What a run would do for one file, judged by names alone: nothing is opened, nobody is asked."""
    for path in at_hand(file, folder):
        return f"{path.name}: is there ({format_bytes(path.stat().st_size)}), would be checked"
    for path in source.candidates(file, folder):
        return f"{path.name}: absent, would be linked to {path}"
    if not source.asks_hub:
        return f"{file.name}: absent, and not below {source.folder}"
    return f"{file.name}: absent, about {format_bytes(file.approx_bytes)} from {file.repo} to {folder}"
