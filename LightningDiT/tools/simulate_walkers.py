"""Simulate spectrograms of people who walk: `python -m LightningDiT.tools.simulate_walkers --help`.

The folders, file names, pictures and gaps at turns are those of recordings of real people; docs/radar.md says what is
simulated. A run that was stopped goes on when the same command is run again. With --check nothing is written: a plain
classifier shows how well these walkers can be told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from LightningDiT.console import Progress, importing, positive, run_main, seed_number

with importing(__name__):
    import numpy as np

    from LightningDiT.config import setting_differences
    from LightningDiT.data.prefetching import prefetched
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.files import (
        atomic_path,
        check_target,
        held_folder,
        kind_of,
        read_json,
        require_space,
        require_writable,
        write_text,
    )
    from LightningDiT.radar import pictures
    from LightningDiT.radar.colour_maps import NAMES
    from LightningDiT.radar.population import CONDITIONS, MOST_PASSES
    from LightningDiT.radar.recording import Cutting, recording, windows_of
    from LightningDiT.radar.sensor import Sensor
    from LightningDiT.radar.separability import features, two_splits

MANIFEST = "walkers.json"
BYTES = {"jpg": 40_000, "npy": 59_000}  # of a window, at most
CHECKED_SPLITS = 5
#: Options that nothing reads in a check, and with a format.
WITHOUT_EFFECT = {
    "check": ("format", "blow_up", "colour_map", "workers", "dry_run"),
    "npy": ("blow_up", "colour_map"),
}
MOST_PEOPLE, MOST_WINDOWS = 100_000, 2_000  # what a person's memory and a disk hold


def up_to(most: int) -> Callable[[str], int]:
    """Return the reader of an option: a whole number from 1 to `most`."""

    def number(text: str) -> int:
        value = positive(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} given, at most {most} expected")
        return value

    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.simulate_walkers", description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", help="the folder to write, a new one or one of a stopped run")
    target.add_argument(
        "--check", action="store_true", help="write nothing; print the accuracy of a classifier by two splits"
    )
    parser.add_argument("--people", type=up_to(MOST_PEOPLE), default=31, help="default: %(default)s")
    parser.add_argument(
        "--windows", type=up_to(MOST_WINDOWS), default=80, help="of a person and condition; default: %(default)s"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="another seed is another population")
    parser.add_argument(
        "--layout", choices=pictures.LAYOUTS, default="people", help="ID_7, Normal_line/ID_7, or 07/Normal_line"
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        metavar="NAME",
        help=f"of {', '.join(CONDITIONS)}; default: Normal_line in the layout `people`, else all",
    )
    parser.add_argument(
        "--format", choices=pictures.FORMATS, default="jpg", help="npy: float32 in dB; default: %(default)s"
    )
    parser.add_argument(
        "--blow-up", choices=pictures.BLOW_UPS, default="bilinear", help="of columns in a JPEG; default: %(default)s"
    )
    parser.add_argument("--colour-map", choices=NAMES, default="jet", help="of a JPEG; default: %(default)s")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and end")
    args = parser.parse_args(argv)
    asked = args.conditions or (["Normal_line"] if args.layout == "people" else CONDITIONS)
    args.conditions = [name for name in CONDITIONS if name in asked]
    idle = WITHOUT_EFFECT["check"] if args.check else WITHOUT_EFFECT.get(args.format, ())
    for name in idle:
        if getattr(args, name) != parser.get_default(name):
            reason = "--check" if args.check else f"--format {args.format}"
            print(f"note: --{name.replace('_', '-')} has no effect with {reason}")
    return args


def planned(args: argparse.Namespace, person: int, condition: int) -> list[str]:
    """Return the paths of a recording's windows below the output folder."""
    windows = windows_of(args.seed, person, condition, args.windows, Cutting())
    return [pictures.path_of(args.layout, person, condition, window.number, args.format) for window in windows]


def contents(args: argparse.Namespace, record: tuple[int, int]) -> list[bytes]:
    """Return the contents of the files of a recording: person and condition."""
    windows = recording(args.seed, *record, args.windows, Sensor(), Cutting())
    return [pictures.encoded(decibels, args.format, args.blow_up, args.colour_map) for _, decibels in windows]


def described(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings on which the files depend."""
    names = ("people", "windows", "seed", "layout", "conditions", "format", "blow_up", "colour_map")
    return {name: getattr(args, name) for name in names} | {"sensor": asdict(Sensor()), "cutting": asdict(Cutting())}


def require_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Raise LightningDiTError if a folder holds other files than those of a run with these settings."""
    manifest = folder / MANIFEST
    fix = "choose another --output, or move it away"
    if kind_of(manifest) is None:
        foreign = (
            sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
        )
        if foreign:
            raise LightningDiTError(f"{folder} holds {foreign[0]}, which no run of this command has written", fix)
        return
    try:
        there = read_json(manifest)["settings"]
        changed = setting_differences(there, settings)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LightningDiTError(f"{manifest} is damaged", fix) from None
    if changed:
        raise LightningDiTError(f"{folder} holds walkers of other settings ({'; '.join(changed[:3])})", fix)


def pool_of(workers: int) -> Executor:
    """Return processes that leave Ctrl-C to this one, or a thread of this one for one worker."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


@contextlib.contextmanager
def lost_workers() -> Iterator[None]:
    """Say in one line that the system ended a process."""
    try:
        yield
    except BrokenProcessPool:
        raise LightningDiTError(
            "a process of the simulation was ended, probably for memory", "add --workers 1"
        ) from None


def write_walkers(args: argparse.Namespace, folder: Path, records: list[tuple[int, int]]) -> int:
    """Write the recordings that are not complete, and return the number of files written."""
    missing = [record for record in records if not all((folder / name).is_file() for name in planned(args, *record))]
    results = prefetched(partial(contents, args), missing, args.workers, pool=pool_of)
    written = 0
    with Progress(len(missing) * args.windows, "window") as progress, lost_workers():
        for record, files in zip(missing, results, strict=True):
            for name, content in zip(planned(args, *record), files, strict=True):
                with atomic_path(folder / name) as path:
                    path.write_bytes(content)
                written += 1
            progress.update(len(files))
    return written


def check(args: argparse.Namespace) -> list[str]:
    """Return lines with the accuracies of a classifier; each condition has passes of its own."""
    inputs, labels, passes = [], [], []
    with Progress(args.people, "walker") as progress:
        for person in range(args.people):
            for condition in map(CONDITIONS.index, args.conditions):
                for window, decibels in recording(args.seed, person + 1, condition, args.windows, Sensor(), Cutting()):
                    inputs.append(features(decibels[None])[0])
                    labels.append(person)
                    passes.append((MOST_PASSES + 1) * condition + window.pass_)
            progress.update()
    found = [two_splits(np.stack(inputs), np.array(labels), np.array(passes), split) for split in range(CHECKED_SPLITS)]
    each = len(args.conditions) * args.windows
    return [
        f"logistic regression, {args.people} people, {each} windows of each, mean of {CHECKED_SPLITS} splits:",
        *(
            f"  {name:<18} {100 * np.mean(values):.1f} % right (standard deviation {100 * np.std(values):.1f})"
            for name, values in zip(("windows at random", "by pass"), zip(*found, strict=True), strict=True)
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    if args.check:
        if args.people < 2 or args.windows < 8:
            raise LightningDiTError(
                "--check needs two people and eight windows of each", "give larger --people and --windows"
            )
        print("\n".join(check(args)))
        return 0
    folder, settings = Path(args.output), described(args)
    check_target(folder / MANIFEST)
    require_same_run(folder, settings)
    records = [(person + 1, CONDITIONS.index(name)) for person in range(args.people) for name in args.conditions]
    count = len(records) * args.windows
    first = folder / planned(args, *records[0])[0]
    print(f"people {args.people}, conditions {len(args.conditions)}, windows {count}: {first}, ...")
    require_space(folder, count * BYTES[args.format], f"{count} windows", "choose another --output")
    if args.dry_run:
        return 0
    require_writable(folder)
    with held_folder(folder, "simulation"):
        require_same_run(folder, settings)
        write_text(folder / MANIFEST, json.dumps({"settings": settings}, indent=1) + "\n")
        written = write_walkers(args, folder, records)
    print(f"wrote {written} files, {count - written} were there; settings in {folder / MANIFEST}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
