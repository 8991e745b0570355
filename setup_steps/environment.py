"""Step 1 as a whole: a profile's pins, the findings, the installation, and the report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes, write_text
from setup_steps import conflicts, install, machine, pip_calls, project, releases
from setup_steps.install import Pin, Row
from setup_steps.machine import Machine
from setup_steps.pip_calls import InstallError, Source
from setup_steps.releases import Asked, Decision, Release

CONSTRAINTS = project.PROJECT / "environment_constraints.txt"
CURRENT, TOOLS = "requirements.txt", "requirements-dev.txt"
PROFILES = {"auto": CURRENT, "current": CURRENT, "official": "requirements-official.txt"}
REPORTED = ("pinned", "wanted", "tested", "installed", "fault", "kept", "state")  # of a row, in the report
RANGES = "pyproject.toml"  # has the tested ranges


@dataclass(frozen=True)
class Profile:
    """What the person asked for.

    Args:
        name: a key of PROFILES.
        file: the requirements file.
        pins: its pins for this Python.
        lines: the releases of torch to choose from.
        asked: the torch that the profile names; None if the machine decides.
        ranges: by name, versions that will do as well as the pinned one; empty if only the pinned ones will.
    """

    name: str
    file: str
    pins: list[Pin]
    lines: tuple[Release, ...]
    asked: Asked | None
    ranges: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The machine, the decision about torch, and each package beside its pin.

    Args:
        warnings: what is not as it should be although steps 2 to 4 run; one line each.
    """

    machine: Machine
    decision: Decision
    rows: list[Row]
    warnings: tuple[str, ...] = ()

    @property
    def lacking(self) -> list[Row]:
        """The packages that are not as they should be."""
        return [row for row in self.rows if not row.met]

    @property
    def blocking(self) -> list[Row]:
        """The packages without which steps 2 to 4 do not run."""
        return [row for row in self.lacking if row.needed and not row.works]

    @property
    def wrongly_built(self) -> list[Row]:
        """The packages of the right version but another machine's build: pip would leave them as they are."""
        return [row for row in self.lacking if row.as_wanted and row.fault == self.decision.reason]

    @property
    def summary(self) -> str:
        """The decision in one line."""
        there = self.machine.torch.version or "that does not import"
        what = {
            releases.KEEP: f"torch {self.decision.torch} is kept",
            releases.INSTALL: f"torch {self.decision.torch} is installed",
            releases.REPLACE: f"torch {there} is replaced by {self.decision.torch}",
        }[self.decision.action]
        wanted = " ".join(row.requirement for row in self.lacking)
        return f"{what}; " + (f"to install: {wanted}" if wanted else "nothing to install")


def read_profile(name: str, dev: bool) -> Profile:
    """Read the pins of a profile, with those of the tests if `dev`; the tests are about exactly these versions."""

    def pins_of(path: Path) -> tuple[list[Pin], list[str]]:
        pins = install.read_pins(path)
        return pins, [install.pinned(pins, part, path) for part in ("torch", "torchvision")]

    file = PROFILES[name]
    pins, named = pins_of(project.PROJECT / file)
    _, newest = pins_of(project.PROJECT / CURRENT)
    if dev:
        known = {pin.name for pin in pins}
        pins += [pin for pin in install.read_pins(project.PROJECT / TOOLS) if pin.name not in known]
        file += f" and {TOOLS}"
    asked = None if name == "auto" else Asked(name, *named)
    ranges = {} if asked or dev else install.read_ranges(project.PROJECT / RANGES)
    return Profile(name, file, pins, releases.release_lines(*newest), asked, ranges)


def find_out(profile: Profile, not_replaced: str = "") -> State:
    """Compare the pins with the installed packages, which one process imports.

    Args:
        not_replaced: why a torch that should be replaced could not be; it is kept if it computes.
    """
    there = [pin.name for pin in profile.pins if machine.installed_version(pin.name)]
    probe = machine.probe(there)
    here = machine.look_around(probe.torch)
    decision = releases.decide(here, profile.lines, profile.asked)
    if not_replaced and decision.action == releases.REPLACE and releases.usable(here.torch):
        decision = decision.kept_anyway(here.torch, not_replaced)
    rows = install.make_rows(profile.pins, decision, probe.faults, profile.ranges)
    return State(here, decision, rows, tuple(row.warning for row in rows if row.warning))


def bring_right(profile: Profile, state: State, sources: tuple[Source, ...]) -> State:
    """Install what is lacking and look again. What cannot be installed is a warning if the profile has ranges and steps
    2 to 4 run without it; otherwise it is a LightningDiTError.
    """
    before = conflicts.broken_requirements()
    try:
        install.refuse_unfit_process(state.rows)
        last = _install(profile, state, sources)
    except LightningDiTError as error:
        if profile.ranges and not state.blocking and isinstance(error, InstallError):
            install.put_some_right(state.rows, sources[-1])
        last = find_out(profile, str(error))
        if not profile.ranges or last.blocking:
            raise
        last = replace(last, warnings=(f"not all could be installed: {error}", *last.warnings))
    new = [line for broken, line in conflicts.broken_requirements().items() if broken not in before]
    return replace(last, warnings=(*last.warnings, *(_explained(line, state.rows, last.rows) for line in new)))


def may_install(profile: Profile, state: State) -> bool:
    """Return whether packages may be installed here; print why not if steps 2 to 4 run without it, else raise it."""
    try:
        install.refuse_unfit_process(state.rows)
    except LightningDiTError as error:
        if not profile.ranges or state.blocking:
            raise
        print(f"Would install nothing: {error}")
        return False
    return True


def require_enough(profile: Profile, state: State) -> None:
    """Raise LightningDiTError if a package is not as the profile has it, or, with ranges, if steps 2 to 4 do not run
    without it; print any other flaw as a warning.
    """
    wrong = state.blocking if profile.ranges else state.lacking
    if wrong:
        raise LightningDiTError(
            f"not as it should be: {', '.join(row.name for row in wrong)}", pip_calls.again(without=["--check-only"])
        )
    for warning in state.warnings:
        print(f"warning: {warning}")


def _install(profile: Profile, state: State, sources: tuple[Source, ...]) -> State:
    """Install what is lacking and look again; install once more what then does not import. A torch that computes on the
    CPU stays if the one for the GPU is not available; any other failure is an InstallError.
    """
    forced = state.wrongly_built
    not_replaced = ""
    for _ in range(2):
        try:
            install.put_right(state.rows, forced, sources)
        except InstallError as error:
            optional = state.decision.action == releases.REPLACE and releases.usable(state.machine.torch)
            if profile.asked or not optional:
                raise
            not_replaced = str(error)
        state = find_out(profile, not_replaced)
        if not state.lacking:
            return state
        forced = [row for row in state.lacking if row.as_wanted]
    return state if profile.asked else find_out(profile, not_replaced or "the installation did not change that")


def _explained(conflict: str, before: list[Row], after: list[Row]) -> str:
    """Return a requirement that the installation broke, with the step that broke it and the way out."""
    why = "a package that step 1 installed brought this version"
    for old, new in zip(before, after, strict=True):
        if old.installed != new.installed and conflicts.speaks_of(conflict, old.name):
            reason = old.fault or f"{old.requirement} is wanted here"
            done = f"replaced {old.name} {old.installed} by" if old.installed else f"installed {old.name}"
            why = f"step 1 {done} {new.installed}, because {reason}"
    return f"{conflict.rstrip('.')} ({why}); fix: {pip_calls.in_own_venv()}"


def announce(profile: Profile, state: State) -> None:
    """Print the decision and its reason."""
    which = f"any version in the tested ranges of {RANGES} will do" if profile.ranges else "exactly these versions"
    print(f"Step 1: profile {profile.name} ({profile.file}, {which}) for {sys.executable}")
    print(f"Decision: {state.summary}")
    print(f"Reason: {state.decision.reason}")


def show(state: State) -> None:
    """Print the packages and the machine, one line per fact."""
    for row in state.rows:
        print(f"  {row.name:16} {row.installed or 'absent':16} {row.state}")
    for name, value in machine.describe_machine(state.machine, project.PROJECT):
        print(f"  {name:16} {value}")


def report(profile: Profile, first: State, last: State) -> dict[str, object]:
    """Return the content of environment_report.json: the decision (`first`) and the present state (`last`)."""
    here = last.machine
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "profile": profile.name,
        "decision": first.summary,
        "reason": first.decision.reason,
        "outcome": last.decision.reason,
        "warning": last.decision.warning,
        "warnings": list(last.warnings),
        "constraints": CONSTRAINTS.name,
        "python": platform.python_version(),
        "executable": sys.executable,
        "environments": list(here.environments),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory_bytes(),
        "free_disk_bytes": free_bytes(project.PROJECT),
        "gpus": [{**asdict(gpu), "native_bf16": gpu.native_bf16} for gpu in here.gpus],
        "torch": asdict(here.torch),
        "packages": {row.name: {part: getattr(row, part) for part in REPORTED} for row in last.rows},
    }


def write_outputs(profile: Profile, first: State, last: State) -> None:
    """Write the constraints and the report; in a read-only project a note says that they are missing."""
    try:
        write_text(CONSTRAINTS, install.constraint_text(last.rows))
        write_text(project.REPORT, json.dumps(report(profile, first, last), indent=2) + "\n")
    except LightningDiTError as error:
        print(f"note: {error.message}")
        return
    print(f"Report: {project.REPORT}")
    print(f"To add packages without changing these: python -m pip install -c {CONSTRAINTS.name} NAME")
