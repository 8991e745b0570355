"""The sampling options that every sampling entry point offers, and how they change a configuration.

Nothing here needs torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from LightningDiT.config import RULES, Config, resolved_solver, with_points
from LightningDiT.errors import LightningDiTError

#: Classes that the published demo shows.
IMAGENET_DEMO_CLASSES = (975, 3, 207, 387, 388, 88, 979, 279)
MOST_DEMO_CLASSES = 10
CONTACT_SHEET = "all"


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `apply_options` and `classes_of` read."""
    parser.add_argument("--seed", type=natural, default=0, help="noise of image i comes from (seed, i); default 0")
    parser.add_argument("--steps", type=positive, help="points of the time grid; `fast` then is ab3 with so many")
    parser.add_argument("--solver", help="fast, published, euler, ab3, unipc2, dopri5, ...: docs/sampling.md")
    parser.add_argument("--guidance-scale", type=float, help="1 is off")
    parser.add_argument(
        "--guide-ckpt", type=_name, metavar="FILE", help="weaker weights of the same shape, for autoguidance"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="of the transformer")
    parser.add_argument("--compile", action="store_true", default=None, help="compile the transformer: docs/compile.md")
    parser.add_argument("--batch-size", type=positive, help="images sampled at once")
    parser.add_argument(
        "--time-budget",
        type=_minutes,
        metavar="MINUTES",
        help="stop after so long, keep what is done; rerun to go on",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and end")


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Add the choice of classes and of their number."""
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help=f"numbers or names; `{CONTACT_SHEET}` is a contact sheet of every class",
    )
    parser.add_argument("--count", type=positive, help="number of images, dealt over the classes in turn")


def apply_options(config: Config, args: argparse.Namespace) -> Config:
    """Return `config` with the sampling options of the command line in place of its own.

    Raises:
        LightningDiTError: an option has a value that the configuration could not have either.
    """
    options = {
        "num_sampling_steps": "steps",
        "sampling_method": "solver",
        "cfg_scale": "guidance_scale",
        "guide_ckpt": "guide_ckpt",
        "precision": "precision",
        "compile": "compile",
        "per_proc_batch_size": "batch_size",
    }
    given = {key: getattr(args, name) for key, name in options.items() if getattr(args, name) is not None}
    for rule, good, expected in RULES:
        key = rule.removeprefix("sample.")
        if key in given and not good(given[key]):
            option = options[key].replace("_", "-")
            raise LightningDiTError(f"--{option} is {given[key]}; {expected} is expected", "choose another value")
    points = given.pop("num_sampling_steps", None)
    sample = dataclasses.replace(config.sample, **given)
    return dataclasses.replace(config, sample=with_points(sample, points) if points else sample)


def classes_of(args: argparse.Namespace, num_classes: int) -> list[int | str]:
    """Return the classes to sample, as given or the demonstration's, `--count` of them."""
    if args.classes and [name.lower() for name in args.classes] == [CONTACT_SHEET]:
        chosen: list[int | str] = list(range(num_classes))
    elif args.classes:
        chosen = list(args.classes)
    else:
        chosen = demo_classes(num_classes)
    count = args.count or len(chosen)
    return [chosen[index % len(chosen)] for index in range(count)]


def demo_classes(num_classes: int) -> list[int | str]:
    """Return the published demonstration's classes for ImageNet, else the first ten."""
    if num_classes > max(IMAGENET_DEMO_CLASSES):
        return list(IMAGENET_DEMO_CLASSES)
    return list(range(min(num_classes, MOST_DEMO_CLASSES)))


def describe_settings(config: Config, images: int, output: Path) -> str:
    """Return the resolved settings in a few lines, for `--dry-run` and the start of a run."""
    sample = config.sample
    spelt = resolved_solver(sample)
    grid = "graded grid" if spelt.time_grid == "graded" else f"shift {spelt.timestep_shift:g}"
    points = f"{spelt.num_sampling_steps} points, {grid}"
    if sample.sampling_method == "calibrated":
        points = f"at most {spelt.num_sampling_steps - 1} evaluations"
    elif sample.sampling_method == "fast":
        points = f"{spelt.sampling_method}, {points}"
        if sample.solver_file:  # the weights, not read yet, decide
            points = f"calibrated where one fits, else {points}"
    kind = f"autoguidance by {sample.guide_ckpt}, scale" if sample.guide_ckpt else "guidance"
    guidance = (
        f"{kind} {sample.cfg_scale:g} on {sample.guided_channels} channels"
        f" from t = {sample.cfg_interval_start:g} to {sample.cfg_interval_end:g}"
    )
    return "\n".join(
        (
            f"configuration  {config.source}",
            f"model          {config.model.model_type} from {config.ckpt_path}",
            f"sampling       {sample.mode} {sample.sampling_method}, {points}; {guidance}",
            f"precision      {sample.precision}{', compiled' if sample.compile else ''},"
            f" {sample.per_proc_batch_size} images at once",
            f"images         {images} -> {output}",
            *(f"note           {note}" for note in config.notes),
        )
    )


def positive(text: str) -> int:
    """Return an option's value as a whole number of at least 1."""
    return _at_least(text, 1)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of minutes")
    return minutes


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the name of a file is expected")
    return text


def natural(text: str) -> int:
    """Return an option's value as a whole number of at least 0."""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return number
