"""What a training step sees: latents, labels, times and noise, each drawn from (seed, step, row) alone.

Row k of the global batch of a step has a generator of its own, so neither the number of processes nor that of
micro-batches changes a draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from LightningDiT.config import Config
from LightningDiT.data.labels import Labels, Names, match, names_of_latents
from LightningDiT.data.prefetching import StepPrefetcher, prefetched
from LightningDiT.data.shards import LatentShards
from LightningDiT.device import ready_for
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import load_stats
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.latent_space import check_tokenizer_of_latents
from LightningDiT.training.schedule import BatchOrder, process_rows
from LightningDiT.transport import Transport

ROW_STREAM, HELD_OUT_STREAM = 1, 2  # second seeds; BatchOrder has 0
LISTED = 5  # classes in a message
MIRRORED_SHARE = 0.5  # of the latents of a step, as published


@dataclass(frozen=True)
class LatentBatch:
    """The rows of a step's global batch that one process computes.

    Attributes:
        latents: (B, C, h, w), normalised.
        labels: (B,) int64, some of them the null class.
        times: (B,).
        noise: (B, C, h, w).
        samples: (B,) int64, their numbers in the shards.
        transport: with the times of this step.
    """

    latents: Tensor
    labels: Tensor
    times: Tensor
    noise: Tensor
    samples: Tensor
    transport: Transport

    def __len__(self) -> int:
        return len(self.labels)

    def micro_batches(self, size: int | None) -> list[LatentBatch]:
        """Return the rows in order, at most `size` of them at a time; all at once without a size."""
        size = size or len(self)
        return [self.each(lambda x, at=at: x[at : at + size]) for at in range(0, len(self), size)]

    def to(self, device: torch.device) -> LatentBatch:
        """Return the rows on `device`."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> LatentBatch:
        """Return the batch with every tensor changed."""
        tensors = (self.latents, self.labels, self.times, self.noise, self.samples)
        return LatentBatch(*map(change, tensors), self.transport)


class LatentBatches:
    """The batches of one process; the next one is made while a step computes.

    Args:
        rank, count: number of the process, and of all.
        device: to which the batches go; default: the CPU.

    Attributes:
        held_out: (K,) numbers of the samples that are kept for the validation loss.

    Raises:
        LightningDiTError: there are no latents, their shape or labels are not the configuration's, or the batch does
            not fit their number or that of the processes.
    """

    def __init__(
        self, config: Config, transport: Transport, rank: int = 0, count: int = 1, device: torch.device | None = None
    ) -> None:
        data, train = config.data, config.train
        if not data.data_path:
            raise LightningDiTError(
                f"{config.source} names no data.data_path", "python -m LightningDiT.extract_features"
            )
        check_tokenizer_of_latents(config)
        self.config, self.device = config, device or torch.device("cpu")
        self.shards, self.stats = open_shards(config, data.data_path), load_stats(config)
        self.seed = train.global_seed
        self.rows = process_rows(train.global_batch_size, rank, count)
        self.samples, self.held_out = self._split(0.0 if data.valid_path else train.valid_share)
        self.order = BatchOrder(len(self.samples), train.global_batch_size, self.seed)
        self._transports = (transport, replace(transport, use_lognorm=False))
        self._prefetched = StepPrefetcher(lambda step: prefetched(self.make, itertools.count(step), workers=1))

    def _split(self, share: float) -> tuple[Tensor, Tensor]:
        """Return the numbers of the samples to train on, and of a random share of them that is held out."""
        numbers = torch.arange(len(self.shards))
        if not share:
            return numbers, numbers[:0]
        shuffled = torch.randperm(len(numbers), generator=generator_for(self.seed, HELD_OUT_STREAM))
        held_out = shuffled[: max(1, round(share * len(numbers)))]
        trained_on = torch.ones(len(numbers), dtype=torch.bool)
        trained_on[held_out] = False
        return numbers[trained_on], held_out

    @property
    def description(self) -> list[int]:
        """What must not change within a run: the shape of the latents and the number that is trained on."""
        return [*self.shards.shape, len(self.samples)]

    def transport_at(self, step: int) -> Transport:
        """Return the transport, with uniform times from `train.lognorm_until_step` on."""
        until = self.config.train.lognorm_until_step
        return self._transports[until is not None and step >= until]

    def batch(self, step: int) -> LatentBatch:
        """Return this process's rows of `step`, which were made while the step before it computed."""
        return self._prefetched.at(step)

    def make(self, step: int) -> LatentBatch:
        """Return this process's rows of `step`, on the CPU."""
        transport = self.transport_at(step)
        size = len(self.rows)
        draws, times = torch.empty(size, 2), torch.empty(size)
        noise = torch.empty(size, *self.shards.shape)
        for index, row in enumerate(self.rows):
            generator = generator_for(self.seed, ROW_STREAM, step, row)
            torch.rand(2, generator=generator, out=draws[index])
            times[index] = transport.sample_times(1, generator)[0]
            torch.randn(self.shards.shape, generator=generator, out=noise[index])
        samples = self.samples[self.order.indices(step)[self.rows.start : self.rows.stop]]
        latents, labels = self.shards.batch(samples, draws[:, 0] < MIRRORED_SHARE)
        dropped = draws[:, 1] < self.config.train.label_dropout
        labels = torch.where(dropped, self.config.data.num_classes, labels)
        batch = LatentBatch(self.stats.normalise(latents), labels, times, noise, samples, transport)
        return batch.each(partial(ready_for, self.device))

    def not_finite(self, batch: LatentBatch) -> list[str]:
        """Return shard and row of each latent of a batch that is not finite."""
        bad = ~batch.latents.isfinite().flatten(1).all(1)  # (B,)
        return [self.shards.origin(number) for number in batch.samples[bad].tolist()]


def has_cosine_loss(config: Config) -> bool:
    """Whether the loss has the cosine term, which is defined for velocities."""
    return config.transport.use_cosine_loss and config.transport.prediction == "velocity"


def open_shards(config: Config, folder: str) -> LatentShards:
    """Return the shards in `folder`.

    Raises:
        LightningDiTError: there are none, or their shape or labels are not the configuration's.
    """
    shards = LatentShards(folder)
    side = config.data.image_size // config.vae.downsample_ratio
    wanted = (config.model.in_chans, side, side)
    if tuple(shards.shape) != wanted:
        raise LightningDiTError(
            f"latents in {folder} have the shape {tuple(shards.shape)}; {config.source} expects {wanted}",
            "extract them with the tokenizer of this configuration",
        )
    largest = int(shards.labels.max())
    if largest >= config.data.num_classes:
        raise LightningDiTError(
            f"latents in {folder} have the label {largest}; data.num_classes is {config.data.num_classes}",
            f"set data.num_classes: {largest + 1} in {config.source}",
        )
    return shards


def class_names_of(config: Config, shards: LatentShards, starts: bool, say: Callable[[str], None]) -> Names | None:
    """Return the names of the classes that a model learns from `shards`, None where they have none.

    Args:
        starts: the run has no checkpoint yet.
        say: takes a line for classes of which there are no latents.

    Raises:
        LightningDiTError: the configuration contradicts the latents' manifest, or has more classes and the run starts.
    """
    labels, count = Labels.of(config, trained=False), config.data.num_classes
    there = names_of_latents(config.data.data_path or "")
    found = len(there) if there else int(shards.labels.max()) + 1
    if found < count:
        text = f"latents in {config.data.data_path} have {found} classes; data.num_classes is {count}"
        if there and starts:
            raise LightningDiTError(text, f"set data.num_classes: {found} in {config.source}")
        say(f"note: {text}, so that the last {count - found} are never trained")
    return labels.identity


def training_labels(config: Config, labels: Tensor, say: Callable[[str], None]) -> Tensor:
    """Return the training's classes of labels (N,) of `data.valid_path`, whose classes may have another order.

    Args:
        say: takes a line if names of one side meet numbers of the other.

    Raises:
        LightningDiTError: those latents have a class that the training's lack.
    """
    folder, valid = str(config.data.data_path), str(config.data.valid_path)
    ours, theirs = Labels.of(config, trained=False).identity, names_of_latents(valid)
    found = match(ours, theirs, f"latents in {folder}", f"latents in {valid}")
    if found.note:
        say(f"note: {found.note}")
    missing = found.names[len(ours) :] if ours and theirs and found.names else ()
    numbers = dict(enumerate(found.theirs)) if found.theirs else {number: number for number in labels.tolist()}
    if found.ours:  # the labels are numbers that meet our numeric names
        numbers = {value: number for number, value in enumerate(found.ours)}
        missing = [str(label) for label in labels.unique().tolist() if label not in numbers]
    if missing:
        raise LightningDiTError(
            f"latents in {valid} have the class {missing[0]!r}, which latents in {folder} lack"
            f" ({', '.join((ours or ())[:LISTED])}, ...)",
            "set data.valid_path to latents of the same classes",
        )
    return torch.tensor([numbers[label] for label in labels.tolist()])
