#!/usr/bin/env python3
"""Repair latents_stats.pt: say what is wrong with it, keep it aside and get a good one.

It also cures "torch.cat(): expected a non-empty list of Tensors", which the published code raises if latents_stats.pt
is missing or empty and no latent shards lie beside it, or if data.data_path names the file instead of its folder. A
good file stays as it is. Without --source, --latents and --images the sources are, in this order: for the bundled model
the copy in its tokenizer's file; for the published one the hub and the attached data sets; for every model then latent
shards beside the statistics.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import FAILED, OK
from LightningDiT.errors import LightningDiTError
from setup_steps import downloads, machine, project, stats_repair, weights

MOST_CHANNELS = 4096  # of --identity, far beyond any tokenizer

if TYPE_CHECKING:
    from LightningDiT.tokenizer.latents import LatentStats

ENCODING = ("max_images", "tokenizer", "checkpoint")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stats", type=Path, metavar="FILE", help="default: that of the configuration")
    add("--config", type=Path, metavar="YAML", help=f"default: {project.CONFIG.name}")
    add("--check", action="store_true", help="only say whether it is good")
    add("--source", choices=("auto", *stats_repair.SOURCES), help="source of good ones")
    add("--latents", type=Path, metavar="FOLDER", help="compute them from its shards")
    add("--images", type=Path, metavar="FOLDER", help="encode its images, or Fashion-MNIST's files")
    add("--max-images", type=int, metavar="N", help=f"thinned out evenly; default: {stats_repair.MAX_IMAGES}")
    add("--tokenizer", type=Path, metavar="YAML", help="encodes the images; default: that of the file")
    add("--checkpoint", type=Path, metavar="FILE", help="that tokenizer's weights")
    weights.add_models_option(parser)
    add("--attached", type=Path, metavar="FOLDER", help="attached data sets; default on Kaggle: /kaggle/input")
    add("--endpoint", metavar="URL", help="a mirror of the hub (or HF_ENDPOINT)")
    add("--identity", action="store_true", help="INVENT mean 0 and std 1 (wrong for every model here)")
    add("--channels", type=int, metavar="N", help="for --identity, if unknown")
    add("--dry-run", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    if options.source == "images" and not options.images:
        parser.error("--source images needs --images FOLDER")
    for name in ("latents", "images"):
        if getattr(options, name) and options.source not in (None, "auto", name):
            parser.error(f"--{name} does not go with --source {options.source}")
    for name in ENCODING:
        if getattr(options, name) is not None and not options.images:
            parser.error(f"--{name.replace('_', '-')} goes with --images FOLDER")
    for name in ("channels", "max_images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} takes a number from 1")
    if options.channels is not None and options.channels > MOST_CHANNELS:
        parser.error(f"--channels takes a number up to {MOST_CHANNELS}")
    return options


def configuration(named: Path | None) -> Path:
    """Return the configuration in question, which must exist if it was named; step 3's own may be absent."""
    path = project.absolute(named) if named else project.CONFIG
    if named and not path.is_file():
        raise LightningDiTError(f"--config {path} is no file, a YAML that step 3 wrote was expected", step3(named))
    return path


def step3(config: Path | None) -> str:
    """Return the command that writes the configuration in question."""
    return project.step_command(project.STEP3, *(["--output", str(config)] if config else []))


def choose_sources(options: argparse.Namespace, target: stats_repair.Target) -> tuple[str, ...]:
    """Return the sources of good statistics in order: the named ones, else those that fit the file."""
    if options.source not in (None, "auto"):
        return (options.source,)
    named = tuple(name for name in ("latents", "images") if getattr(options, name))
    return named if named and options.source is None else stats_repair.ORDER[target.kind]


def request_of(options: argparse.Namespace, sources: tuple[str, ...]) -> stats_repair.Request:
    """Return what the options say about the sources, their paths absolute."""

    def absolute(path: Path | None) -> Path | None:
        return project.absolute(path) if path else None

    return stats_repair.Request(
        latents=absolute(options.latents),
        images=absolute(options.images),
        max_images=options.max_images or stats_repair.MAX_IMAGES,
        tokenizer=absolute(options.tokenizer),
        checkpoint=absolute(options.checkpoint),
        models=options.models,
        attached=absolute(options.attached or weights.attached_folder()),
        config=configuration(options.config),
        patience=downloads.PATIENCE if len(sources) == 1 else stats_repair.HURRIED,
    )


def write_identity(target: stats_repair.Target, channels: int | None) -> str | None:
    """Write mean 0 and std 1 as asked, and say that they are invented."""
    from LightningDiT.checkpoint import save_training_state
    from LightningDiT.tokenizer.latents import LatentStats

    count = channels or target.channels
    if count is None:
        raise LightningDiTError(f"how many channels {target.path} must have is not known", "add --channels N")
    print(f"  WARNING: mean 0 and std 1 are INVENTED numbers for {count} channels.")
    print("  WARNING: every image decoded with them is wrong, unless the model was trained without normalisation.")
    print("  WARNING: The library refuses them while data.latent_norm is true.")
    stats = LatentStats.identity(count)  # its own `save` refuses them
    save = partial(save_training_state, {"mean": stats.mean, "std": stats.std})
    return stats_repair.put_in_place(target, save, check=False)


def repair(options: argparse.Namespace, target: stats_repair.Target) -> None:
    """Replace the bad statistics by good ones and report."""
    stats_repair.require_writable_target(target, options.models)
    if options.identity:
        aside = write_identity(target, options.channels)
    else:
        sources = choose_sources(options, target)
        found, aside = stats_repair.repair(target, request_of(options, sources), sources)
        print(f"  good ones from {found.origin}")
        show(found.stats, found.latents, found.doubt)
    print(f"  written: {target.path}" + (f"; the bad one is kept as {aside}" if aside else ""))


def show(stats: LatentStats, latents: int | None = None, doubt: str = "") -> None:
    """Print the range of the numbers, what is hard to believe about them and a doubt about their source."""
    mean, std = stats.mean, stats.std
    print(f"  {mean.shape[1]} channels, means {mean.min():.3f} to {mean.max():.3f}, ", end="")
    print(f"standard deviations {std.min():.3f} to {std.max():.3f}")
    for line in (*stats_repair.doubts(stats, latents), *([doubt] if doubt else [])):
        print(f"  WARNING: {line}")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    machine.require_torch("reading statistics")
    from LightningDiT.tokenizer.latents import LatentStats, diagnose

    downloads.use_endpoint(options.endpoint)
    options.models = weights.models_folder(options.models_dir, project.REPAIR)
    target = stats_repair.locate(options.stats, configuration(options.config), options.models)
    print(f"Repair of {target.path} ({target.reason})")
    faults = diagnose(target.path, target.channels)
    for fault in (*faults, *([target.config_fault] if target.config_fault else [])):
        print(f"  wrong: {fault}")
    if options.check and (faults or target.config_fault):
        fixes = [part for part in (sys.argv[1:] if argv is None else argv) if part != "--check"]
        print(f"  fix: {project.step_command(Path(__file__).name, *fixes) if faults else step3(options.config)}")
        return FAILED
    if not faults:
        print("  it is good; nothing is changed")
        show(LatentStats.load(target.path))
    elif options.dry_run:
        sources = ("identity",) if options.identity else choose_sources(options, target)
        print(f"Would keep it aside and get good ones from: {', else '.join(sources)}")
        return OK
    else:
        repair(options, target)
    ready = configuration(options.config).is_file() and not target.config_fault
    print(f"Next: {project.step_command(project.STEP4) if ready else step3(options.config)}")
    return OK


if __name__ == "__main__":
    project.run(main)
