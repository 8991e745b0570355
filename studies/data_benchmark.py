"""Measure how fast latents are read in random order: `python -m studies.data_benchmark`.

Shards of the published shape (32x16x16, float32, 10,000 in a file, and mirrored ones) are written to a temporary
folder. The same batches are read in turn, with the files in the system's cache: by opening a file for every sample, as
the published training does, and by `LatentShards`, in the first epoch, where no page of the mapping was used before,
and in later ones. Each reader runs in one process and gives raw latents and labels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.console import Progress, positive, run_main
from LightningDiT.data.shards import LatentShards, iterate_shards, shard_files, shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes
from LightningDiT.seeds import generator_for
from LightningDiT.tools.benchmark.machine import free_memory_bytes, lack_of, machine, machine_line
from LightningDiT.tools.report import put_between_marks
from LightningDiT.tools.report import table as markdown

SHAPE, CLASSES = (32, 16, 16), 1000
BATCHES = (256, 1024)
PUBLISHED = "a file opened per sample"
FIRST = "LatentShards, first epoch"
LATER = "LatentShards, later epochs"

Reader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """Medians of one reader at one batch size.

    Attributes:
        seconds: of a batch.
        ratio: speed over that of a file opened per sample, median over rounds.
    """

    name: str
    batch: int
    seconds: float
    ratio: float


class FilePerSample:
    """Opens the shard of each sample and reads one slice of it, as the published data set does."""

    def __init__(self, folder: str | Path) -> None:
        self._rows = [
            (path, row)
            for path, shard in zip(shard_files(folder), iterate_shards(folder), strict=True)
            for row in range(len(shard["labels"]))
        ]

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w), mirrored where `flips` (B,) is true, and labels (B,) of samples `indices`."""
        samples = [self._sample(*pair) for pair in zip(indices.tolist(), flips.tolist(), strict=True)]
        latents, labels = zip(*samples, strict=True)
        return torch.stack(latents), torch.stack(labels)

    def _sample(self, index: int, flip: bool) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        path, row = self._rows[index]
        with safe_open(path, framework="pt", device="cpu") as opened:
            latent = opened.get_slice("latents_flip" if flip else "latents")[row : row + 1]
            label = opened.get_slice("labels")[row : row + 1]
        return latent.squeeze(0), label.squeeze(0)


def write_shards(folder: Path, shards: int, size: int) -> None:
    """Write shards of random latents.

    Raises:
        LightningDiTError: the disk is too small, or the memory, which has to hold the files.
    """
    needed = shards * size * 2 * 4 * int(torch.Size(SHAPE).numel())
    lack = lack_of({"disk": (needed, free_bytes(folder)), "memory": (needed, free_memory_bytes())})
    if lack:
        raise LightningDiTError(lack, "give a smaller --shards or --shard-size")
    progress = Progress(shards, "shard")
    for number in range(shards):
        generator = generator_for(number)
        latents, flipped = (torch.randn(size, *SHAPE, generator=generator) for _ in range(2))
        labels = torch.randint(CLASSES, (size,), generator=generator)
        write_shard(shard_path(folder, 0, number), latents, labels, flipped)
        progress.update()
    progress.close()


def readers_of(folder: Path, batch: int) -> dict[str, Callable[[], Reader]]:
    """Return for each reader a function that prepares it before a round; the shards hold mirrored latents."""
    shards, published = LatentShards(folder), FilePerSample(folder)
    for flip in (False, True):  # read every page once
        for indices in torch.arange(len(shards)).split(batch):
            shards.batch(indices, torch.full(indices.shape, flip))
    return {
        PUBLISHED: lambda: published.batch,
        FIRST: lambda: _opened(folder, batch).batch,
        LATER: lambda: shards.batch,
    }


def _opened(folder: Path, batch: int) -> LatentShards:
    """Return shards that are mapped anew; their memory of a batch is there, from one that repeats a single latent."""
    shards = LatentShards(folder)
    shards.batch(torch.zeros(batch, dtype=torch.long))
    return shards


def measure(readers: dict[str, Callable[[], Reader]], samples: int, batch: int, rounds: int) -> list[Row]:
    """Time the readers in turn, on another batch each round, after one round to warm up.

    Raises:
        LightningDiTError: two of them give different batches.
    """
    times: dict[str, list[float]] = {name: [] for name in readers}
    progress = Progress(rounds + 1, "round")
    for turn in range(rounds + 1):
        generator = generator_for(batch, turn)
        indices = torch.randperm(samples, generator=generator)[:batch]
        flips = torch.rand(batch, generator=generator) < 0.5
        expected = readers[PUBLISHED]()(indices, flips)  # puts these samples into the system's cache
        for name, prepare in readers.items():
            read = prepare()
            started = time.perf_counter()
            latents, labels = read(indices, flips)
            times[name].append(time.perf_counter() - started)
            if not (torch.equal(latents, expected[0]) and torch.equal(labels, expected[1])):
                raise LightningDiTError(f"{name}: other latents than of {PUBLISHED}", "report this as a bug")
        progress.update()
    progress.close()

    def median_ratio(seconds: list[float]) -> float:
        return statistics.median(other / own for own, other in zip(seconds[1:], times[PUBLISHED][1:], strict=True))

    return [Row(name, batch, statistics.median(own[1:]), median_ratio(own)) for name, own in times.items()]


def table(rows: Sequence[Row]) -> list[str]:
    """Return the figures as a Markdown table."""
    body = [
        (
            row.name,
            str(row.batch),
            f"{row.seconds * 1e3:.2f} ms",
            f"{row.batch / row.seconds:,.0f}",
            f"{row.ratio:.1f}",
        )
        for row in rows
    ]
    return markdown(("reader", "batch", "a batch", "latents a second", "ratio"), body)[:-1]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.data_benchmark", description=__doc__)
    parser.add_argument("--shards", type=positive, default=3, help="default: 3, of 0.66 GB each")
    parser.add_argument("--shard-size", type=positive, default=10_000, help="latents in each; default: %(default)s")
    parser.add_argument("--batch", type=positive, nargs="+", default=BATCHES, help="batch sizes; default: 256 1024")
    parser.add_argument("--rounds", type=positive, default=20, help="batches of each reader; default: %(default)s")
    parser.add_argument("--output", help="Markdown page between whose marks the table goes; default: print it")
    args = parser.parse_args(argv)
    if max(args.batch) > args.shards * args.shard_size:
        parser.error(
            f"--batch {max(args.batch)} is more than the {args.shards * args.shard_size} latents of all shards"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args, rows = parse(argv), list[Row]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, args.shards, args.shard_size)
        for batch in args.batch:
            rows += measure(readers_of(folder, batch), args.shards * args.shard_size, batch, args.rounds)
    lines = [f"{machine_line(machine(torch.device('cpu'), torch.float32))}.", "", *table(rows)]
    if args.output:
        put_between_marks(Path(args.output), lines, "Latents")
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
