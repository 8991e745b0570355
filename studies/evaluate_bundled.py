"""Measure the bundled model: `python -m studies.evaluate_bundled --data-root FOLDER`.

Everything that the model card states comes from here: how well the tokenizer reconstructs, whether the judge
(see studies/judge.py) knows the generated images as the class that was asked for, how far their distribution
is from the real one, how much they differ from one another, and that they are no copies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.config import with_points
from LightningDiT.console import Progress, run_main
from LightningDiT.data.images import FASHION_MNIST_CLASSES, fashion_mnist, pad_to_32
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path
from LightningDiT.images import image_grid, save_png, to_pil, to_uint8
from LightningDiT.metrics.formulas import (
    class_accuracy,
    frechet_distance,
    mean_pairwise_distance,
    mean_psnr,
    pooled_psnr,
)
from LightningDiT.metrics.judge import BORDER, Judge, judge_images, load_judge
from LightningDiT.metrics.neighbours import distance_summary, search
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.vavae import VA_VAE

CLASSES = len(FASHION_MNIST_CLASSES)
BATCH_SIZE = 100
GRID_COLUMNS = 10
JUDGE_NAME = "judge.safetensors"

Report = dict[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Images, their classes, and what the judge makes of them.

    Attributes:
        pixels: (N, 32, 32, 3) uint8, what a reader of the picture files sees.
        labels: (N,) int64, real or asked for.
        features: (N, F), the judge's penultimate layer.
        seen: (N,) int64, the class that the judge sees.
    """

    pixels: Tensor
    labels: Tensor
    features: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> ImageSet:
        return ImageSet(self.pixels[chosen], self.labels[chosen], self.features[chosen], self.seen[chosen])


def as_images(pixels: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] of pixels (N, H, W, 3) uint8."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def without_border(images: Tensor) -> Tensor:
    """Return the photograph (..., 28, 28) inside padded images (..., 32, 32)."""
    return images[..., BORDER:-BORDER, BORDER:-BORDER]


def photographs(images: ImageSet) -> Tensor:
    """Return the grey photographs (N, 28, 28) in [-1, 1] in which distances are measured."""
    batches = images.pixels.split(10 * BATCH_SIZE)  # the training set as floats at once would take 0.7 GB
    return torch.cat([without_border(as_images(batch).mean(1)) for batch in batches])


def judged(judge: Judge, pixels: Tensor, labels: Tensor) -> ImageSet:
    """Return pixels (N, 32, 32, 3) uint8 and labels (N,) together with the judge's view of them."""
    views = [judge_images(judge, as_images(batch)) for batch in pixels.split(10 * BATCH_SIZE)]
    features, seen = (torch.cat(parts) for parts in zip(*views, strict=True))
    return ImageSet(pixels, labels, features, seen)


def real_images(judge: Judge, root: str, train: bool) -> ImageSet:
    """Return the real training or test photographs, padded to 32x32."""
    images, labels = fashion_mnist(root, train)
    pixels = torch.cat([to_uint8(pad_to_32(batch)) for batch in images.split(10 * BATCH_SIZE)])
    return judged(judge, pixels, labels)


def reconstructed(tokenizer: VA_VAE, judge: Judge, originals: ImageSet) -> ImageSet:
    """Return the images after the tokenizer encoded (posterior's mode) and decoded them."""
    print("Reconstructing the test images", flush=True)
    progress = Progress(len(originals), "image")
    parts: list[Tensor] = []
    for batch in originals.pixels.split(BATCH_SIZE):
        latents = tokenizer.encode_images(as_images(batch), sample=False)
        parts.append(torch.from_numpy(tokenizer.decode_to_images(latents)))
        progress.update(len(batch))
    progress.close()
    return judged(judge, torch.cat(parts), originals.labels)


def generated(pipeline: LightningDiTPipeline, judge: Judge, args: argparse.Namespace) -> tuple[ImageSet, Report]:
    """Return `args.count` generated images, ordered by class, and the settings they were made with."""
    labels = torch.arange(CLASSES).repeat_interleave(args.count // CLASSES)
    batches = torch.arange(len(labels)).split(BATCH_SIZE)
    sample = pipeline.config.sample
    if args.steps:
        sample = with_points(sample, args.steps)
    steps = pipeline.procedure(sample).steps
    print(f"Generating {len(labels)} images", flush=True)
    progress = Progress(len(batches) * steps, "step")
    parts: list[np.ndarray] = []
    seconds = 0.0
    for indices in batches:
        output = pipeline(
            labels[indices].tolist(),
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.steps,
            seed=args.seed,
            indices=indices.tolist(),
            output_type="np",
            batch_size=BATCH_SIZE,
            callback=lambda step, t, state: progress.update(),
        )
        parts.append(output.images)
        seconds += output.seconds
    progress.close()
    settings = {
        "count": len(labels),
        "seed": args.seed,
        "mode": sample.mode,
        "solver": sample.sampling_method if sample.mode == "ODE" else "Euler-Maruyama",
        "grid_points": steps + 1,
        "evaluations": output.nfe,
        "guidance_scale": sample.cfg_scale if args.guidance_scale is None else args.guidance_scale,
        "guided_channels": sample.guided_channels,
        "guidance_interval": [sample.cfg_interval_start, sample.cfg_interval_end],
        "timestep_shift": sample.timestep_shift,
        "precision": str(output.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
    return judged(judge, torch.from_numpy(np.concatenate(parts)), labels), settings


def some_of_each_class(images: ImageSet, each: int, seed: int) -> ImageSet:
    """Return `each` images of every class, drawn by `seed`, ordered by class."""
    order = torch.randperm(len(images), generator=generator_for(seed))
    labels = images.labels[order]
    return images[torch.cat([order[labels == label][:each] for label in range(CLASSES)])]


def recognised(images: ImageSet) -> Report:
    """Return the share of images that the judge sees as their class, overall and by class."""
    overall, shares = class_accuracy(images.seen, images.labels, CLASSES)
    return {"accuracy": overall, "by_class": dict(zip(FASHION_MNIST_CLASSES, shares, strict=True))}


def reconstruction_figures(originals: ImageSet, copies: ImageSet) -> Report:
    """Return PSNR on the photograph and on the padded image, and the judge's accuracy."""
    real, copy = as_images(originals.pixels), as_images(copies.pixels)
    inner_real, inner_copy = without_border(real), without_border(copy)
    return {
        "psnr_28x28_mean": mean_psnr(inner_copy, inner_real),
        "psnr_28x28_pooled": pooled_psnr(inner_copy, inner_real),
        "psnr_32x32_mean": mean_psnr(copy, real),
        "psnr_32x32_pooled": pooled_psnr(copy, real),
        **recognised(copies),
    }


def diversity_figures(made: ImageSet, real: ImageSet) -> Report:
    """Return the mean pairwise distance within each class of `made` over that of `real`, and the mean ratio."""
    pictures = [(photographs(images), images.labels) for images in (made, real)]
    ratios = {}
    for label, name in enumerate(FASHION_MNIST_CLASSES):
        ours, theirs = (mean_pairwise_distance(points[labels == label]) for points, labels in pictures)
        ratios[name] = ours / theirs
    return {"mean": sum(ratios.values()) / CLASSES, "by_class": ratios}


def neighbour_figures(made: ImageSet, train: ImageSet, test: ImageSet, output: Path) -> Report:
    """Compare the distances of generated and of real test images to the training set, and draw neighbours."""
    known = photographs(train)
    sets = {"generated": made, "test": test}
    found = {title: search(photographs(images), known, title) for title, images in sets.items()}
    nearest = found["generated"]
    save_neighbours(made, train, nearest.distances, nearest.indices, output / "neighbours.png")
    return {title: distance_summary(neighbours.distances) for title, neighbours in found.items()}


def save_neighbours(made: ImageSet, train: ImageSet, distances: Tensor, indices: Tensor, path: Path) -> None:
    """Draw two pairs of rows, a column a class: generated images above their nearest training images.

    The first pair shows the first image of each class, the second pair the image nearest to the training
    set, which is the likeliest copy.
    """
    members = [torch.nonzero(made.labels == label).flatten() for label in range(CLASSES)]
    first = torch.stack([numbers[0] for numbers in members])
    nearest = torch.stack([numbers[distances[numbers].argmin()] for numbers in members])
    rows, captions = [], []
    for chosen in (first, nearest):
        rows += [made.pixels[chosen], train.pixels[indices[chosen]]]
        captions += [f"generated {FASHION_MNIST_CLASSES[label]}" for label in range(CLASSES)]
        captions += [f"nearest, {float(distance):.1f} away" for distance in distances[chosen]]
    save_grid(torch.cat(rows), path, captions)


def save_reconstructions(originals: ImageSet, copies: ImageSet, path: Path) -> None:
    """Draw the first two test images of each class, originals above reconstructions."""
    members = [torch.nonzero(originals.labels == label).flatten() for label in range(CLASSES)]
    rows = []
    for place in range(2):
        chosen = torch.stack([numbers[place] for numbers in members])
        rows += [originals.pixels[chosen], copies.pixels[chosen]]
    save_grid(torch.cat(rows), path)


def save_samples(made: ImageSet, path: Path) -> None:
    """Draw the first ten generated images of every class, a class a row."""
    chosen = torch.cat([torch.nonzero(made.labels == label).flatten()[:GRID_COLUMNS] for label in range(CLASSES)])
    save_grid(made.pixels[chosen], path, columns=len(chosen) // CLASSES)


def save_grid(pixels: Tensor, path: Path, captions: list[str] | None = None, columns: int = GRID_COLUMNS) -> None:
    """Write pixels (N, 32, 32, 3) uint8 as a grid."""
    save_png(image_grid(to_pil(pixels.numpy()), captions, columns), path)


def evaluate_reconstructions(args: argparse.Namespace, output: Path) -> tuple[Report, Judge, ImageSet, ImageSet]:
    """Judge the real test images and their reconstructions."""
    judge = load_judge(Path(args.model) / JUDGE_NAME)
    test = real_images(judge, args.data_root, train=False)
    copies = reconstructed(VA_VAE(Path(args.model) / "tokenizer.yaml"), judge, test)
    save_reconstructions(test, copies, output / "reconstructions.png")
    report = {"real_test_images": recognised(test), "reconstruction": reconstruction_figures(test, copies)}
    return report, judge, test, copies


def evaluate_generated(
    args: argparse.Namespace, output: Path, judge: Judge, test: ImageSet, copies: ImageSet
) -> Report:
    """Generate images and compare them with the real ones."""
    made, settings = generated(LightningDiTPipeline.from_pretrained(args.model), judge, args)
    save_samples(made, output / "samples.png")
    train = real_images(judge, args.data_root, train=True)
    each = args.count // CLASSES
    reference = some_of_each_class(train, each, args.seed)
    sets = {"generated": made, "real_training_images": reference, "reconstructed_test_images": copies}
    return {
        "settings": settings,
        "generated": recognised(made),
        "frechet_distance_to_test_images": {
            name: frechet_distance(images.features, test.features) for name, images in sets.items()
        },
        "pairwise_distance_over_real": diversity_figures(made, reference),
        "distance_to_training_set": neighbour_figures(made, train, some_of_each_class(test, each, args.seed), output),
    }


def table(report: Report, title: str = "", depth: int = 0) -> list[str]:
    """Return the report as indented lines, a figure a line."""
    lines = [f"{'  ' * (depth - 1)}{title.replace('_', ' ')}"] if title else []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += table(value, name, depth + 1)
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{'  ' * depth}{name.replace('_', ' '):<{34 - 2 * depth}}{shown}")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.evaluate_bundled", description=__doc__)
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--model", default="models/fashion-mnist", help="folder of model, tokenizer and judge")
    parser.add_argument("--count", type=int, default=2000, help="generated images, the same number a class")
    parser.add_argument("--guidance-scale", type=float, help="the configuration's where left out")
    parser.add_argument("--steps", type=int, help="points of the time grid; the configuration's where left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="docs/bundled", help="folder for evaluation.json and the pictures")
    parser.add_argument("--reconstructions-only", action="store_true", help="leave the generated images out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    if args.count < 2 * CLASSES or args.count % CLASSES:
        raise LightningDiTError(
            f"--count is {args.count}; a multiple of {CLASSES} from {2 * CLASSES} on is expected (classes are"
            " compared with equal numbers)",
            "give --count 2000",
        )
    output = Path(args.output)
    report, judge, test, copies = evaluate_reconstructions(args, output)
    if not args.reconstructions_only:
        report |= evaluate_generated(args, output, judge, test, copies)
    report["torch"] = torch.__version__
    name = "reconstructions.json" if args.reconstructions_only else "evaluation.json"
    with atomic_path(output / name) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(report)))
    print(f"wrote {output / name} and the pictures beside it")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
