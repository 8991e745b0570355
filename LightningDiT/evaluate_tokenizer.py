"""Evaluate a tokenizer by its reconstructions: `python -m LightningDiT.evaluate_tokenizer --config C --images FOLDER`.

Writes evaluation.json and reconstructions.png. Scores for which a package or weights are missing are left out, and a
note says so. docs/tokenizer.md explains the scores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import natural, positive, program, run_main
from LightningDiT.metrics.options import FEATURES, add_evaluation_options
from LightningDiT.reference.option import add_help_config


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("evaluate_tokenizer"), description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="tokenizer YAML; its ckpt_path names the weights")
    parser.add_argument("--weights", metavar="FILE", help="replaces ckpt_path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="SET", help="folder of images or .npz file of ADM")
    source.add_argument("--data-root", help="folder of Fashion-MNIST, for its test photographs")
    source.add_argument("--levels", metavar="FOLDER", help="windows written by step5_prepare_spectrograms.py --write")
    parser.add_argument("--split-file", metavar="FILE", help="split.json of step 5, with --levels")
    parser.add_argument("--fold", type=natural, default=0, help="of the split; default: 0")
    parser.add_argument(
        "--part", choices=("training", "validation", "test"), default="validation", help="default: validation"
    )
    parser.add_argument("--count", type=positive, help="take only COUNT images, evenly spaced")
    parser.add_argument(
        "--features",
        help=f"of the Frechet distance: {FEATURES}; default: judge with --data-root, none with --levels; inception",
    )
    parser.add_argument("--lpips-weights", metavar="FILE", help="VGG-16; default: torch.hub's cache, else a download")
    add_evaluation_options(parser, "output/tokenizer_evaluation")
    args = parser.parse_args(argv)
    if bool(args.levels) != bool(args.split_file):
        parser.error("--levels and --split-file are given together")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.metrics.reconstruction import ReconstructionSettings, evaluate_reconstructions

    settings = ReconstructionSettings(**{**vars(args), "output": Path(args.output)})
    print("\n".join(evaluate_reconstructions(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
