"""Step 1 as a whole: a profile's pins, the findings, the installation, and the report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes, write_text
from setup_steps import install, machine, pip_calls, project, releases
from setup_steps.install import Pin, Row
from setup_steps.machine import Machine
from setup_steps.pip_calls import InstallError
from setup_steps.releases import Asked, Decision, Release

CONSTRAINTS = project.PROJECT / "environment_constraints.txt"
CURRENT = "requirements.txt"
#: The pins of each profile, without and with those of the tests.
PROFILES = {
    "auto": (CURRENT, "requirements-dev.txt"),
    "current": (CURRENT, "requirements-dev.txt"),
    "official": ("requirements-official.txt", "requirements-official.txt"),
}


@dataclass(frozen=True)
class Profile:
    """What the person asked for.

    Args:
        name: a key of PROFILES.
        file: the requirements file.
        pins: its pins for this Python.
        lines: the releases of torch to choose from.
        asked: the torch that the profile names; None if the machine decides.
    """

    name: str
    file: str
    pins: list[Pin]
    lines: tuple[Release, ...]
    asked: Asked | None


@dataclass(frozen=True)
class State:
    """The machine, the decision about torch, and each package beside its pin."""

    machine: Machine
    decision: Decision
    rows: list[Row]

    @property
    def lacking(self) -> list[Row]:
        """The packages that are not as they should be."""
        return [row for row in self.rows if not row.met]

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
    """Read the pins of a profile, with those of the tests if `dev`."""

    def pins_of(path: Path) -> tuple[list[Pin], list[str]]:
        pins = install.read_pins(path)
        return pins, [install.pinned(pins, part, path) for part in ("torch", "torchvision")]

    file = PROFILES[name][dev]
    pins, named = pins_of(project.PROJECT / file)
    _, newest = pins_of(project.PROJECT / CURRENT)
    asked = None if name == "auto" else Asked(name, *named)
    return Profile(name, file, pins, releases.release_lines(*newest), asked)


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
    return State(here, decision, install.make_rows(profile.pins, decision, probe.faults))


def bring_right(profile: Profile, state: State, wheels: Path | None) -> State:
    """Install what is lacking and look again; install once more what then does not import. A torch that computes on the
    CPU stays if the one for the GPU is not available; any other failure is an InstallError.
    """
    sources = pip_calls.find_sources(wheels)
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


def announce(profile: Profile, state: State) -> None:
    """Print the decision and its reason."""
    print(f"Step 1: profile {profile.name} ({profile.file}) for {sys.executable}")
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
        "packages": {
            row.name: {field: getattr(row, field) for field in ("pinned", "wanted", "installed", "fault")}
            for row in last.rows
        },
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
