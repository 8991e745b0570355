"""What step 2 does with one file: it stays, or a link or a download takes its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from setup_steps import convert, downloads
from setup_steps.console import StepError, format_bytes, format_seconds
from setup_steps.fetch import Record, fault_of, free_name, is_whole, open_check
from setup_steps.sources import Source, at_hand, dangling_links, leads_to, link
from setup_steps.weights import WeightFile, converted_name


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
            f"mv '{target}' '{target}.folder' && {downloads.AGAIN}",
        )
    for path in dangling_links(file, folder):
        print(f"  {path.name}: the link to {path.readlink()} leads nowhere (a data set that is no longer attached?)")
    here = [judge(file, path, record, source, patience) for path in at_hand(file, folder)]
    for judged in here:
        if judged.said:
            return Plan(file, judged.path, judged.said)
        print(f"  {judged.path.name}: the one that is there {judged.fault}")
    bad = tuple(judged.path for judged in here)
    found = source.find(file, folder, fault_of)
    if found:
        return Plan(file, folder / found.name, found=found, bad=bad)
    if not source.asks_hub:
        raise source.explain_absence(file)
    for judged in here:
        if judged.unreachable:
            raise StepError(f"{judged.path} {judged.fault}; {judged.unreachable.message}", judged.unreachable.mend)
    remote = here[0].remote if here else None
    return Plan(file, target, remote=remote or downloads.describe(file.repo, file.name, patience), bad=bad)


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
        StepError: the download failed, or the file is not what its name promises.
    """
    file, target = plan.file, plan.target
    if plan.remote:
        line = _fetch(plan, plan.remote, record, patience)
    elif plan.found:
        kept = _set_aside(plan.bad)
        line = link(plan.found, target) + kept
        record.note(target, None)
    else:
        line = plan.said
    for path in dangling_links(file, target.parent):
        path.unlink()
    try:
        opened = open_check(file, target)
    except Exception:
        record.forget(target.name)  # the next run compares it with the hub again
        raise
    return f"{target.name}: {line}; {opened}"


def _fetch(plan: Plan, remote: downloads.RemoteFile, record: Record, patience: downloads.Patience) -> str:
    """Download beside what is there, which is set aside only when the new file is whole."""
    target = plan.target
    aside = free_name(target, "bad") if target.exists() else None
    result = downloads.download(remote, target, downloads.hub_token(), patience, aside)
    record.note(target, remote)
    kept = f", the earlier one is kept as {aside.name}" if aside else _set_aside(plan.bad)
    speed = f"{format_bytes(result.fetched / max(result.seconds, 1e-6))}/s"
    checked = "hash right" if remote.hashed_by else "size right, the hub gives no hash"
    return f"{format_bytes(result.fetched)} in {format_seconds(result.seconds)} ({speed}), {checked}{kept}"


def _set_aside(paths: tuple[Path, ...]) -> str:
    """Rename files that cannot stay, and return what to say of it."""
    said = ""
    for path in paths:
        aside = free_name(path, "bad")
        path.replace(aside)
        said += f", the earlier one is kept as {aside.name}"
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
