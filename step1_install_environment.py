#!/usr/bin/env python3
"""Step 1: install the packages of the project for this interpreter, and report what machine this is."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK
from setup_steps import environment, install, pip_calls, project


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    profiles = (
        "auto (default): a torch that serves this machine (a working one is kept), the other packages in any tested "
        "version; current: exactly requirements.txt; official: the published repository's torch, the lowest versions"
    )
    add("--profile", choices=list(environment.PROFILES), default="auto", help=profiles)
    add("--wheels", type=Path, metavar="FOLDER", help="install without internet, from the wheels in this folder alone")
    add("--dry-run", action="store_true", help="only say what would be installed")
    add("--check-only", action="store_true", help="only report")
    add("--dev", action="store_true", help="install the packages of the tests too, and exactly the pins")
    return parser.parse_args(argv)


def would_run(state: environment.State, wheels: Path | None) -> None:
    """Print the commands of a real run for pasting. A real run holds the versions that stay by a constraint file; this
    prints its lines.
    """
    source = pip_calls.find_sources(wheels)[-1]
    held = [row.constraint for row in state.rows if row.met]
    if held:
        print("Would hold, one a line in constraints.txt: " + " ".join(held))
    for call in install.calls(state.rows, state.wrongly_built):
        hold = ("--constraint", "constraints.txt") if held else ()
        command = pip_calls.pip_command(call.requirements, *source.options, *hold, *call.options)
        print("Would run: " + shlex.join(command))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.wheels is not None:
        pip_calls.find_sources(options.wheels)
    profile = environment.read_profile(options.profile, options.dev)
    first = last = environment.find_out(profile)
    environment.announce(profile, first)
    if first.lacking and not (options.dry_run or options.check_only):
        last = environment.bring_right(profile, first, options.wheels)
    environment.show(last)
    if options.dry_run:
        if last.lacking and environment.may_install(profile, last):
            would_run(last, options.wheels)
        return OK
    environment.write_outputs(profile, first, last)
    environment.require_enough(profile, last)
    warning = last.decision.warning
    print(f"Next: {project.step_command(project.STEP2)}" + f" (warning: {warning})" * bool(warning))
    return OK


if __name__ == "__main__":
    project.run(main)
