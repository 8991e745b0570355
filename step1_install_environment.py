#!/usr/bin/env python3
"""Step 1: install what the project runs on into this interpreter, and say what machine this is."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console, environment, install, pip_calls


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--profile",
        choices=list(environment.PROFILES),
        default="auto",
        help="auto: the torch that serves this machine, one that works is kept (the default); current: "
        "requirements.txt to the letter; official: the published repository's versions",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="install from the wheels in this folder alone, without internet"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed")
    parser.add_argument("--check-only", action="store_true", help="install nothing, report only")
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    return parser.parse_args(argv)


def would_run(state: environment.State, wheels: Path | None) -> None:
    """Print the commands of a real run as they can be pasted, after the refusals of one. The versions
    that stay are held by a constraint file, which a real run writes; here its lines are shown.
    """
    install.refuse_unfit_process(state.rows)
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
        install.refuse_unfit_process(first.rows)
        last = environment.bring_right(profile, first, options.wheels)
    environment.show(last)
    if options.dry_run:
        if last.lacking:
            would_run(last, options.wheels)
        return console.OK
    environment.write_outputs(profile, first, last)
    if last.lacking:
        names = ", ".join(row.name for row in last.lacking)
        raise console.StepError(f"not as it should be: {names}", pip_calls.again())
    warning = last.decision.warning
    print(f"Next: {console.step_command('step2_download_models.py')}" + f" (warning: {warning})" * bool(warning))
    return console.OK


if __name__ == "__main__":
    console.run(main)
