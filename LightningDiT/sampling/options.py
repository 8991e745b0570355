"""The options that every sampling entry point offers, and how they change a configuration.

Nothing here needs torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.config import (
    CPU_BATCH,
    NAMED_SOLVERS,
    PRESET_WORDS,
    PRESETS,
    SAMPLING_PRECISIONS,
    Config,
    describe_guidance,
    describe_solver,
    with_overrides,
    with_preset,
)
from LightningDiT.console import positive, seed_number
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_text
from LightningDiT.idle_settings import sampling_notes

#: Classes that the published demo shows.
IMAGENET_DEMO_CLASSES = (975, 3, 207, 387, 388, 88, 979, 279)
MOST_DEMO_CLASSES = 10
CONTACT_SHEET = "all"
LABEL_FILE_FIX = "name a CSV file with a column class and a row for each image"
#: Option of each sampling setting that the command line can override.
OPTIONS = {
    "num_sampling_steps": "--steps",
    "sampling_method": "--solver",
    "cfg_scale": "--guidance-scale",
    "guide_ckpt": "--guide-ckpt",
    "precision": "--precision",
    "compile": "--compile",
    "deterministic": "--deterministic",
    "per_proc_batch_size": "--batch-size",
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `apply_options` and `classes_of` read."""
    parser.add_argument("--seed", type=seed_number, default=0, help="noise of image i comes from (seed, i); default 0")
    parser.add_argument("--steps", type=positive, help="points of the time grid; `fast` is then ab3 with this number")
    parser.add_argument(
        "--solver", help=f"{', '.join(NAMED_SOLVERS)}, euler, ab3, unipc2, dopri5, ...: docs/sampling.md"
    )
    add_preset_option(parser)
    parser.add_argument("--guidance-scale", type=float, help="1 is off")
    parser.add_argument(
        "--guide-ckpt", type=_file_name, metavar="FILE", help="weaker weights of the same shape, for autoguidance"
    )
    parser.add_argument("--precision", choices=SAMPLING_PRECISIONS, help="of the networks: docs/precision.md")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("auto", "on", "off"),
        const="on",
        help="compile the networks; auto, the default, on a GPU if the run gains by it: docs/compile.md",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="an image's bits are the same in every batch of the same --batch-size: docs/compile.md",
    )
    parser.add_argument("--batch-size", type=positive, help="images sampled at once, on each GPU")
    add_gpus_option(parser)
    parser.add_argument(
        "--time-budget",
        type=minutes,
        metavar="MINUTES",
        help="stop after this time and keep what is done; the same command continues",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and exit")


def add_preset_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of solver and guidance that somebody published, which other options then change."""
    rows = "; ".join(f"{name}: {words}" for name, words in PRESET_WORDS.items())
    parser.add_argument("--preset", choices=PRESETS, help=f"solver and guidance together. {rows}")


def add_gpus_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the GPUs."""
    parser.add_argument(
        "--gpus",
        choices=("all", "1"),
        default="all",
        help="share the images among all GPUs that work (default), or use 1",
    )


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of classes and of their number."""
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help=f"numbers or names; `{CONTACT_SHEET}` is a contact sheet of every class",
    )
    parser.add_argument(
        "--conditions",
        nargs="+",
        metavar="CONDITION",
        help="second label, by numbers or names: one for all images, or in turn, each for a round of the classes;"
        f" `{CONTACT_SHEET}` is every one, `none` the null condition, which is the default",
    )
    parser.add_argument("--count", type=positive, help="number of images; the classes take turns")


def apply_options(config: Config, args: argparse.Namespace) -> Config:
    """Return `config` with the preset, then the sampling options of the command line in place of its own.

    Raises:
        LightningDiTError: an option has a value that the configuration could not have either.
    """
    if args.preset:
        config = dataclasses.replace(config, sample=with_preset(config.sample, args.preset))
    given = {key: getattr(args, option[2:].replace("-", "_")) for key, option in OPTIONS.items()}
    return dataclasses.replace(config, sample=with_overrides(config.sample, OPTIONS, **given))


def classes_of(args: argparse.Namespace, num_classes: int, rounds: int = 1) -> list[int | str]:
    """Return the classes to sample, as given or the demonstration's: `--count` of them, or `rounds` times all."""
    chosen = chosen_classes(args, num_classes)
    count = args.count or rounds * len(chosen)
    return [chosen[index % len(chosen)] for index in range(count)]


def chosen_classes(args: argparse.Namespace, num_classes: int) -> list[int | str]:
    """Return the classes of one round, as given or the demonstration's."""
    if not args.classes:
        return demo_classes(num_classes)
    return list(range(num_classes)) if _is_all(args.classes) else list(args.classes)


def chosen_conditions(args: argparse.Namespace, num_conditions: int) -> list[int | str] | None:
    """Return the conditions that are given, None without any."""
    if not args.conditions:
        return None
    return list(range(num_conditions)) if num_conditions and _is_all(args.conditions) else list(args.conditions)


def grid_of(args: argparse.Namespace, config: Config) -> tuple[list[int | str], list[int | str] | None]:
    """Return class and condition of each image of a grid: every class of a round under the first condition, and so on.

    By default there are as many rounds as conditions. Without conditions on the command line these are None.
    """
    conditions = chosen_conditions(args, config.data.num_conditions)
    classes = classes_of(args, config.data.num_classes, len(conditions or [0]))
    if conditions is None:
        return classes, None
    return classes, in_rounds(conditions, len(chosen_classes(args, config.data.num_classes)), len(classes))


def read_label_file(path: str) -> tuple[list[str], list[str] | None]:
    """Return class and condition of each image as a CSV file names them; None in place of conditions without a column.

    Raises:
        LightningDiTError: it cannot be read, has other columns than `class` and `condition`, or no row.
    """
    try:
        table = csv.DictReader(read_text(path, encoding="utf-8-sig").splitlines(), strict=True)
        columns, rows = table.fieldnames or [], list(table)
    except (OSError, ValueError, csv.Error) as error:
        raise LightningDiTError(f"labels {path} cannot be read ({first_line(error)})", LABEL_FILE_FIX) from error
    if sorted(columns) not in (["class"], ["class", "condition"]) or not rows:
        raise LightningDiTError(f"labels {path} has {len(rows)} rows of {', '.join(columns)[:80]}", LABEL_FILE_FIX)
    if any(None in row or None in row.values() for row in rows):
        raise LightningDiTError(f"labels {path} has rows with fewer or more values than its header", LABEL_FILE_FIX)
    conditions = [row["condition"] for row in rows] if "condition" in columns else None
    return [row["class"] for row in rows], conditions


def in_rounds(conditions: Sequence[int | str], round_length: int, count: int) -> list[int | str]:
    """Return the condition of each of `count` images: each condition stays for a round and gives way to the next."""
    return [conditions[index // round_length % len(conditions)] for index in range(count)]


def _is_all(given: Sequence[str]) -> bool:
    return [name.lower() for name in given] == [CONTACT_SHEET]


def demo_classes(num_classes: int) -> list[int | str]:
    """Return the published demonstration's classes for ImageNet, else the first ten."""
    if num_classes > max(IMAGENET_DEMO_CLASSES):
        return list(IMAGENET_DEMO_CLASSES)
    return list(range(min(num_classes, MOST_DEMO_CLASSES)))


def images_at_once(images: int, at_most: int | None, gpus: int = 1) -> int:
    """Return the size of a run's batches: one for each GPU at least, and two, so that few images show progress as well.

    On the CPU it does not depend on the number of processes, since the last bits of an image depend on the size of its
    batch. On GPUs it is settled when the run begins.

    Args:
        at_most: None: as many as fit.
    """
    return min(at_most or images, max(1, math.ceil(images / max(2, gpus))))


def describe_settings(config: Config, images: int, output: Path) -> str:
    """Return the resolved settings in a few lines, for `--dry-run` and the start of a run."""
    sample = config.sample
    most = sample.per_proc_batch_size or CPU_BATCH  # a deterministic run pads each batch to it
    at_once = f"{most if sample.deterministic else images_at_once(images, most)} images at once"
    if sample.per_proc_batch_size is None and not sample.deterministic:
        at_once += ", on a GPU as many as its memory holds"
    guidance = f"autoguidance by {sample.guide_ckpt}, scale" if sample.guide_ckpt else "guidance"
    return "\n".join(
        (
            f"configuration  {config.source}",
            f"model          {config.model.model_type} from {config.ckpt_path}"
            + (f" with {config.adapter_path}" if config.adapter_path else ""),
            f"sampling       {describe_solver(sample)}; {guidance} {describe_guidance(sample)}",
            f"precision      {sample.precision}, compile {sample.compile},"
            f" {'deterministic, ' if sample.deterministic else ''}{at_once}",
            f"images         {images} -> {output}",
            *(f"note           {note}" for note in sampling_notes(config)),
        )
    )


def minutes(text: str) -> float:
    """Return the value of --time-budget."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} given, a positive number of minutes expected")
    return found


def _file_name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is expected")
    return text
