"""The evaluation of a tokenizer: how well it reconstructs images, and how its latents are distributed.

Pixels have 8 bits, as in an image file; levels of spectrograms are compared in one channel, as they are. Latents are
the posterior's mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from LightningDiT.console import Progress
from LightningDiT.data.image_sets import ImageSet, evenly_spaced
from LightningDiT.errors import LightningDiTError, import_package
from LightningDiT.files import disk_errors, json_with, require_replaceable, write_text
from LightningDiT.images import levels_of, save_reconstructions, to_float, to_uint8, with_channels
from LightningDiT.metrics.extractors import INCEPTION, Extractor, make_extractor
from LightningDiT.metrics.formulas import frechet_distance, psnr, ridge_error, squared_error, uniformity
from LightningDiT.metrics.scores import FEW
from LightningDiT.metrics.sources import open_images
from LightningDiT.radar.level_images import open_levels
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats, Moments
from LightningDiT.tokenizer.losses import high_pass
from LightningDiT.tokenizer.perceptual import SMALLEST_SIDE, PerceptualDistance, load_perceptual
from LightningDiT.tokenizer.vavae import VA_VAE

REPORT, PICTURE, PICTURE_IMAGES = "evaluation.json", "reconstructions.png", 8
TORCHMETRICS_PIN = "torchmetrics==1.9.0"
POSITIONS = 4096  # latent vectors behind the uniformity
SMALLEST_SSIM_SIDE = 11  # pixels of the window (Wang et al., 2004)
COLOURS = 3  # channels of LPIPS and of networks for features
LEVELS_PER_UNIT = 0.5  # levels lie in 0 to 1, pixels in -1 to 1

T = TypeVar("T")
Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Measures:
    """What compares originals and reconstructions, beside their pixels; None: it cannot be had.

    Attributes:
        ssim: images and references (N, C, H, W) in [-1, 1] -> (N,).
        lpips: the same.
        extractor: the network of the Frechet distance.
        notes: why something cannot be had.
    """

    ssim: Similarity | None = None
    lpips: PerceptualDistance | None = None
    extractor: Extractor | None = None
    notes: list[str] = field(default_factory=list)

    def made(self, title: str, make: Callable[[], T], required: bool, side: int = 0, least: int = 0) -> T | None:
        """Return the result of `make`; None and a note if that fails and is not `required`.

        Args:
            side, least: side of the images in pixels, and the smallest that serves.
        """
        if side < least:
            self.notes.append(f"{title} is left out: it needs images of {least} pixels, these have {side}")
            return None
        try:
            return make()
        except LightningDiTError as error:
            if required:
                raise
            self.notes.append(f"{title} is left out: {error}")
            return None


def structural_similarity() -> Similarity:
    """Return SSIM (Wang et al., 2004: an 11x11 Gaussian window of standard deviation 1.5) by torchmetrics.

    Raises:
        LightningDiTError: torchmetrics is not installed.
    """
    package = import_package("torchmetrics.functional.image", "SSIM", TORCHMETRICS_PIN)
    ssim = partial(package.structural_similarity_index_measure, data_range=2.0, reduction="none")
    return lambda images, references: ssim(images, references).flatten()


def make_measures(
    side: int,
    count: int,
    features: str | None,
    inception_weights: str | None = None,
    lpips_weights: str | None = None,
    distance_required: bool = False,
) -> Measures:
    """Return all measures that can be had for `count` images with a side of `side` pixels.

    Args:
        features, inception_weights: see `make_extractor`; None: no network of photographs is asked for, so that the
            Frechet distance is left out, and LPIPS too unless its weights are named.
        lpips_weights: see `load_perceptual`; with them LPIPS is required.
        distance_required: raise an error instead of leaving the Frechet distance out.

    Raises:
        LightningDiTError: a required measure cannot be had.
    """
    measures = Measures()
    measures.ssim = measures.made("SSIM", structural_similarity, False, side, SMALLEST_SSIM_SIDE)
    if features or lpips_weights:
        lpips = partial(load_perceptual, lpips_weights)
        measures.lpips = measures.made("LPIPS", lpips, bool(lpips_weights), side, SMALLEST_SIDE)
    else:
        measures.notes.append("LPIPS is left out: VGG-16 knows photographs (--lpips-weights asks for it)")
    if count < 2:
        measures.notes.append("the Frechet distance is left out: one image has no covariance")
        return measures
    if features is None:
        measures.notes.append(
            "the Frechet distance is left out: Inception knows photographs (--features names a network)"
        )
        return measures
    network = partial(make_extractor, features, inception_weights)
    measures.extractor = measures.made("the Frechet distance", network, distance_required)
    if measures.extractor is not None and count < FEW:
        measures.notes.append(f"a Frechet distance of {count} images is biased; papers state it for 50,000")
    return measures


class ReconstructionScores:
    """The scores of one tokenizer, accumulated batch by batch."""

    def __init__(self, tokenizer: VA_VAE, measures: Measures) -> None:
        self.tokenizer, self.measures = tokenizer, measures
        if measures.lpips is not None:
            measures.lpips.to(tokenizer.device)
        self._moments = Moments()
        self._latents: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {}
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])  # of reconstructions and originals

    @torch.no_grad()
    def add(self, pixels: Tensor) -> Tensor:
        """Add originals (N, 3, H, W) uint8, or levels (N, 1, H, W) float32, and return their reconstructions alike."""
        tokenizer, measures = self.tokenizer, self.measures
        originals = to_float(pixels).to(tokenizer.device)
        latents = tokenizer.encode_images(originals, sample=False)  # (N, C, h, w)
        copied = self._as(pixels, tokenizer.decode_latents(latents))
        copies = to_float(copied).to(tokenizer.device)
        functions = {"squared_error": squared_error, "ssim": measures.ssim}
        if pixels.is_floating_point():
            functions |= {"ridge_error": ridge_error, "high_pass": _energy, "high_pass_of_originals": _energy_of_second}
        for name, function in functions.items():
            if function is not None:
                self._values.setdefault(name, []).append(function(copies, originals).double().cpu())
        if measures.lpips is not None:
            coloured = (with_channels(images, COLOURS) for images in (copies, originals))
            self._values.setdefault("lpips", []).append(measures.lpips(*coloured).double().cpu())
        if measures.extractor is not None:
            for features, side in zip(self._features, (copied, pixels), strict=True):
                features.append(measures.extractor(_colours_of_files(side))["features"])
        self._moments.add(latents.cpu())
        self._latents.append(latents.cpu())
        return copied

    @staticmethod
    def _as(pixels: Tensor, decoded: Tensor) -> Tensor:
        """Return decoded images (N, C, H, W) in the form of `pixels`: 8 bits as in a file, or levels."""
        if pixels.is_floating_point():
            return levels_of(decoded).clamp(-1, 1).cpu()  # (N, 1, H, W)
        return to_uint8(with_channels(decoded, pixels.shape[1])).permute(0, 3, 1, 2).cpu()  # (N, 3, H, W)

    def report(self) -> dict[str, Any]:
        """Return all scores; None stands for those that were left out."""
        values = {name: torch.cat(parts) for name, parts in self._values.items()}
        errors = values["squared_error"]  # (N,)
        inexact = errors[errors > 0]  # the PSNR of an exact copy is infinite
        result: dict[str, Any] = {
            "images": len(errors),
            "psnr_mean": float(psnr(inexact).mean()) if len(inexact) else None,
            "psnr_pooled": float(psnr(errors.mean())) if len(inexact) else None,
        }
        result |= {name: float(values[name].mean()) if name in values else None for name in ("ssim", "lpips")}
        return result | self._of_levels(values) | self._distance() | {"latents": self._latent_report()}

    def _of_levels(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Return what only levels have: the error of the ridge in rows, and how strong the texture is, in levels."""
        if "ridge_error" not in values:
            return {}
        of_copies, of_originals = (
            LEVELS_PER_UNIT * float(values[name].mean().sqrt()) for name in ("high_pass", "high_pass_of_originals")
        )
        return {
            "ridge_error": float(values["ridge_error"].mean()),
            "high_pass_std": of_copies,
            "high_pass_std_of_originals": of_originals,
            "high_pass_ratio": of_copies / of_originals if of_originals else 1.0,
        }

    def _distance(self) -> dict[str, Any]:
        """Return the Frechet distance of the reconstructions to the originals."""
        extractor = self.measures.extractor
        if extractor is None:
            return {"rfid": None}
        name = "rfid" if extractor.name == INCEPTION else "frechet_distance"
        copies, originals = (torch.cat(parts) for parts in self._features)
        return {name: frechet_distance(copies, originals), "features": extractor.name}

    def _latent_report(self) -> dict[str, Any]:
        """Return mean and standard deviation over all and by channel, and the uniformity of normalised latents."""
        stats = self._moments.stats()
        mean, std = stats.mean.flatten().double(), stats.std.flatten().double()
        vectors = normalised_positions(torch.cat(self._latents), stats)
        noise = torch.randn(vectors.shape, generator=generator_for(0, 1))
        return {
            "mean": float(mean.mean()),
            "std": float((std.square() + mean.square()).mean().sub(mean.mean().square()).sqrt()),
            "channel_mean": mean.tolist(),
            "channel_std": std.tolist(),
            "uniformity": uniformity(vectors),
            "uniformity_of_noise": uniformity(noise),
        }


def _energy(images: Tensor, _: Tensor | None = None) -> Tensor:
    """Return the mean square of the high-passed values of each image (N,)."""
    return high_pass(images.float()).square().flatten(1).mean(1)


def _energy_of_second(_: Tensor, images: Tensor) -> Tensor:
    return _energy(images)


def _colours_of_files(pixels: Tensor) -> Tensor:
    """Return pixels (N, 3, H, W) uint8 of such pixels, or of levels (N, 1, H, W)."""
    if not pixels.is_floating_point():
        return pixels
    return to_uint8(with_channels(pixels, COLOURS)).permute(0, 3, 1, 2)


def normalised_positions(latents: Tensor, stats: LatentStats) -> Tensor:
    """Return at most `POSITIONS` vectors (N, C) of latents (M, C, h, w), drawn at random and normalised by channel."""
    columns = latents.flatten(2)  # (M, C, h w); normalised after the draw, as all of them may take gigabytes
    positions = columns.shape[2]
    chosen = torch.randperm(len(columns) * positions, generator=generator_for(0, 0))[:POSITIONS]
    vectors = columns[chosen // positions, :, chosen % positions]  # (N, C)
    return stats.normalise(vectors[:, :, None, None])[:, :, 0, 0]


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return a line for each score; the channels are in the file alone."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += report_lines({f"{name}: {inner}": score for inner, score in value.items()})
        elif not isinstance(value, list):
            shown = "left out" if value is None else f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"  {name.replace('_', ' '):<32}{shown}")
    return lines


@dataclass(frozen=True)
class ReconstructionSettings:
    """Which tokenizer is evaluated, on which images, and how."""

    config: str  # tokenizer YAML
    weights: str | None  # in place of its ckpt_path
    images: str | None  # see `open_images`; None: the test photographs of Fashion-MNIST in `data_root`
    data_root: str | None
    count: int | None  # images to take, evenly spaced; None: all
    features: str | None  # see `make_extractor`; None: the judge for Fashion-MNIST, else Inception
    lpips_weights: str | None
    inception_weights: str | None
    batch_size: int
    output: Path  # folder of the results
    levels: str | None = None  # windows of step 5, in place of images
    split_file: str | None = None
    part: str = "validation"
    fold: int = 0

    def image_set(self, side: int) -> ImageSet:
        """Return the images to evaluate; those of a folder are cropped to `side` pixels."""
        if self.levels:
            return open_levels(Path(self.levels), Path(self.split_file or ""), self.part, self.fold)
        return open_images(self.images or f"{self.data_root}:test", self.images and side)

    @property
    def network(self) -> str | None:
        """The network of the Frechet distance."""
        return self.features or ("judge" if self.data_root else None if self.levels else "inception")


def evaluate_reconstructions(settings: ReconstructionSettings) -> list[str]:
    """Write evaluation.json and reconstructions.png, and return the report as lines for the screen.

    Raises:
        LightningDiTError: no weights are named, the images cannot be opened, or a required measure cannot be had.
    """
    config, folder = load_tokenizer_config(settings.config), settings.output
    is_report = json_with("tokenizer", "weights", "source")
    for name in (REPORT, PICTURE):  # the picture is known by the report beside it, which is written first
        require_replaceable(folder / name, ours=lambda _: is_report(folder / REPORT))
    weights = settings.weights or config.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no ckpt_path", "give --weights FILE")
    tokenizer = VA_VAE(config, ckpt_path=weights)
    images = settings.image_set(tokenizer.img_size)
    with disk_errors(folder):  # before anything long begins
        folder.mkdir(parents=True, exist_ok=True)
    numbers = evenly_spaced(images.count, min(settings.count or images.count, images.count))
    files = (settings.network, settings.inception_weights, settings.lpips_weights)
    required = bool(settings.features or settings.inception_weights)
    side = min(images.batch(numbers[:1]).pixels.shape[-2:]) if settings.levels else tokenizer.img_size
    measures = make_measures(side, len(numbers), *files, distance_required=required)
    report, pairs = _measured(tokenizer, measures, images, numbers, settings.batch_size)
    origin = {"tokenizer": config.source, "weights": str(weights), "source": images.source}
    write_text(folder / REPORT, json.dumps({**origin, **report, "notes": measures.notes}, indent=2) + "\n")
    save_reconstructions(*pairs, folder / PICTURE)
    notes = [f"note: {note}" for note in measures.notes]
    return [*report_lines(report), *notes, f"wrote {folder / REPORT} and {folder / PICTURE}"]


def _measured(
    tokenizer: VA_VAE, measures: Measures, images: ImageSet, numbers: Sequence[int], batch_size: int
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the report of the images `numbers`, and pixels and reconstructions (8, H, W, C) of a few of them."""
    scores, shown, done = ReconstructionScores(tokenizer, measures), list[tuple[Tensor, Tensor]](), 0
    pictured = set(evenly_spaced(len(numbers), PICTURE_IMAGES))
    with Progress(len(numbers), "image") as progress:
        for batch in images.batches(numbers, batch_size):
            copies = scores.add(batch.pixels)
            shown += [(batch.pixels[row], copies[row]) for row in range(len(copies)) if done + row in pictured]
            done += len(copies)
            progress.update(len(copies))
    pairs = [to_uint8(to_float(torch.stack(pixels))) for pixels in zip(*shown, strict=True)]
    return scores.report(), pairs
