#!/usr/bin/env python3
"""Step 5: bring in spectrograms of people, measure how the windows overlap, and split them by walking pass.

The data is a folder (ID_7/ID7_case1_1_Doppler102.jpg, Normal_line/ID_7/..., 01/Normal_line/..., or a folder for each
person), a list file with the columns path, person, condition, recording and number, or an array file (.npy, .npz,
.mat). It is only read. split.json names every window with its person, pass and part.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK, natural, positive
from LightningDiT.files import require_writable
from setup_steps import project

if TYPE_CHECKING:
    from LightningDiT.radar.preparation import Prepared

SCRIPT, NEXT = "step5_prepare_spectrograms.py", "step6_adapt_models.py"
OUTPUT = project.PROJECT / "spectrograms"
MAPS = ("jet", "jet-matplotlib", "viridis", "turbo", "parula", "inferno", "gray")
MOST_PIXELS = 4096  # of a side
MOST_FOLDS = 20
SQUARES = "下一步：网络只接受正方形的窗口，边长为 8 的倍数："
ADAPT = "下一步：用每人的少量图像适配生成模型，再由步骤 7 判断是否有帮助："
COMMANDS = "手动训练一个模型：训练这些窗口的 tokenizer，提取潜变量，再训练："


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="folder, list or array file")
    add("--pattern", metavar="REGEX", help="of the paths, with the groups person, number, ...; default: what fits best")
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
        images, removed = written.write_levels(prepared, folder, options.size, fit, native, options.colour_map)
        print(f"wrote {len(images)} windows to {folder}: levels/ (16 bits), views/ (for people) and manifest.json")
        if removed:
            print(f"removed the files of {removed} windows of an earlier run, which are no longer among these")
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
    for line in next_lines(options, prepared, files[0].parent):
        print(line)
    return OK


def next_lines(options: argparse.Namespace, prepared: Prepared, folder: Path) -> Iterator[str]:
    """Yield what comes next: the way to square levels, or step 6 and the commands of a training; also in Chinese.

    Args:
        folder: of split.json; takes the configuration of the training.
    """
    from LightningDiT.radar.training_file import NAME, TrainingData, is_fitting, write_training_file

    height, width = written_size(options, prepared)
    if not (options.write and is_fitting(height, width)):
        written = f"the levels have {width}x{height} pixels: " if options.write else ""
        again = project.again(
            SCRIPT, *(() if options.write else ("--write", "LEVELS")), "--size", "64", without=("--size",)
        )
        yield from project.in_both(f"Next: {written}networks take squares, whose sides are multiples of 8", SQUARES)
        yield f"  {again}"
        return
    parts = Counter(row.part for row in prepared.rows)
    people, conditions = ({getattr(row, key) for row in prepared.rows} for key in ("person", "condition"))
    levels, is_validated = project.absolute(options.write), parts["validation"] > 0
    data = TrainingData(height, len(people), len(conditions), is_validated, levels)
    file, fits = write_training_file(folder, data)
    if fits:
        yield f"wrote {NAME}, the configuration of a training on these windows"
    else:
        yield f"warning: {NAME} is kept as it is, and was edited or is of other windows; delete it for a new one"
    if parts["test"] and len(people) > 1:
        yield from project.in_both("Next: generators of a few images of each person; step 7 says if they help", ADAPT)
        own = ("--levels", str(levels), "--split-file", str(folder / "split.json"))
        yield f"  {project.step_command(NEXT, *(() if levels == OUTPUT / 'levels' and folder == OUTPUT else own))}"
    yield from project.in_both("By hand: a tokenizer of these windows, their latents, and a training", COMMANDS)
    yield from (f"  {command}" for command in commands(levels, folder, file, is_validated))


def written_size(options: argparse.Namespace, prepared: Prepared) -> tuple[int, int]:
    """Return height and width of the levels that are written."""
    if options.size:
        return options.size
    height, width = prepared.sizes.most_common(1)[0][0]
    columns = prepared.columns.count if prepared.columns and not options.keep_columns else width
    return height, min(columns, width)


def commands(levels: Path, folder: Path, file: Path, is_validated: bool) -> list[str]:
    """Return the commands from levels to a trained network."""
    quote, module = shlex.quote, f"{project.interpreter()} -m LightningDiT"
    source = f"--levels {quote(str(levels))} --split-file {quote(str(folder / 'split.json'))}"
    tokenizer, latents, valid = (quote(str(folder / name)) for name in ("tokenizer", "latents", "latents_valid"))
    config, walkers = quote(str(file)), quote(str(project.PROJECT / "models" / "walkers"))
    extract = f"{module}.extract_features --config {config} {source}"
    own = quote(str(project.PROJECT / "LightningDiT" / "tokenizer" / "configs" / "levels_f4d6.yaml"))
    return [
        f"{module}.train_tokenizer --config {own} --init {walkers} {source} --output {tokenizer}",
        f"{extract} --draws 8 --output {latents}",
        *([f"{extract} --part validation --output {valid}"] if is_validated else []),
        f"{module}.train --config {config}",
    ]


if __name__ == "__main__":
    project.run(main)
