"""Judge a tokenizer by its reconstructions: `python -m LightningDiT.evaluate_tokenizer --config C --images FOLDER`.

Written are evaluation.json and reconstructions.png. Figures are of 8-bit pixels, as a picture file has them, and of the
posterior's mode. What cannot be computed here, for want of a package or of weights, is left out and said.
docs/tokenizer.md says what each figure is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from LightningDiT.console import Progress, run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, disk_errors
from LightningDiT.images import image_grid, save_png, to_pil, to_uint8
from LightningDiT.metrics.formulas import frechet_distance, psnr_per_image
from LightningDiT.sampling.options import positive
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.latents import LatentStats, Moments
from LightningDiT.tokenizer.perceptual import SMALLEST_SIDE, PerceptualDistance, load_perceptual
from LightningDiT.tokenizer.uniformity import uniformity
from LightningDiT.tokenizer.vavae import VA_VAE

if TYPE_CHECKING:
    from LightningDiT.metrics.extractors import Extractor
    from LightningDiT.metrics.sources import ImageSource

REPORT, PICTURE, PICTURE_IMAGES = "evaluation.json", "reconstructions.png", 8
TORCHMETRICS_PIN = "torchmetrics==1.9.0"
FEW = 10_000  # images below which a Frechet distance is said to be biased
POSITIONS = 4096  # latent vectors that the uniformity is of
SMALLEST_SSIM_SIDE = 11  # pixels of the window (Wang et al., 2004)

T = TypeVar("T")
Similarity = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Judges:
    """What sees originals and reconstructions besides the pixels themselves; None where it cannot be had.

    Attributes:
        ssim: images and references (N, 3, H, W) in [-1, 1] -> (N,).
        lpips: likewise.
        extractor: whose features the Frechet distance is of.
        notes: why something cannot be had.
    """

    ssim: Similarity | None = None
    lpips: PerceptualDistance | None = None
    extractor: Extractor | None = None
    notes: list[str] = field(default_factory=list)

    def can_see(self, title: str, side: int, least: int) -> bool:
        """Whether images of `side` pixels are large enough; notes it where they are not."""
        if side < least:
            self.notes.append(f"{title} is left out: it needs images of {least} pixels, these have {side}")
        return side >= least

    def get(self, title: str, make: Callable[[], T], asked: bool = False) -> T | None:
        """Return what `make` makes, or None and a note of why it cannot be had.

        Args:
            asked: the command line asks for it by name, so that it is an error where it cannot be had.
        """
        try:
            return make()
        except LightningDiTError as error:
            if asked:
                raise
            self.notes.append(f"{title} is left out: {error}")
            return None


def structural_similarity() -> Similarity:
    """Return SSIM (Wang et al., 2004: an 11x11 Gaussian window of standard deviation 1.5) by torchmetrics.

    Raises:
        LightningDiTError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise LightningDiTError(
            f"torchmetrics, which computes SSIM, is missing ({error})", f"pip install {TORCHMETRICS_PIN}"
        ) from error

    def similarity(images: Tensor, references: Tensor) -> Tensor:
        return structural_similarity_index_measure(images, references, data_range=2.0, reduction="none").flatten()

    return similarity


def make_judges(args: argparse.Namespace, device: torch.device, side: int, count: int) -> Judges:
    """Return everything that can be had to see `count` images of `side` pixels.

    Raises:
        LightningDiTError: something that the command line names cannot be had.
    """
    from LightningDiT.metrics.extractors import make_extractor

    judges = Judges()
    if judges.can_see("SSIM", side, SMALLEST_SSIM_SIDE):
        judges.ssim = judges.get("SSIM", structural_similarity)
    if judges.can_see("LPIPS", side, SMALLEST_SIDE):
        given = args.lpips_weights
        judges.lpips = judges.get("LPIPS", lambda: load_perceptual(given).to(device), bool(given))
    features = args.features or ("judge" if args.data_root else "inception")
    asked = bool(args.features or args.inception_weights)
    if count < 2:
        judges.notes.append("the Frechet distance is left out: one image has no spread")
    else:
        judges.extractor = judges.get(
            "the Frechet distance", lambda: make_extractor(features, args.inception_weights), asked
        )
    return judges


class Evaluation:
    """The figures of one tokenizer, gathered batch by batch."""

    def __init__(self, tokenizer: VA_VAE, judges: Judges) -> None:
        self.tokenizer, self.judges = tokenizer, judges
        self.moments = Moments()
        self._latents: list[Tensor] = []
        self._figures: dict[str, list[Tensor]] = {}
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])

    @torch.no_grad()
    def add(self, pixels: Tensor) -> Tensor:
        """Take pixels (N, 3, H, W) uint8 and return those of their reconstructions."""
        tokenizer, judges = self.tokenizer, self.judges
        originals = as_images(pixels).to(tokenizer.device)
        latents = tokenizer.encode_images(originals, sample=False)  # (N, C, h, w)
        copied = to_uint8(tokenizer.decode_latents(latents)).permute(0, 3, 1, 2).cpu()  # (N, 3, H, W)
        copies = as_images(copied).to(tokenizer.device)
        error = (copies.double() - originals.double()).square().flatten(1).mean(1)  # (N,)
        figures = {"psnr": psnr_per_image(copies, originals), "squared_error": error}
        figures |= {
            name: see(copies, originals) for name, see in (("ssim", judges.ssim), ("lpips", judges.lpips)) if see
        }
        for name, values in figures.items():
            self._figures.setdefault(name, []).append(values.double().cpu())
        if judges.extractor is not None:
            for side, seen in zip(self._features, (copied, pixels), strict=True):
                side.append(judges.extractor(seen)["features"])
        self.moments.add(latents.cpu())
        self._latents.append(latents.cpu())
        return copied

    def report(self) -> dict[str, Any]:
        """Return all figures; None for what was left out."""
        values = {name: torch.cat(parts) for name, parts in self._figures.items()}
        finite = values["psnr"][values["psnr"].isfinite()]  # infinite for an exact copy
        error = values["squared_error"].mean()
        result: dict[str, Any] = {
            "images": len(values["psnr"]),
            "psnr_mean": float(finite.mean()) if len(finite) else None,
            "psnr_pooled": float(10.0 * torch.log10(4.0 / error)) if error else None,
        }
        result |= {name: float(values[name].mean()) if name in values else None for name in ("ssim", "lpips")}
        return result | self._distance() | {"latents": self._latent_figures()}

    def _distance(self) -> dict[str, Any]:
        """Return the Frechet distance of the reconstructions to the originals, under its network's name."""
        extractor = self.judges.extractor
        if extractor is None:
            return {"rfid": None}
        name = "rfid" if extractor.name == "inception" else "frechet_distance"
        copies, originals = (torch.cat(parts) for parts in self._features)
        return {name: frechet_distance(copies, originals), "features": extractor.name}

    def _latent_figures(self) -> dict[str, Any]:
        """Return mean and standard deviation, over all and by channel, and the uniformity of normalised latents."""
        stats = self.moments.stats()
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


def normalised_positions(latents: Tensor, stats: LatentStats) -> Tensor:
    """Return at most `POSITIONS` vectors (N, C) of latents (M, C, h, w), each channel with mean 0 and deviation 1."""
    columns = latents.flatten(2)  # (M, C, h w); normalised after the choice, as all of them may be gigabytes
    positions = columns.shape[2]
    chosen = torch.randperm(len(columns) * positions, generator=generator_for(0, 0))[:POSITIONS]
    vectors = columns[chosen // positions, :, chosen % positions]  # (N, C)
    return stats.normalise(vectors[:, :, None, None])[:, :, 0, 0]


def as_images(pixels: Tensor) -> Tensor:
    """Return images in [-1, 1] of uint8 pixels of the same shape."""
    return pixels.float() / 127.5 - 1.0


def batches(source: ImageSource, count: int, size: int) -> Iterator[Tensor]:
    """Yield pixels (N, 3, H, W) uint8 of the first `count` images."""
    progress = Progress(count, "image")
    try:
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield source.read(start, stop)
            progress.reach(stop)
    finally:
        progress.close()


def save_picture(originals: Tensor, copies: Tensor, path: Path) -> None:
    """Draw pixels (N, 3, H, W) uint8 of originals in a row above their reconstructions."""
    pixels = torch.cat([originals[:PICTURE_IMAGES], copies[:PICTURE_IMAGES]]).permute(0, 2, 3, 1)
    save_png(image_grid(to_pil(pixels.numpy()), None, min(PICTURE_IMAGES, len(originals))), path)


def table(report: dict[str, Any]) -> list[str]:
    """Return the report as lines, a figure a line; the channels are in the file alone."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += table({f"{name}: {inner}": figure for inner, figure in value.items()})
        elif not isinstance(value, list):
            shown = "left out" if value is None else f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"  {name.replace('_', ' '):<32}{shown}")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.evaluate_tokenizer", description=__doc__)
    parser.add_argument("--config", required=True, help="tokenizer YAML; its ckpt_path names the weights")
    parser.add_argument("--weights", metavar="FILE", help="in place of ckpt_path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="SET", help="folder of images or .npz file of ADM")
    source.add_argument("--data-root", help="folder of Fashion-MNIST, whose test photographs are taken")
    parser.add_argument("--count", type=positive, help="take the first COUNT images")
    parser.add_argument(
        "--features", help="of the Frechet distance: inception, judge (Fashion-MNIST), timm:NAME[@FILE]"
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="torch.hub's cache or a download where left out")
    parser.add_argument(
        "--lpips-weights", metavar="FILE", help="VGG-16; torch.hub's cache or a download where left out"
    )
    parser.add_argument("--batch-size", type=positive, default=50)
    parser.add_argument("--output", default="output/tokenizer_evaluation", help="folder of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.metrics.sources import open_images

    config, folder = load_tokenizer_config(args.config), Path(args.output)
    if not (args.weights or config.ckpt_path):
        raise LightningDiTError(f"{config.source} names no ckpt_path", "give --weights FILE")
    tokenizer = VA_VAE(config, ckpt_path=args.weights)
    source = open_images(args.images or f"{args.data_root}:test", args.images and tokenizer.img_size)
    with disk_errors(folder):  # before anything long is begun
        folder.mkdir(parents=True, exist_ok=True)
    count, output = min(args.count or source.count, source.count), None
    judges = make_judges(args, tokenizer.device, tokenizer.img_size, count)
    evaluation = Evaluation(tokenizer, judges)
    for pixels in batches(source, count, args.batch_size):
        copies = evaluation.add(pixels)
        output = output or (pixels, copies)
    report = evaluation.report()
    if judges.extractor is not None and count < FEW:
        judges.notes.append(f"a Frechet distance of {count} images is biased; papers state it of 50,000")
    save_picture(*output, folder / PICTURE)
    settings = {"tokenizer": tokenizer.config.source, "weights": str(args.weights or tokenizer.config.ckpt_path)}
    with disk_errors(folder / REPORT), atomic_path(folder / REPORT) as temporary:
        content = {**settings, "source": source.name, **report, "notes": judges.notes}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("\n".join([*table(report), *(f"note: {note}" for note in judges.notes)]))
    print(f"wrote {folder / REPORT} and {folder / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
