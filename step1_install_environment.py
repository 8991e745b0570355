#!/usr/bin/env python3
"""Step 1: install what the project runs on into this interpreter, and say what machine this is."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console, install, machine

REPORT = console.PROJECT / "environment_report.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed")
    parser.add_argument("--check-only", action="store_true", help="install nothing, report only")
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    return parser.parse_args(argv)


def find_out(pins: list[install.Pin]) -> tuple[list[install.Row], machine.TorchFacts]:
    """Compare the pins with what is installed, and import what is there in one process."""
    there = [pin.name for pin in pins if machine.installed_version(pin.name)]
    probe = machine.probe(there, with_torch="torch" in there)
    return install.make_rows(pins, probe.torch, probe.faults), probe.torch


def show(rows: list[install.Row], torch: machine.TorchFacts) -> None:
    """Print the packages and the machine, one line per fact."""
    for row in rows:
        state = "right" if row.as_pinned else "kept"
        if row.fault:
            state = f"does not import: {row.fault}"
        elif not row.met:
            state = f"{row.wanted} is wanted"
        print(f"  {row.name:16} {row.installed or 'absent':16} {state}")
    for name, value in machine.describe_machine(torch, console.PROJECT):
        print(f"  {name:16} {value}")
    if torch.note:
        print(f"  {'note':16} {torch.note}")


def write_report(rows: list[install.Row], torch: machine.TorchFacts, decision: str) -> None:
    """Write environment_report.json; a read-only project costs a line, not the step."""
    report = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "memory_bytes": machine.memory_bytes(),
        "free_disk_bytes": machine.free_bytes(console.PROJECT),
        "torch": vars(torch),
        "decision": decision,
        "packages": {
            row.name: {
                "wanted": row.wanted,
                "installed": row.installed,
                "kept": row.kept,
                "fault": row.fault,
            }
            for row in rows
        },
    }
    fresh = REPORT.with_name(REPORT.name + ".new")
    try:
        fresh.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        fresh.replace(REPORT)
        print(f"Report: {REPORT}")
    except OSError as error:
        print(f"note: {REPORT} could not be written ({error.strerror})")


def decide(rows: list[install.Row]) -> str:
    """Say in one line what is kept, what is installed and why."""
    kept = [f"{row.name} {row.installed}" for row in install.kept_rows(rows)]
    lacking = [row.requirement for row in rows if not row.met]
    parts = [f"kept, because they work here: {', '.join(kept)}"] if kept else []
    parts.append(f"to install: {' '.join(lacking)}" if lacking else "nothing to install")
    return "; ".join(parts)


def bring_right(pins: list[install.Pin], rows: list[install.Row]) -> tuple[list[install.Row], machine.TorchFacts]:
    """Install what is lacking; what then is there but does not import is installed anew once."""
    install.refuse_managed_interpreter()
    install.install(rows)
    rows, torch = find_out(pins)
    broken = [row for row in rows if row.fault]
    if broken:
        install.reinstall(broken)
        rows, torch = find_out(pins)
    return rows, torch


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    name = "requirements-dev.txt" if options.dev else "requirements.txt"
    pins = install.read_pins(console.PROJECT / name)
    print(f"Step 1: the packages of {name} for {sys.executable}")
    rows, torch = find_out(pins)
    decision = decide(rows)
    print(decision[0].upper() + decision[1:])
    lacking = [row for row in rows if not row.met]
    if lacking and not (options.dry_run or options.check_only):
        rows, torch = bring_right(pins, rows)
        lacking = [row for row in rows if not row.met]
    show(rows, torch)
    if options.dry_run:
        if lacking:
            install.refuse_managed_interpreter()
            command = install.pip_command([row.requirement for row in lacking])
            print("Would run: " + " ".join(command))
        return console.OK
    write_report(rows, torch, decision)
    if lacking:
        names = ", ".join(row.name for row in lacking)
        raise console.StepError(f"not as it should be: {names}", install.AGAIN)
    print("Next: python step2_download_models.py")
    return console.OK


if __name__ == "__main__":
    console.run(main)
