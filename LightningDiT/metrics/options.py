"""The options that both evaluations have. Nothing here needs torch, so that `--help` answers at once."""

from __future__ import annotations

import argparse

from LightningDiT.console import positive

FEATURES = "inception, judge (for Fashion-MNIST), timm:NAME or timm:NAME@FILE"


def add_evaluation_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add network, batch size and folder of the results.

    Args:
        output: default of the folder.
    """
    parser.add_argument("--inception-weights", metavar="FILE", help="default: torch.hub's cache, else a download")
    parser.add_argument("--batch-size", type=positive, default=50, help="images computed at once; default: %(default)s")
    parser.add_argument("--output", default=output, help="folder of the results; default: %(default)s")
