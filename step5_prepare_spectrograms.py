#!/usr/bin/env python3
"""Step 5: bring in spectrograms of people, measure how the windows overlap, and split them by walking pass.

The data is a folder (ID_7/ID7_case1_1_Doppler102.jpg, Normal_line/ID_7/..., 01/Normal_line/..., or a folder for each
person), a list file with the columns path, person, condition, recording and number, or an array file (.npy, .npz,
.mat). It is only read. split.json names every window with its person, pass and part.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK, natural, positive
from LightningDiT.files import require_writable
from setup_steps import project

if TYPE_CHECKING:
    from LightningDiT.radar.preparation import Prepared

SCRIPT = "step5_prepare_spectrograms.py"
OUTPUT = project.PROJECT / "spectrograms"
MAPS = ("jet", "jet-matplotlib", "viridis", "turbo", "parula", "inferno", "gray")
MOST_PIXELS = 4096  # of a side
MOST_FOLDS = 20


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="folder, list or array file")
    add("--pattern", metavar="REGEX", help="of the paths, with the groups person, number, ...; default: guessed")
    add("--people", type=positive, metavar="N", help="how many there should be, for the list of missing ones")
    add("--colour-map", choices=MAPS, help="of all images; default: recognised")
    add("--db-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="dB of the levels 0 and 1")
    add("--folds", type=positive, default=5, metavar="N", help="each pass is tested in one of them; default: 5")
    add("--seed", type=natural, default=0, metavar="N", help="of the split; default: 0")
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"for split.json; default: {OUTPUT.name}")
    add("--write", type=Path, metavar="FOLDER", help="also write one channel (16 bits), and views in the colour map")
    add("--size", type=size, metavar="WxH", help="size of the written files; default: Doppler rows x native columns")
    add("--fit", choices=("resize", "pad"), help="how windows get that size, nothing is cut; default: resize")
    add("--keep-columns", action="store_true", help="write the columns of the files in place of the native ones")
    add("--dry-run", action="store_true", help="only print the audit, write nothing")
    options = parser.parse_args(argv)
    low, high = options.db_range or (0, 1)
    for wrong, message in (
        (not low < high, f"--db-range takes the lower value first, {low:g} {high:g} given"),
        (not 2 <= options.folds <= MOST_FOLDS, f"--folds takes a number from 2 to {MOST_FOLDS}"),
        (bool(options.size) and not options.write, "--size goes with --write"),
        (bool(options.fit) and not options.size, "--fit goes with --size"),
        (options.keep_columns and not options.write, "--keep-columns goes with --write"),
        (bool(options.write) and options.dry_run, "--dry-run writes nothing: omit --write"),
    ):
        if wrong:
            parser.error(message)
    return options


def size(text: str) -> tuple[int, int]:
    """Return height and width of an option's value: WIDTHxHEIGHT, or one side of a square."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.lower())
    sides = [int(side) for side in match.groups() if side] if match else [0]
    if not all(8 <= side <= MOST_PIXELS for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} given, such as 256 or 64x256 expected, each 8 to {MOST_PIXELS}")
    return sides[-1], sides[0]


def write(options: argparse.Namespace, prepared: Prepared) -> list[Path]:
    """Write what the options ask for; return the files for later commands."""
    from LightningDiT.radar import written

    images = written.images_of(prepared)
    if options.write:
        folder = project.absolute(options.write)
        fit, native = options.fit or "resize", not options.keep_columns
        images = written.write_levels(prepared, folder, options.size, fit, native, options.colour_map)
        print(f"wrote {len(images)} windows to {folder}: levels/ (16 bits), views/ (for people) and manifest.json")
    data, output = project.absolute(options.data), project.absolute(options.output)
    return written.write_split(prepared, data, output, options.seed, images)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from LightningDiT.radar.preparation import prepare
    from LightningDiT.radar.written import report, require_own_folder

    print("Step 5: spectrograms, their audit and their split", flush=True)
    if not options.dry_run:
        require_writable(project.absolute(options.output))
    data = project.absolute(options.data)
    if options.write:
        require_own_folder(project.absolute(options.write), data)
    db_range = tuple(options.db_range) if options.db_range else None
    prepared = prepare(data, options.pattern, options.colour_map, db_range, options.folds, options.seed)
    for line in report(prepared, options.people):
        print(line)
    if options.dry_run:
        return OK
    files = write(options, prepared)
    print(f"wrote {', '.join(path.name for path in files)} to {files[0].parent}")
    print(next_line(prepared, files, bool(options.write)))
    return OK


def next_line(prepared: Prepared, files: list[Path], is_written: bool) -> str:
    """Return what comes next, as far as there is something."""
    if len(files) == 1:
        return "Next: run this again with --write FOLDER, which gives the lists that extract_features takes"
    square = is_written or all(height == width for height, width in prepared.sizes)
    crop = "" if square else "\nIt crops windows to squares; --write FOLDER --size 256 keeps both ends of each axis."
    output = files[0].parent / "latents"
    command = f"{project.interpreter()} -m LightningDiT.extract_features --config YAML --list {files[1]}"
    return (
        "Next: no step trains by split.json yet. Today the training windows alone become latents by\n"
        f"  {command} --output {output}{crop}"
    )


if __name__ == "__main__":
    project.run(main)
