"""The evaluation of generated images: the report, its warnings, its lines on the screen and its files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from LightningDiT.console import Progress
from LightningDiT.data.image_sets import LISTED, Classes, ImageSet
from LightningDiT.data.labels import CLASS_NAMES, balance_of, match
from LightningDiT.data.npz import check_npz_target, write_npz
from LightningDiT.errors import LightningDiTError, import_package
from LightningDiT.files import disk_errors, holding, json_with, require_replaceable, write_text
from LightningDiT.metrics.by_class import Labelled, accuracy, class_table
from LightningDiT.metrics.cache import cached_activations, digest
from LightningDiT.metrics.extractors import Activations, Extractor, make_extractor
from LightningDiT.metrics.figure import MARK, save_figure
from LightningDiT.metrics.neighbours import memorisation, neighbour_picture
from LightningDiT.metrics.scores import (
    FEW,
    FIDELITY_PIN,
    LEVEL,
    NEIGHBOURHOOD,
    SPLITS,
    TITLES,
    Bootstrap,
    Comparison,
    Score,
    scores_of,
)
from LightningDiT.metrics.sources import Source, open_images, open_source

REPORT, FIGURE, CACHE = "metrics.json", "metrics.png", "features"  # in the folder of the results

Report = dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation compares, and how."""

    samples: str  # see `open_source`
    reference: str
    training: str | None  # set in which copies are searched
    features: str  # see `make_extractor`
    inception_weights: str | None
    size: int | None  # side to which all images are cropped
    resamples: int  # of the bootstrap
    seed: int  # of the bootstrap
    batch_size: int
    output: Path  # folder of the results


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        report: plain values.
        scores: those of the report, for the figure.
        picture: neighbours in the training set; None: there is none.
    """

    report: Report
    scores: Mapping[str, Score]
    picture: Image.Image | None

    def lines(self) -> list[str]:
        """Return the report as lines for the screen, without its warnings."""
        report, memory = self.report, self.report.get("memorisation", {})
        features, real = report["features"], report["reference"]["count"]
        lines = [
            f"{report['samples']['count']} generated images against {real if real else 'statistics of'} real ones;"
            f" {features['network']}, {features['layer']}, {features['dimensions']} dimensions",
            f"labels of the generated images: {report['samples']['labels']}",
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
        for space, title in ((space, title) for space in memory for title in ("generated", "reference")):
            if title in memory[space]:
                shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in memory[space][title].items()]
                lines.append(f"{title} to the training set, {space}: {', '.join(shown)}")
        for space, distances in memory.items():
            if "nearer_than_real" in distances:
                lines.append(f"nearer than 99 % of the real images, {space}: {distances['nearer_than_real']:.2%}")
        return lines

    def save(self, folder: Path) -> str:
        """Write report and figure into `folder`, and return a line that names them."""
        report = self.report
        check_results(folder)  # again, since hours may have passed
        write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
        count, samples, reference = report["samples"]["count"], report["samples"]["from"], report["reference"]["from"]
        title = f"{count} images of {samples} against {reference}\nlabels: {report['samples']['labels']}"
        if save_figure(folder / FIGURE, title, self.scores, report["classes"], self.picture):
            return f"wrote {folder / REPORT} and {folder / FIGURE}"
        return f"wrote {folder / REPORT}; no picture, matplotlib is missing: pip install matplotlib"


def check_results(folder: Path) -> None:
    """Raise LightningDiTError if report or figure would replace a file that no evaluation wrote.

    Figures of earlier releases have no mark, and are known by the report beside them.
    """
    is_report, is_figure = json_with("samples", "reference", "features", "scores"), holding(MARK)
    require_replaceable(folder / REPORT, ours=is_report)
    require_replaceable(folder / FIGURE, ours=lambda path: is_figure(path) or is_report(folder / REPORT))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def evaluate(settings: EvaluationSettings) -> Evaluation:
    """Return the evaluation of generated images.

    Raises:
        LightningDiTError: images, statistics or the network cannot be had, or do not fit one another.
    """
    check_results(settings.output)
    import_package("torch_fidelity", "FID, Inception Score, precision and recall", FIDELITY_PIN)
    samples, reference = open_images(settings.samples, settings.size), open_source(settings.reference, settings.size)
    training = open_images(settings.training, settings.size) if settings.training else None
    balance = "not known" if samples.labels is None else balance_of(samples.labels.tolist(), samples.class_names)
    samples, reference, notes = with_common_classes(samples, reference)
    for images in (samples, reference.images):
        if images is not None and images.count < 2:
            raise LightningDiTError(f"{images.source} has one image; a distance needs two", "name a larger set")
    folder = settings.output / CACHE
    with disk_errors(folder):  # before anything long begins
        folder.mkdir(parents=True, exist_ok=True)
    extractor = make_extractor(settings.features, settings.inception_weights)
    activate = partial(cached_activations, extractor=extractor, folder=folder, batch_size=settings.batch_size)
    made = activate(samples, title="generated")
    check_statistics(settings.reference, reference, made)
    real = reference.images and activate(reference.images, title="reference")
    sums = [float(covariance.trace()) for _, covariance in reference.moments.values()]
    key = digest(samples.state, reference.images.state if reference.images else "", sums, extractor.key)
    comparison = Comparison(extractor.name, made, real, reference.moments, key)
    scores = scores_of(comparison, Bootstrap(settings.resamples, settings.seed, folder))
    shares, reasons = accuracies(samples, made, reference.images, real, extractor)
    report: Report = {
        "samples": {"from": settings.samples, "count": samples.count, "labels": balance},
        "reference": {"from": settings.reference, "count": reference.images.count if reference.images else None},
        "features": {"network": extractor.name, "layer": extractor.layer, "dimensions": made["features"].shape[1]},
        "settings": {
            **{name: getattr(settings, name) for name in ("resamples", "seed", "size")},
            **{"neighbourhood": NEIGHBOURHOOD, "splits": SPLITS, "torch": torch.__version__},
        },
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "warnings": [
            *bias_warnings(samples, reference, made, scores),
            *size_warnings(samples, reference.images),
            *notes,
            *reasons,
        ],
        CLASS_NAMES: samples.class_names,
        **shares,
    }
    if training is None:
        return Evaluation(report, scores, None)
    known = activate(training, title="training")
    report["training"] = {"from": settings.training, "count": training.count}
    folder /= f"neighbours-{digest(key, training.state)}"
    report["memorisation"], found = memorisation(made, known, real, folder)
    return Evaluation(report, scores, neighbour_picture(samples, training, found))


def check_statistics(name: str, reference: Source, activations: Activations) -> None:
    """Check that the statistics of a reference belong to these activations.

    Raises:
        LightningDiTError: they are missing, impossible, or those of another network.
    """
    for kind, (mean, covariance) in reference.moments.items():
        width = activations[kind].shape[1] if kind in activations else mean.numel()
        if mean.shape != (width,) or covariance.shape != (width, width):
            raise LightningDiTError(
                f"{name} has statistics of {mean.numel()} {kind}, the network has {width}",
                "name statistics of the same network; those of ADM and EDM go with --features inception",
            )
        if not (mean.isfinite().all() and covariance.isfinite().all() and (covariance.diagonal() >= 0).all()):
            raise LightningDiTError(
                f"{name} has statistics of {kind} that are not finite, or variances below 0", "fetch or make it again"
            )
    if "features" not in reference.moments and reference.images is None:
        raise LightningDiTError(f"{name} has no mean and covariance of features", "name a file with mu and sigma")


def with_common_classes(samples: ImageSet, reference: Source) -> tuple[ImageSet, Source, list[str]]:
    """Return both sides with one numbering of their classes, see `match`, and lines about it.

    Raises:
        LightningDiTError: see `match`.
    """
    real = reference.images
    notes = [f"{one.source}: {note}" for one in (samples, real) if one is not None for note in one.notes]
    if samples.labels is None or real is None or real.labels is None:
        return samples, reference, notes
    found = match(samples.class_names, real.class_names, samples.source, real.source)
    ours, theirs = (
        labels if numbers is None else torch.tensor(numbers)[labels]
        for labels, numbers in ((samples.labels, found.ours), (real.labels, found.theirs))
    )
    notes += [found.note] if found.note else []
    if lacking := sorted(set(ours.tolist()) - set(theirs.tolist())):
        names = ", ".join(found.names[label] if found.names else str(label) for label in lacking[:LISTED])
        notes.append(f"{real.source} has no images of {len(lacking)} classes of {samples.source}: {names}")
    common = replace(reference, images=real.numbered(Classes(theirs, found.names)))
    return samples.numbered(Classes(ours, found.names)), common, notes


def network_outputs(images: ImageSet, extractor: Extractor) -> tuple[Tensor | None, list[str]]:
    """Return the network's output for each class of `images`, see `accuracy`, and lines about it.

    A network without an output for some class gives no accuracy over all images; a line says so.
    """
    assert images.labels is not None
    try:
        found = match(extractor.classes, images.class_names, extractor.name, images.source)
    except LightningDiTError as error:
        return torch.full((int(images.labels.max()) + 1,), -1), [f"no accuracy: {error.message}"]
    notes = [found.note] if found.note and extractor.classes is None else []
    numbers: Sequence[int] = range(int(images.labels.max()) + 1) if found.theirs is None else found.theirs
    if found.ours is not None:  # class numbers meet outputs whose names are numbers
        by_number = {number: output for output, number in enumerate(found.ours)}
        numbers = [by_number.get(number, len(found.ours)) for number in numbers]
    width = len(extractor.classes) if extractor.classes else None
    outputs = torch.tensor([-1 if width is not None and number >= width else number for number in numbers])
    missing = [label for label in images.labels.unique().tolist() if int(outputs[label]) < 0]
    if missing:
        names = ", ".join(images.class_names[label] if images.class_names else str(label) for label in missing[:LISTED])
        notes.append(f"no accuracy over all images: {extractor.name} does not know {len(missing)} classes: {names}")
    return outputs, notes


def accuracies(
    samples: ImageSet, made: Activations, references: ImageSet | None, real: Activations | None, extractor: Extractor
) -> tuple[Report, list[str]]:
    """Return accuracies and the table by class, as far as the classes of the images are known, and lines about them."""
    if samples.labels is None:
        return {"classes": []}, []
    generated: Labelled = (made, samples.labels)
    known = (real, references.labels) if references and real and references.labels is not None else None
    names: Sequence[str] = samples.class_names or (references and references.class_names) or ()
    outputs, notes = network_outputs(samples, extractor) if extractor.numbered and "logits" in made else (None, [])
    judged = known and _of_classes(known, outputs)
    found = {
        "accuracy": accuracy(generated, extractor, outputs),
        "accuracy_real": judged and accuracy(judged, extractor, outputs),
    }
    if (
        extractor.numbered
        and "logits" in made
        and not found["accuracy"]
        and not any("no acc" in note for note in notes)
    ):
        width, label = made["logits"].shape[1], int(samples.labels.max())
        largest = names[label] if label < len(names) else label
        notes.append(
            f"no accuracy: {samples.source} has the class {largest}, {extractor.name} {width} outputs, 0 to {width - 1}"
        )
    shares = {
        name: {"value": score.value, "low": score.low, "high": score.high} for name, score in found.items() if score
    }
    return {**shares, "classes": class_table(generated, known, extractor, names, outputs)}, notes


def _of_classes(labelled: Labelled, outputs: Tensor | None) -> Labelled | None:
    """Return the images whose classes have an output; None if there are none."""
    activations, labels = labelled
    if outputs is None:
        return labelled
    known = (labels < len(outputs)) & (outputs[labels.clamp(max=len(outputs) - 1)] >= 0)
    chosen = torch.nonzero(known).flatten()
    return ({kind: rows[chosen] for kind, rows in activations.items()}, labels[chosen]) if len(chosen) else None


def bias_warnings(
    samples: ImageSet, reference: Source, activations: Activations, scores: Mapping[str, Score]
) -> list[str]:
    """Return a warning for each set that is too small for a comparison with published distances."""
    counts = {"generated": samples.count}
    if reference.images and "features" not in reference.moments:
        counts["reference"] = reference.images.count
    width, lines = activations["features"].shape[1], []
    for title, count in counts.items():
        if count < FEW:
            bias = next(iter(scores.values())).bias if title == "generated" else None  # of the Frechet distance
            about = f" (by about {bias:.3g} here)" if bias else ""
            rank = f"; with fewer than {width + 1} the covariance does not have full rank" if count <= width else ""
            lines.append(
                f"{count} {title} images: below {FEW} a Frechet distance is too large{about} and compares only with"
                f" those of equal counts{rank}"
            )
    return lines


def size_warnings(samples: ImageSet, references: ImageSet | None) -> list[str]:
    """Return a warning if the images of two sets differ in size."""
    if references is None:
        return []
    (height, width), (other_height, other_width) = (
        images.batch([0]).pixels.shape[2:] for images in (samples, references)
    )
    if (height, width) == (other_height, other_width):
        return []
    return [
        f"generated images have {width}x{height} pixels, the reference's {other_width}x{other_height}:"
        " scaling changes every score"
    ]


def write_for_adm(images: ImageSet, target: Path) -> None:
    """Write images in the layout that ADM's evaluator.py reads.

    Raises:
        LightningDiTError: they are not square and of one size, or `target` is a folder or their own file.
    """
    if target.is_dir():
        raise LightningDiTError(f"--npz: {target} is a folder, a file was expected", "name a file that ends in .npz")
    if target.resolve() == Path(images.source).resolve():
        raise LightningDiTError(f"--npz: {target} holds the samples themselves", "name another file")
    check_npz_target(target)
    side = images.batch([0]).pixels.shape[3]
    with Progress(images.count, "image") as progress:
        write_npz(images, side, target, progress.update, "give --size N, which crops every image to N x N")
    print(f"wrote {target} for guided-diffusion's evaluator.py")
