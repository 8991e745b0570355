#!/usr/bin/env python3
"""Step 1: install the packages of the project for this interpreter, and report what machine this is."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK
from setup_steps import environment, install, pip_calls, project, releases, wheel_command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    profiles = (
        "auto (default): a torch that serves this machine (a working one is kept), the other packages in any tested "
        "version; current: exactly requirements.txt; official: the published repository's torch, the lowest versions"
    )
    add("--profile", choices=list(environment.PROFILES), default="auto", help=profiles)
    add("--wheels", type=Path, metavar="FOLDER", help="install without internet, from the wheels in this folder alone")
    index = "ask this package index; by default that of the variable PIP_INDEX_URL, of pip's configuration, or of pip"
    add("--index-url", type=pip_calls.index_url, metavar="URL", help=index)
    add("--dry-run", action="store_true", help="only say what would be installed")
    add("--check-only", action="store_true", help="only report")
    add("--dev", action="store_true", help="install the packages of the tests too, and exactly the pins")
    command = "print one command that fetches all wheels for Kaggle, but for torch, on any computer with internet"
    add("--write-wheel-command", action="store_true", help=command)
    python = f"the Python of that command (default: Kaggle's {releases.dotted(wheel_command.KAGGLE_PYTHON)}; in a "
    python += "Kaggle notebook its own)"
    add("--python-version", type=wheel_command.python_version, metavar="3.X", help=python)
    torch = "add torch to that command: the pinned release, or 2.7.1 for a P100"
    add("--with-torch", nargs="?", const="", metavar="VERSION", help=torch)
    options = parser.parse_args(argv)
    options.index_url = options.index_url or ""
    refuse_idle(parser, options)
    return options


def refuse_idle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error if one option makes another one idle."""
    writing = options.write_wheel_command
    idle = {
        "--index-url": options.index_url and (options.check_only or options.wheels is not None),
        "--python-version": options.python_version and not writing,
        "--with-torch": options.with_torch is not None and not writing,
        "--wheels": options.wheels is not None and writing,
        "--profile": options.profile != "auto" and writing,
        "--dev": options.dev and writing,
        "--dry-run": options.dry_run and writing,
        "--check-only": options.check_only and writing,
    }
    for name in (name for name, is_idle in idle.items() if is_idle):
        cause = "without --write-wheel-command" if not writing else "with --write-wheel-command"
        cause = "with --wheels or --check-only" if name == "--index-url" else cause
        parser.error(f"argument {name}: has no effect {cause}")


def would_run(state: environment.State, sources: tuple[pip_calls.Source, ...]) -> None:
    """Print the commands of a real run for pasting. A real run holds the versions that stay by a constraint file; this
    prints its lines.
    """
    source = sources[-1]
    held = [row.constraint for row in state.rows if row.met]
    if held:
        print("Would hold, one a line in constraints.txt: " + " ".join(held))
    for call in install.calls(state.rows, state.wrongly_built):
        hold = ("--constraint", "constraints.txt") if held else ()
        command = pip_calls.pip_command(call.requirements, *source.options, *hold, *call.options)
        print("Would run: " + shlex.join(map(project.hide_credentials, command)))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.write_wheel_command:
        wheel_command.print_command(options.python_version, options.with_torch, options.index_url)
        return OK
    if options.wheels is not None:
        pip_calls.find_sources(options.wheels)
    profile = environment.read_profile(options.profile, options.dev)
    first = last = environment.find_out(profile)
    environment.announce(profile, first)
    sources: tuple[pip_calls.Source, ...] = ()
    if first.lacking and not options.check_only:
        sources = pip_calls.find_sources(options.wheels, options.index_url)
        pip_calls.announce(sources[-1])
        last = first if options.dry_run else environment.bring_right(profile, first, sources)
    environment.show(last)
    if options.dry_run:
        if last.lacking and environment.may_install(profile, last):
            would_run(last, sources)
        return OK
    environment.write_outputs(profile, first, last)
    environment.require_enough(profile, last)
    warning = last.decision.warning
    print(f"Next: {project.step_command(project.STEP2)}" + f" (warning: {warning})" * bool(warning))
    return OK


if __name__ == "__main__":
    project.run(main)
