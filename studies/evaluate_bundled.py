"""Measure the bundled model: `python -m studies.evaluate_bundled --data-root FOLDER`.

Everything that the model card states comes from here: how well the tokenizer reconstructs, whether the judge
(see studies/train_judge.py) knows the generated images as the class that was asked for, how far their distribution
is from the real one, how much they differ from one another, and that they are no copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.console import Progress, run_main, seed_number
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.images import as_images, image_grid, save_png, save_reconstructions, to_pil
from LightningDiT.metrics.formulas import frechet_distance, psnr, squared_error
from LightningDiT.metrics.judge import Judge
from LightningDiT.metrics.neighbours import distance_summary, search
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.vavae import VA_VAE
from studies.judged import (
    BATCH_SIZE,
    ImageSet,
    diversity,
    equal_labels,
    judge_of,
    judged,
    photographs,
    real_images,
    recognised,
    sample_images,
    some_of_each_class,
    without_border,
)
from studies.pages import CLASSES, Figures, add_study_options, write_json

COLUMNS = 10  # of the pictures


def reconstructed(tokenizer: VA_VAE, judge: Judge, originals: ImageSet) -> ImageSet:
    """Return the images after the tokenizer encoded (posterior's mode) and decoded them."""
    print("Reconstructing the test images", flush=True)
    progress, parts = Progress(len(originals), "image"), list[Tensor]()
    for batch in originals.pixels.split(BATCH_SIZE):
        latents = tokenizer.encode_images(as_images(batch), sample=False)
        parts.append(torch.from_numpy(tokenizer.decode_to_images(latents)))
        progress.update(len(batch))
    progress.close()
    return judged(judge, torch.cat(parts), originals.labels)


def reconstruction_figures(originals: ImageSet, copies: ImageSet) -> Figures:
    """Return the PSNR of the photograph and of the padded image, and the judge's accuracy."""
    padded = as_images(copies.pixels), as_images(originals.pixels)
    figures: Figures = {}
    for name, sides in (("28x28", [without_border(side) for side in padded]), ("32x32", padded)):
        errors = squared_error(*sides)  # (N,)
        figures |= {f"psnr_{name}_mean": float(psnr(errors).mean()), f"psnr_{name}_pooled": float(psnr(errors.mean()))}
    return figures | recognised(copies)


def number_of_each_class(images: ImageSet, number: int) -> Tensor:
    """Return the indices (10,) of image `number` of each class."""
    return torch.stack([(images.labels == label).nonzero().flatten()[number] for label in range(CLASSES)])


def save_grid(parts: Sequence[Tensor], path: Path, captions: list[str] | None = None, columns: int = COLUMNS) -> None:
    """Draw pixels (N, 32, 32, 3) uint8 of all parts as one grid."""
    save_png(image_grid(to_pil(torch.cat(list(parts)).numpy()), captions, columns), path)


def save_neighbours(made: ImageSet, train: ImageSet, distances: Tensor, nearest: Tensor, path: Path) -> None:
    """Draw two pairs of rows, a column a class: generated images above their nearest training images.

    The first pair shows the first image of each class, the second pair the image nearest to the training
    set, which is the likeliest copy.

    Args:
        distances, nearest: (N,) each generated image's distance to the training set, and its neighbour's index.
    """
    closest = distances.reshape(CLASSES, -1).argmin(1) + torch.arange(0, len(made), len(made) // CLASSES)
    rows, captions = list[Tensor](), list[str]()
    for chosen in (number_of_each_class(made, 0), closest):
        rows += [made.pixels[chosen], train.pixels[nearest[chosen]]]
        captions += [f"generated {name}" for name in FASHION_MNIST_CLASSES]
        captions += [f"nearest, {float(distance):.1f} away" for distance in distances[chosen]]
    save_grid(rows, path, captions)


def compare_with_training(made: ImageSet, train: ImageSet, test: ImageSet, output: Path) -> Figures:
    """Return the distances of generated and of real test images to the training set, and draw neighbours."""
    known = photographs(train)
    found = {name: search(photographs(images), known, name) for name, images in (("generated", made), ("test", test))}
    save_neighbours(made, train, found["generated"].distances, found["generated"].indices, output / "neighbours.png")
    return {name: distance_summary(neighbours.distances) for name, neighbours in found.items()}


def evaluate_generated(args: argparse.Namespace, judge: Judge, test: ImageSet, copies: ImageSet) -> Figures:
    """Generate images and compare them with the real ones."""
    pipe, output = LightningDiTPipeline.from_pretrained(args.model), Path(args.output)
    labels, each = equal_labels(args.count), args.count // CLASSES
    samples = sample_images(pipe, labels, args.seed)
    made, train = judged(judge, samples.images, labels), real_images(judge, args.data_root, train=True)
    shown = made.pixels.unflatten(0, (CLASSES, each))[:, :COLUMNS]  # (10, columns, 32, 32, 3)
    save_grid([*shown], output / "samples.png", columns=shown.shape[1])
    reference, held_out = (some_of_each_class(images, each, args.seed) for images in (train, test))
    sets = {"generated": made, "real_training_images": reference, "reconstructed_test_images": copies}
    return {
        "settings": {
            **asdict(replace(pipe.config.sample, labels="balanced")),
            "count": args.count,
            "seed": args.seed,
            "evaluations": samples.nfe,
            "precision": str(samples.dtype).removeprefix("torch."),
            "seconds": samples.seconds,
        },
        "generated": recognised(made),
        "frechet_distance_to_test_images": {
            name: frechet_distance(images.features, test.features) for name, images in sets.items()
        },
        "pairwise_distance_over_real": diversity(made, reference),
        "distance_to_training_set": compare_with_training(made, train, held_out, output),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.evaluate_bundled", description=__doc__)
    add_study_options(parser, count=2000, output="docs/bundled")
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    output, judge = Path(args.output), judge_of(args.model)
    test = real_images(judge, args.data_root, train=False)
    copies = reconstructed(VA_VAE(Path(args.model) / "tokenizer.yaml"), judge, test)
    shown = torch.cat([number_of_each_class(test, number) for number in range(2)])
    save_reconstructions(test.pixels[shown], copies.pixels[shown], output / "reconstructions.png", COLUMNS)
    report = {"real_test_images": recognised(test), "reconstruction": reconstruction_figures(test, copies)}
    report |= evaluate_generated(args, judge, test, copies)
    file = output / "evaluation.json"
    write_json(file, report | {"torch": torch.__version__})
    print(json.dumps(report, indent=1))
    print(f"wrote {file} and the pictures beside it")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
