"""Evaluate a tokenizer by its reconstructions: `python -m LightningDiT.evaluate_tokenizer --config C --images FOLDER`.

Writes evaluation.json and reconstructions.png. Scores for which a package or weights are missing are left out, and a
note says so. docs/tokenizer.md explains the scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import Progress, positive, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import disk_errors, write_text
from LightningDiT.metrics.options import FEATURES, add_evaluation_options

if TYPE_CHECKING:
    from torch import Tensor

REPORT, PICTURE, PICTURE_IMAGES = "evaluation.json", "reconstructions.png", 8


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.evaluate_tokenizer", description=__doc__)
    parser.add_argument("--config", required=True, help="tokenizer YAML; its ckpt_path names the weights")
    parser.add_argument("--weights", metavar="FILE", help="replaces ckpt_path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="SET", help="folder of images or .npz file of ADM")
    source.add_argument("--data-root", help="folder of Fashion-MNIST, for its test photographs")
    parser.add_argument("--count", type=positive, help="take only COUNT images, evenly spaced")
    parser.add_argument(
        "--features", help=f"of the Frechet distance: {FEATURES}; default: judge with --data-root, else inception"
    )
    parser.add_argument("--lpips-weights", metavar="FILE", help="VGG-16; default: torch.hub's cache, else a download")
    add_evaluation_options(parser, "output/tokenizer_evaluation")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    import torch

    from LightningDiT.data.image_sets import evenly_spaced
    from LightningDiT.images import save_reconstructions
    from LightningDiT.metrics.reconstruction import ReconstructionScores, make_measures, report_lines
    from LightningDiT.metrics.sources import open_images
    from LightningDiT.tokenizer.config import load_tokenizer_config
    from LightningDiT.tokenizer.vavae import VA_VAE

    config, folder = load_tokenizer_config(args.config), Path(args.output)
    weights = args.weights or config.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no ckpt_path", "give --weights FILE")
    tokenizer = VA_VAE(config, ckpt_path=weights)
    images = open_images(args.images or f"{args.data_root}:test", args.images and tokenizer.img_size)
    with disk_errors(folder):  # before anything long begins
        folder.mkdir(parents=True, exist_ok=True)
    count = min(args.count or images.count, images.count)
    features = args.features or ("judge" if args.data_root else "inception")
    required = bool(args.features or args.inception_weights)
    files = (features, args.inception_weights, args.lpips_weights)
    measures = make_measures(tokenizer.img_size, count, *files, distance_required=required)
    scores, shown, done = ReconstructionScores(tokenizer, measures), list["tuple[Tensor, Tensor]"](), 0
    pictured = set(evenly_spaced(count, PICTURE_IMAGES))
    with Progress(count, "image") as progress:
        for batch in images.batches(evenly_spaced(images.count, count), args.batch_size):
            copies = scores.add(batch.pixels)
            shown += [(batch.pixels[row], copies[row]) for row in range(len(copies)) if done + row in pictured]
            done += len(copies)
            progress.update(len(copies))
    report = scores.report()
    pairs = (torch.stack(pixels).permute(0, 2, 3, 1) for pixels in zip(*shown, strict=True))
    save_reconstructions(*pairs, folder / PICTURE)
    origin = {"tokenizer": config.source, "weights": str(weights), "source": images.source}
    write_text(folder / REPORT, json.dumps({**origin, **report, "notes": measures.notes}, indent=2) + "\n")
    print("\n".join([*report_lines(report), *(f"note: {note}" for note in measures.notes)]))
    print(f"wrote {folder / REPORT} and {folder / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
