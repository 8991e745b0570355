"""Judge generated images: `python -m LightningDiT.evaluate --samples A --reference B`.

A is a folder of images or an .npz file of ADM's layout; B is that too, or statistics of a reference set. Written are
metrics.json, metrics.png and, in `features`, what the network saw, so that a rerun is done at once and one that was
stopped goes on. docs/metrics.md says what each figure is, and what it can be compared with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from LightningDiT.console import Progress, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.options import natural, positive

if TYPE_CHECKING:
    from PIL import Image

    from LightningDiT.metrics.extractors import Extractor, Views
    from LightningDiT.metrics.scores import Score
    from LightningDiT.metrics.sources import ImageSource, Source

REPORT, FIGURE, FEATURES = "metrics.json", "metrics.png", "features"
SOURCES = "folder of images, .npz of ADM, or FOLDER:train / FOLDER:test of Fashion-MNIST"

Report = dict[str, Any]


@dataclass(frozen=True)
class Sides:
    """What is compared, and what the network sees in it.

    Attributes:
        samples, reference: what the command names.
        views, reference_views: of their images; None where the reference is statistics alone.
    """

    samples: ImageSource
    reference: Source
    views: Views
    reference_views: Views | None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.evaluate", description=__doc__)
    parser.add_argument("--samples", required=True, metavar="A", help=f"generated images: {SOURCES}")
    parser.add_argument("--reference", metavar="B", help=f"real images: {SOURCES}; or .npz with mu and sigma")
    parser.add_argument("--features", default="inception", help="inception, judge, timm:NAME or timm:NAME@FILE")
    parser.add_argument("--inception-weights", metavar="FILE", help="torch.hub's cache or a download where left out")
    parser.add_argument("--size", type=positive, help="reduce and crop every image to SIZE x SIZE pixels, as ADM does")
    parser.add_argument("--training", metavar="SET", help=f"look for copies of these: {SOURCES}")
    parser.add_argument("--resamples", type=natural, default=100, help="of the bootstrap; 0 is none; default 100")
    parser.add_argument("--seed", type=natural, default=0, help="of the bootstrap")
    parser.add_argument("--batch-size", type=positive, default=50, help="images that the network sees at once")
    parser.add_argument("--npz", metavar="FILE", help="also write the samples for ADM's own evaluator")
    parser.add_argument("--output", default="output/evaluation", help="folder of the results")
    args = parser.parse_args(argv)
    if not args.reference and not args.npz:
        parser.error("--reference is missing; without it only --npz has something to do")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.metrics.sources import open_images, open_source

    samples = open_images(args.samples, args.size)
    if args.npz:
        write_for_adm(samples, Path(args.npz))
    if not args.reference:
        return 0
    reference = open_source(args.reference, args.size)
    training = open_images(args.training, args.size) if args.training else None
    extractor, sides = see(args, samples, reference)
    report, scores, picture = evaluate(args, extractor, sides, training)
    print("\n".join(table(report)), flush=True)
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    write(Path(args.output), report, scores, picture)
    return 0


def see(args: argparse.Namespace, samples: ImageSource, reference: Source) -> tuple[Extractor, Sides]:
    """Return the network and what it sees on both sides."""
    from LightningDiT.files import disk_errors
    from LightningDiT.metrics.cache import views_of
    from LightningDiT.metrics.extractors import make_extractor, require_fidelity

    require_fidelity()
    for source in (samples, reference.images):
        if source is not None and source.count < 2:
            raise LightningDiTError(f"{source.name} has one image; a distance needs two at least", "name a larger set")
    folder = Path(args.output) / FEATURES
    with disk_errors(folder):  # before the network has looked at anything
        folder.mkdir(parents=True, exist_ok=True)
    extractor = make_extractor(args.features, args.inception_weights)
    views = views_of(samples, extractor, folder, "generated", args.batch_size)
    check_statistics(args.reference, reference, views)
    real = reference.images and views_of(reference.images, extractor, folder, "reference", args.batch_size)
    return extractor, Sides(samples, reference, views, real)


def check_statistics(name: str, reference: Source, views: Views) -> None:
    """Make sure that statistics are those of features of this width.

    Raises:
        LightningDiTError: they are of another network.
    """
    for view, (mean, covariance) in reference.moments.items():
        width = views[view].shape[1] if view in views else mean.numel()
        if mean.shape != (width,) or covariance.shape != (width, width):
            raise LightningDiTError(
                f"{name} has statistics of {mean.numel()} {view}, the network has {width}",
                "name statistics of the same network; those of ADM and EDM go with --features inception",
            )
        if not (mean.isfinite().all() and covariance.isfinite().all() and (covariance.diagonal() >= 0).all()):
            raise LightningDiTError(
                f"{name} has statistics of {view} that are no numbers, or variances below 0", "fetch or make it again"
            )
    if "features" not in reference.moments and reference.images is None:
        raise LightningDiTError(f"{name} has no mean and covariance of features", "name a file with mu and sigma")


def evaluate(
    args: argparse.Namespace, extractor: Extractor, sides: Sides, training: ImageSource | None
) -> tuple[Report, Mapping[str, Score], Image.Image | None]:
    """Return the report, the scores in it, and the picture of neighbours where a training set is given."""
    import torch

    from LightningDiT.metrics.cache import digest, views_of
    from LightningDiT.metrics.neighbours import memorisation, neighbour_picture
    from LightningDiT.metrics.scores import NEIGHBOURHOOD, SPLITS, Bootstrap, Comparison, scores_of

    folder = Path(args.output) / FEATURES
    real = sides.reference.images
    sums = [float(covariance.trace()) for _, covariance in sides.reference.moments.values()]
    key = digest(sides.samples.key, real.key if real else "", sums, extractor.key)
    comparison = Comparison(extractor.name, sides.views, sides.reference_views, sides.reference.moments, key)
    scores = scores_of(comparison, Bootstrap(args.resamples, args.seed, folder))
    report: Report = {
        "samples": {"from": args.samples, "count": sides.samples.count},
        "reference": {"from": args.reference, "count": real.count if real else None},
        "features": {
            "network": extractor.name,
            "layer": extractor.layer,
            "dimensions": sides.views["features"].shape[1],
        },
        "settings": {
            "resamples": args.resamples,
            "seed": args.seed,
            "neighbourhood": NEIGHBOURHOOD,
            "splits": SPLITS,
            "size": args.size,
            "torch": torch.__version__,
        },
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "warnings": warnings_of(sides, scores),
        **classes_of(extractor, sides),
    }
    if training is None:
        return report, scores, None
    known = views_of(training, extractor, folder, "training", args.batch_size)
    report["training"] = {"from": args.training, "count": training.count}
    report["memorisation"], found = memorisation(
        sides.views, known, sides.reference_views, folder / f"neighbours-{digest(key, training.key)}"
    )
    return report, scores, neighbour_picture(sides.samples, training, found)


def classes_of(extractor: Extractor, sides: Sides) -> Report:
    """Return accuracy and the table by class, as far as the classes of the generated images are known."""
    from LightningDiT.metrics.by_class import class_table, overall_accuracy

    labels = sides.samples.labels
    if labels is None:
        return {"classes": []}
    real = sides.reference.images
    known = real.labels if real else None
    names = sides.samples.class_names or (real.class_names if real else ())
    accuracy = {"accuracy": overall_accuracy(sides.views, labels, extractor)}
    if sides.reference_views is not None and known is not None:
        accuracy["accuracy_real"] = overall_accuracy(sides.reference_views, known, extractor)
    rows = class_table(sides.views, labels, sides.reference_views, known, extractor, names)
    return {**{name: value for name, value in accuracy.items() if value}, "classes": rows}


def warnings_of(sides: Sides, scores: Mapping[str, Score]) -> list[str]:
    """Return what speaks against comparing the scores with published ones."""
    from LightningDiT.metrics.scores import FEW

    lines = []
    counts = {"generated": sides.samples.count}
    if sides.reference.images and "features" not in sides.reference.moments:
        counts["reference"] = sides.reference.images.count
    width = sides.views["features"].shape[1]
    for title, count in counts.items():
        if count < FEW:
            bias = next(iter(scores.values())).bias if title == "generated" else None  # of the Frechet distance
            about = f" (by about {bias:.3g} here)" if bias else ""
            rank = f"; with fewer than {width + 1} the covariance has no full rank" if count <= width else ""
            lines.append(
                f"{count} {title} images: below {FEW} a Frechet distance is too large{about} and compares with those"
                f" of equal counts alone{rank}"
            )
    real = sides.reference.images
    if sides.reference_views is not None and real is not None:
        sizes = [source.read(0, 1).shape[2:] for source in (sides.samples, real)]
        if sizes[0] != sizes[1]:
            first, second = (f"{width}x{height}" for height, width in sizes)
            lines.append(f"generated images have {first} pixels, the reference's {second}: scaling moves every score")
    return lines


def table(report: Report) -> list[str]:
    """Return the report as lines for the screen."""
    from LightningDiT.metrics.scores import LEVEL, TITLES

    features, real = report["features"], report["reference"]["count"]
    lines = [
        f"{report['samples']['count']} generated images against {real if real else 'statistics of'} real ones;"
        f" {features['network']}, {features['layer']}, {features['dimensions']} dimensions",
        f"{'':<36}{'value':>10}{'bias':>10}  {LEVEL:.0%} interval",
    ]
    named = [(TITLES[name], score) for name, score in report["scores"].items()]
    named += [(name.replace("_", " "), report[name]) for name in ("accuracy", "accuracy_real") if name in report]
    for title, score in named:
        interval = f"{score['low']:.4g} to {score['high']:.4g}" if score["low"] is not None else ""
        lines.append(f"{title:<36}{score['value']:>10.4g}{_cell(score.get('bias')):>10}  {interval}".rstrip())
    if report["classes"]:
        lines.append(f"{'class':<24}{'images':>8}{'accuracy':>10}{'real':>10}{'Frechet':>10}")
    for row in report["classes"]:
        cells = [_cell(row.get(name)) for name in ("accuracy", "accuracy_real", "frechet_distance")]
        lines.append(f"{row['name']:<24}{row['count']:>8}" + "".join(f"{cell:>10}" for cell in cells))
    for space, figures in report.get("memorisation", {}).items():
        for title in ("generated", "reference"):
            if title in figures:
                shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures[title].items())
                lines.append(f"{title} to the training set, {space}: {shown}")
        if "nearer_than_real" in figures:
            lines.append(f"nearer than all but 1 % of the real ones, {space}: {figures['nearer_than_real']:.2%}")
    return lines


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write(output: Path, report: Report, scores: Mapping[str, Score], picture: Image.Image | None) -> None:
    """Write the report and the figure, each whole or not at all, and say where."""
    from LightningDiT.files import atomic_path
    from LightningDiT.metrics.figure import save_figure

    with atomic_path(output / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = f"{report['samples']['count']} images of {report['samples']['from']} against {report['reference']['from']}"
    if save_figure(output / FIGURE, title, scores, report["classes"], picture):
        print(f"wrote {output / REPORT} and {output / FIGURE}")
    else:
        print(f"wrote {output / REPORT}; no picture, matplotlib is missing: pip install matplotlib")


def write_for_adm(samples: ImageSource, target: Path) -> None:
    """Write `samples`, cropped to `--size`, in the layout that ADM's evaluator.py reads.

    Raises:
        LightningDiTError: they are not square and of one size, or `target` is a folder or what they come from.
    """
    from LightningDiT.data.npz import write_npz

    if target.is_dir():
        raise LightningDiTError(f"--npz: {target} is a folder, a file was expected", "name a file that ends in .npz")
    if target.resolve() == Path(samples.name).resolve():
        raise LightningDiTError(f"--npz: {target} holds the samples themselves", "name another file")
    side = samples.read(0, 1).shape[3]

    def pixels_of(number: int, side: int) -> bytes:
        image = samples.read(number, number + 1)[0].permute(1, 2, 0)  # (H, W, 3)
        if image.shape != (side, side, 3):
            raise LightningDiTError(
                f"--npz: image {number} of {samples.name} has {image.shape[1]}x{image.shape[0]} pixels,"
                f" {side}x{side} expected",
                "give --size N, which crops every image to N x N",
            )
        return image.numpy().tobytes()

    labels = None if samples.labels is None else samples.labels.tolist()
    progress = Progress(samples.count, "image")
    try:
        write_npz(range(samples.count), labels, side, target, progress.update, pixels_of)
    finally:
        progress.close()
    print(f"wrote {target} for guided-diffusion's evaluator.py")


if __name__ == "__main__":
    sys.exit(run_main(main))
