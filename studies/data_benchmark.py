"""Measure how fast latents are read in random order: `python -m studies.data_benchmark`.

Shards of the published shape (32x16x16, float32, 10,000 in a file, mirrored ones besides) are written to a temporary
folder, or taken from `--folder`. The same batches are read in turn, with the files in the system's cache, by opening a
file for every sample, as the published training does, and by `LatentShards`: in the first epoch, where no page of the
mapping was used before, and in later ones. All run in one process without workers and give raw latents and labels.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.console import Progress, run_main
from LightningDiT.data.shards import LatentShards, iterate_shards, shard_files, shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.options import positive
from LightningDiT.seeds import generator_for
from LightningDiT.tools.benchmark.machine import free_disk_bytes, free_memory_bytes, lack_of, machine, machine_line
from LightningDiT.tools.report import put_between_marks

SHAPE, CLASSES = (32, 16, 16), 1000
BATCHES = (256, 1024)
PUBLISHED = "a file opened per sample"
FIRST = "LatentShards, first epoch"
LATER = "LatentShards, later epochs"

Reader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """Medians of one way to read one size of batch.

    Attributes:
        seconds: of a batch.
        ratio: speed over that of a file opened per sample, median of the rounds.
    """

    name: str
    batch: int
    seconds: float
    ratio: float


class FilePerSample:
    """Opens the shard of each sample and reads one slice of it, as the published data set does."""

    def __init__(self, folder: str | Path) -> None:
        self._places = [
            (path, row)
            for path, shard in zip(shard_files(folder), iterate_shards(folder), strict=True)
            for row in range(len(shard["labels"]))
        ]

    def batch(self, indices: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w) and labels (B,) of the samples `indices`, mirrored where `flips` (B,) says so."""
        samples = [self._sample(*pair) for pair in zip(indices.tolist(), flips.tolist(), strict=True)]
        latents, labels = zip(*samples, strict=True)
        return torch.stack(latents), torch.stack(labels)

    def _sample(self, index: int, flip: bool) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        path, row = self._places[index]
        with safe_open(path, framework="pt", device="cpu") as opened:
            latent = opened.get_slice("latents_flip" if flip else "latents")[row : row + 1]
            label = opened.get_slice("labels")[row : row + 1]
        return latent.squeeze(0), label.squeeze(0)


def write_shards(folder: Path, shards: int, size: int) -> None:
    """Write shards of random latents.

    Raises:
        LightningDiTError: the disk, or the memory that has to hold the files, is too small.
    """
    needed = shards * size * 2 * 4 * int(torch.Size(SHAPE).numel())
    lack = lack_of({"disk": (needed, free_disk_bytes(folder)), "memory": (needed, free_memory_bytes())})
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


@contextlib.contextmanager
def shard_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Give the folder of the command line, or a temporary one with random shards."""
    if args.folder:
        yield Path(args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), args.shards, args.shard_size)
        yield Path(name)


def readers_of(folder: Path, batch: int) -> dict[str, Callable[[], Reader]]:
    """Return what makes, before each round, the three ways to read.

    Raises:
        LightningDiTError: the shards hold no mirrored latents, or fewer latents than a batch.
    """
    shards, published = LatentShards(folder), FilePerSample(folder)
    if not shards.has_flips or len(shards) < batch:
        raise LightningDiTError(
            f"{folder} holds {len(shards)} latents{'' if shards.has_flips else ' without mirrored ones'}; mirrored ones"
            f" and at least {batch} are needed",
            "leave out --folder, or name another",
        )
    for flip in (False, True):  # the system's own account of the mapping is complete from here on
        for indices in torch.arange(len(shards)).split(batch):
            shards.batch(indices, torch.full(indices.shape, flip))
    return {
        PUBLISHED: lambda: published.batch,
        FIRST: lambda: _opened(folder, batch).batch,
        LATER: lambda: shards.batch,
    }


def _opened(folder: Path, batch: int) -> LatentShards:
    """Return shards that are mapped anew and have the memory of a batch: of one that repeats a single latent."""
    shards = LatentShards(folder)
    shards.batch(torch.zeros(batch, dtype=torch.long))
    return shards


def measure(readers: dict[str, Callable[[], Reader]], samples: int, batch: int, rounds: int) -> list[Row]:
    """Time every reader on one batch after another, in turn, after one round that is not counted.

    Raises:
        LightningDiTError: two of them give different batches.
    """
    times: dict[str, list[float]] = {name: [] for name in readers}
    progress = Progress(rounds + 1, "round")
    for turn in range(rounds + 1):
        generator = generator_for(batch, turn)
        indices = torch.randperm(samples, generator=generator)[:batch]
        flips = torch.rand(batch, generator=generator) < 0.5
        expected = readers[PUBLISHED]()(indices, flips)  # from here on these samples are in the system's cache
        for name, prepare in readers.items():
            read = prepare()
            started = time.perf_counter()
            latents, labels = read(indices, flips)
            times[name].append(time.perf_counter() - started)
            if not (torch.equal(latents, expected[0]) and torch.equal(labels, expected[1])):
                raise LightningDiTError(
                    f"{name}: other latents than of {PUBLISHED}", "python -m pytest tests/test_data.py"
                )
        progress.update()
    progress.close()
    return [_row(name, batch, times[name][1:], times[PUBLISHED][1:]) for name in readers]


def _row(name: str, batch: int, seconds: list[float], published: list[float]) -> Row:
    ratios = [other / own for own, other in zip(seconds, published, strict=True)]
    return Row(name, batch, statistics.median(seconds), statistics.median(ratios))


def table(rows: Sequence[Row]) -> list[str]:
    """Return the figures as a Markdown table."""
    return [
        "| reader | batch | a batch | latents a second | ratio |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {row.name} | {row.batch} | {row.seconds * 1e3:.2f} ms | {row.batch / row.seconds:,.0f}"
            f" | {row.ratio:.1f} |"
            for row in rows
        ),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.data_benchmark", description=__doc__)
    parser.add_argument("--folder", help="shards to read; random ones of the published shape where left out")
    parser.add_argument("--shards", type=positive, default=3, help="random shards; default 3, of 0.66 GB each")
    parser.add_argument("--shard-size", type=positive, default=10_000, help="latents in each; default 10000")
    parser.add_argument("--batch", type=positive, nargs="+", default=BATCHES, help="default 256 1024")
    parser.add_argument("--rounds", type=positive, default=20, help="batches of each reader; default 20")
    parser.add_argument("--output", help="Markdown page between whose marks the table goes; printed where left out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args, rows = parse(argv), list[Row]()
    with shard_folder(args) as folder:
        for batch in args.batch:
            readers = readers_of(folder, batch)
            rows += measure(readers, len(LatentShards(folder)), batch, args.rounds)
    lines = [f"{machine_line(machine(torch.device('cpu'), torch.float32))}.", "", *table(rows)]
    if args.output:
        put_between_marks(Path(args.output), lines, "Latents")
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
