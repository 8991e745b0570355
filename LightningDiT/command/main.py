"""The console command: `lightningdit COMMAND ...` runs an entry point with the options of its module call."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial

from LightningDiT import __version__
from LightningDiT.console import called_as, run_main

#: Module below LightningDiT with a `main(argv) -> int`, and one line of help, by the command's name.
COMMANDS: dict[str, tuple[str, str]] = {
    "sample": ("inference", "generate images"),
    "train": ("train", "train a transformer or U-Net on latents"),
    "train-tokenizer": ("train_tokenizer", "train a VA-VAE on images or spectrograms"),
    "extract": ("extract_features", "encode images or spectrograms into latents"),
    "evaluate": ("evaluate", "measure generated images: FID, precision, recall"),
    "evaluate-tokenizer": ("evaluate_tokenizer", "measure a tokenizer's reconstructions"),
    "demo": ("command.demo", "open a page on which a person samples a model"),
    "gallery": ("command.gallery", "write a page with images of every class"),
    "doctor": ("command.doctor", "show machine, versions, weights, and how fast what would run"),
    "config": ("command.config", "explain the keys of a YAML file"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    return run_main(partial(dispatch, argv))


def dispatch(argv: Sequence[str] | None) -> int:
    """Import the module of a command alone, and run it with the rest of the command line."""
    name, *rest = parse(sys.argv[1:] if argv is None else argv)
    module = importlib.import_module(f"LightningDiT.{COMMANDS[name][0]}")
    with called_as(f"lightningdit {name}"):
        return module.main(rest)


def parse(argv: Sequence[str]) -> list[str]:
    """Return the name of a command and its own options."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lightningdit",
        usage="lightningdit COMMAND ...",
        description="LightningDiT with VA-VAE. Commands:\n\n" + "\n".join(lines),
        epilog="lightningdit COMMAND --help lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightningdit {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    args = parser.parse_args(argv[:1])
    return [args.command, *argv[1:]]


if __name__ == "__main__":
    sys.exit(run_main(main))
