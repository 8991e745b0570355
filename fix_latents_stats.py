#!/usr/bin/env python3
"""Repair latents_stats.pt: say what is wrong with it, keep it aside and get a good one.

It is also the cure for "torch.cat(): expected a non-empty list of Tensors". A good file stays as
it is.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console, downloads, machine, stats_repair, weights

SOURCES = ("auto", "bundled", "hub", "latents", "images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stats", type=Path, metavar="FILE", help="default: the one in use")
    parser.add_argument("--check", action="store_true", help="only say whether it is good")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="where good ones come from")
    parser.add_argument("--latents", type=Path, metavar="FOLDER", help="computed from its shards")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="bundled model: computed from the Fashion-MNIST files in it",
    )
    parser.add_argument("--endpoint", metavar="URL", help="a mirror of the hub (or HF_ENDPOINT)")
    parser.add_argument(
        "--identity",
        action="store_true",
        help="INVENT mean 0 and std 1 (wrong for every model here)",
    )
    parser.add_argument("--channels", type=int, metavar="N", help="of --identity, where unknown")
    parser.add_argument("--dry-run", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    if options.source in ("latents", "images") and not getattr(options, options.source):
        parser.error(f"--source {options.source} needs --{options.source} FOLDER")
    if options.channels is not None and options.channels < 1:
        parser.error("--channels takes a number from 1")
    return options


def choose_source(options: argparse.Namespace, target: stats_repair.Target) -> str:
    """Where good statistics come from for this file: what was named, else what fits the file."""
    if options.source != "auto":
        return options.source
    for name in ("latents", "images"):
        if getattr(options, name):
            return name
    if target.kind == "other":
        raise console.StepError(
            f"nothing tells which tokenizer {target.path} belongs to",
            f"python fix_latents_stats.py --stats {shlex.quote(str(target.path))} --latents FOLDER "
            "(or --source hub if it is the published one)",
        )
    return "bundled" if target.kind == "bundled" else "hub"


def obtain(source: str, options: argparse.Namespace) -> stats_repair.Repair:
    """Get good statistics from one source."""
    if source == "bundled":
        return stats_repair.from_tokenizer(weights.BUNDLED / "tokenizer.safetensors")
    if source == "latents":
        return stats_repair.from_latents(options.latents.expanduser().resolve())
    if source == "images":
        return stats_repair.from_images(options.images.expanduser().resolve())
    downloads.use_endpoint(options.endpoint)
    return stats_repair.from_hub()


def write_identity(target: stats_repair.Target, channels: int | None) -> str | None:
    """Write the invented numbers that were asked for, and say so."""
    count = channels or target.channels
    if count is None:
        raise console.StepError(f"how many channels {target.path} must have is not known", "add --channels N")
    print(f"  WARNING: mean 0 and std 1 are INVENTED numbers for {count} channels.")
    print("  WARNING: every picture that is decoded with them is wrong, unless the model was trained")
    print("  WARNING: without normalisation. The library refuses them while data.latent_norm is true.")
    return stats_repair.put_in_place(target, lambda path: stats_repair.save_identity(path, count), check=False)


def repair(options: argparse.Namespace, target: stats_repair.Target) -> None:
    """Put good statistics in place of the bad ones and report."""
    console.require_writable(target.path.parent)
    if options.identity:
        aside = write_identity(target, options.channels)
    else:
        result = obtain(choose_source(options, target), options)
        aside = stats_repair.put_in_place(target, result.save)
        print(f"  good ones from {result.origin}")
        print(f"  {stats_repair.plausibility(result.stats)}")
    print(f"  written: {target.path}" + (f"; the bad one is kept as {aside}" if aside else ""))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    machine.require_torch("reading statistics")
    from LightningDiT.tokenizer.latents import diagnose

    target = stats_repair.locate(options.stats)
    print(f"Repair of {target.path} ({target.reason})")
    faults = diagnose(target.path, target.channels)
    if not faults:
        print("  it is good; nothing is changed")
        print("Next: python step4_run_inference.py")
        return console.OK
    for fault in faults:
        print(f"  wrong: {fault}")
    if options.check:
        return console.FAILED
    if options.dry_run:
        source = "identity" if options.identity else choose_source(options, target)
        print(f"Would keep it aside and get good ones from: {source}")
        return console.OK
    repair(options, target)
    print("Next: python step3_setup_configs.py")
    return console.OK


if __name__ == "__main__":
    console.run(main)
