"""Encode images into latent shards and their statistics: `python -m LightningDiT.extract_features --help`.

Images come from Fashion-MNIST (`--data-root`) or from a folder with one subfolder per class (`--images`).
The output folder is what `data.data_path` names: shards and `latents_stats.pt`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.config import load_config, load_tokenizer_config, tokenizer_config_path
from LightningDiT.console import Progress, run_main
from LightningDiT.data.images import ImageBatches, fashion_mnist, image_files, pad_to_32
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.latents import Moments
from LightningDiT.tokenizer.vavae import VA_VAE

Batches = Iterator[tuple[Tensor, Tensor]]


def fashion_batches(root: str, train: bool, batch_size: int) -> tuple[int, Batches]:
    """Return the number of Fashion-MNIST images and batches of (images in [-1, 1], labels)."""
    images, labels = fashion_mnist(root, train)
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return len(images), ((pad_to_32(part), label) for part, label in pairs)


def folder_batches(folder: str, tokenizer: VA_VAE, size: int, batch_size: int) -> tuple[int, Batches]:
    """Return the number of images below `folder` (one subfolder a class) and batches of them."""
    place = Path(folder)
    files = image_files(place)
    flat = [path for path in files if path.parent == place]
    if flat:
        raise LightningDiTError(
            f"{flat[0]} lies in no subfolder, which would name its class", "put images into one subfolder a class"
        )
    classes = {name: number for number, name in enumerate(sorted({path.relative_to(place).parts[0] for path in files}))}
    reader = ImageBatches(files, tokenizer.img_transform(img_size=size), batch_size)

    def batches() -> Batches:
        for images, paths in reader:
            yield images, torch.tensor([classes[path.relative_to(place).parts[0]] for path in paths])
        if reader.unreadable:
            print(f"passed over {len(reader.unreadable)} files that are no images, {reader.unreadable[0]} the first")

    return len(files), batches()


class ShardWriter:
    """Collects encoded batches and writes a shard whenever `shard_size` latents have come together."""

    def __init__(self, folder: Path, shard_size: int) -> None:
        self.folder = folder
        self.shard_size = shard_size
        self.shards = 0
        self._rows: dict[str, list[Tensor]] = {"latents": [], "labels": [], "flipped": []}
        self._waiting = 0

    def add(self, latents: Tensor, labels: Tensor, flipped: Tensor | None) -> None:
        """Take a batch of latents (N, C, h, w), labels (N,) and the mirrored images' latents, if any."""
        self._rows["latents"].append(latents)
        self._rows["labels"].append(labels)
        if flipped is not None:
            self._rows["flipped"].append(flipped)
        self._waiting += len(labels)
        if self._waiting >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        joined = {name: torch.cat(parts) for name, parts in self._rows.items() if parts}
        path = shard_path(self.folder, 0, self.shards)
        write_shard(path, joined["latents"], joined["labels"], joined.get("flipped"))
        self._rows = {name: [] for name in self._rows}
        self._waiting, self.shards = 0, self.shards + 1


def extract(
    tokenizer: VA_VAE, batches: Batches, count: int, output: Path, shard_size: int, mode: bool, flips: bool
) -> Moments:
    """Encode all batches, write shards of `shard_size` latents into `output`, return their moments."""
    moments, writer, progress = Moments(), ShardWriter(output, shard_size), Progress(count, "image")
    for index, (images, labels) in enumerate(batches):
        latents = tokenizer.encode_images(images, not mode, generator_for(0, index, 0)).cpu()
        flipped = None
        if flips:
            flipped = tokenizer.encode_images(images.flip(-1), not mode, generator_for(0, index, 1)).cpu()
        writer.add(latents, labels, flipped)
        moments.add(latents)
        progress.update(len(images))
    writer.flush()
    progress.close()
    return moments


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.extract_features", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the published schema; its tokenizer encodes")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-root", help="folder of Fashion-MNIST")
    source.add_argument("--images", help="folder with one subfolder of images a class")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="of Fashion-MNIST")
    parser.add_argument("--output", required=True, help="folder for shards and latents_stats.pt")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--shard-size", type=int, default=10_000, help="latents in a file")
    parser.add_argument("--posterior", choices=("sample", "mode"), default="sample", help="what is stored")
    parser.add_argument("--flip", action="store_true", help="store mirrored images besides")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config)
    settings = load_tokenizer_config(tokenizer_config_path(config))
    print(f"{settings.source} -> {args.output} ({args.posterior}, flips {'on' if args.flip else 'off'})")
    if args.dry_run:
        return 0
    tokenizer = VA_VAE(settings, config.data.image_size, config.vae.ckpt_path).to(best_device())
    if args.data_root:
        count, batches = fashion_batches(args.data_root, args.split == "train", args.batch_size)
    else:
        count, batches = folder_batches(args.images, tokenizer, config.data.image_size, args.batch_size)
    output = Path(args.output)
    if any(output.glob("*.safetensors")):
        raise LightningDiTError(
            f"{output} holds latent shards already, which would be mixed with these",
            f"choose another --output, or rm {output}/*.safetensors",
        )
    moments = extract(tokenizer, batches, count, output, args.shard_size, args.posterior == "mode", args.flip)
    moments.stats().save(output / "latents_stats.pt")
    print(
        f"wrote {moments.latents} latents and latents_stats.pt to {output}\nNext: python -m LightningDiT.train --help"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
