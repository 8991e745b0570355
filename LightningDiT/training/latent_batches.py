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
from LightningDiT.data.labels import (
    CLASS_NAMES,
    CONDITION_NAMES,
    Labels,
    Names,
    match,
    names_of_latents,
)
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
MOST_DROPPED = 1 / 3  # share of label_dropout with a second label


@dataclass(frozen=True)
class LatentBatch:
    """The rows of a step's global batch that one process computes.

    Attributes:
        latents: (B, C, h, w), normalised.
        labels: (B,) int64, some of them the null class; with a second label (B, 2), class and condition.
        times: (B,).
        noise: (B, C, h, w).
        samples: (B,) int64, their numbers in the shards.
        transport: with the times of this step.
        augmentation: (B, A), how each latent was augmented; None for a model that is not told.
    """

    latents: Tensor
    labels: Tensor
    times: Tensor
    noise: Tensor
    samples: Tensor
    transport: Transport
    augmentation: Tensor | None = None

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
        told = None if self.augmentation is None else change(self.augmentation)
        return LatentBatch(*map(change, tensors), self.transport, told)


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
        _check_augmentation(config, self.shards)
        _check_dropout(config)
        self.seed = train.global_seed
        self.rows = process_rows(train.global_batch_size, rank, count)
        self.samples, self.held_out = self._split(0.0 if data.valid_path else train.valid_share)
        self.order = BatchOrder(len(self.samples), train.global_batch_size, self.seed)
        self._transports = (transport, replace(transport, use_lognorm=False))
        self._prefetched = StepPrefetcher(lambda step: prefetched(self.make, itertools.count(step), workers=1))

    def _split(self, share: float) -> tuple[Tensor, Tensor]:
        """Return the numbers of the samples to train on, and of a random share of them that is held out.

        All latents of one window, which its augmentations are, come to the same side.
        """
        numbers = torch.arange(len(self.shards))
        if not share:
            return numbers, numbers[:0]
        windows = numbers
        if self.shards.windows is not None:
            windows = self.shards.windows.unique(return_inverse=True)[1]  # (N,) counted from 0
        count = int(windows.max()) + 1
        shuffled = torch.randperm(count, generator=generator_for(self.seed, HELD_OUT_STREAM))
        held_out = shuffled[: max(1, round(share * count))]
        trained_on = torch.ones(count, dtype=torch.bool)
        trained_on[held_out] = False
        if self.shards.windows is None:
            return numbers[trained_on], held_out
        return numbers[trained_on[windows]], numbers[~trained_on[windows]]

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
        latents, _ = self.shards.batch(samples, draws[:, 0] < MIRRORED_SHARE)
        labels = dropped_labels(self.config, labels_of(self.config, self.shards, samples), draws[:, 1])
        told = self.shards.augmentation[samples] if self.config.model.augmentation else None
        batch = LatentBatch(self.stats.normalise(latents), labels, times, noise, samples, transport, told)
        return batch.each(partial(ready_for, self.device))

    def not_finite(self, batch: LatentBatch) -> list[str]:
        """Return shard and row of each latent of a batch that is not finite."""
        bad = ~batch.latents.isfinite().flatten(1).all(1)  # (B,)
        return [self.shards.origin(number) for number in batch.samples[bad].tolist()]


def labels_of(config: Config, shards: LatentShards, numbers: Tensor) -> Tensor:
    """Return the labels (B,) int64 of samples; with a second label (B, 2), class and condition."""
    classes = shards.labels[numbers]
    if not config.data.num_conditions:
        return classes
    return torch.stack([classes, shards.conditions[numbers]], dim=1)


def dropped_labels(config: Config, labels: Tensor, draws: Tensor) -> Tensor:
    """Return the labels (B,) or (B, 2) with some of them replaced by the null ones.

    Args:
        draws: (B,) uniform in [0, 1). Below p, `train.label_dropout`, every label of a row becomes null; with a second
            label, from p to 2p the condition alone, and from 2p to 3p the class alone. So each null row is trained
            with and without the other label.
    """
    share, data = config.train.label_dropout, config.data
    if not data.num_conditions:
        return torch.where(draws < share, data.num_classes, labels)
    without_class = (draws < share) | ((draws >= 2 * share) & (draws < 3 * share))
    classes = torch.where(without_class, data.num_classes, labels[:, 0])
    conditions = torch.where(draws < 2 * share, data.num_conditions, labels[:, 1])
    return torch.stack([classes, conditions], dim=1)


def not_augmented(shards: LatentShards, numbers: Tensor) -> Tensor:
    """Return those of the samples `numbers` whose latents were not augmented."""
    if shards.augmentation is None:
        return numbers
    return numbers[(shards.augmentation[numbers] == 0).all(1)]


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
    _check_conditions(config, shards, folder)
    return shards


def _check_conditions(config: Config, shards: LatentShards, folder: str) -> None:
    """Raise LightningDiTError unless the latents have the second label that the configuration has."""
    count = config.data.num_conditions
    if count and shards.conditions is None:
        raise LightningDiTError(
            f"latents in {folder} have no conditions; data.num_conditions is {count}",
            f"set data.num_conditions: 0 in {config.source}, or extract them from windows with conditions",
        )
    largest = int(shards.conditions.max()) if count else 0
    if count and largest >= count:
        raise LightningDiTError(
            f"latents in {folder} have the condition {largest}; data.num_conditions is {count}",
            f"set data.num_conditions: {largest + 1} in {config.source}",
        )


def _check_augmentation(config: Config, shards: LatentShards) -> None:
    """Raise LightningDiTError unless the model is told how the latents were augmented, in as many values as they have.

    A model that is not told would draw augmented samples.
    """
    told, found = config.model.augmentation, 0 if shards.augmentation is None else shards.augmentation.shape[1]
    if told != found:
        raise LightningDiTError(
            f"latents in {config.data.data_path} tell their augmentation in {found} values; model.augmentation is"
            f" {told}",
            f"set model.augmentation: {found} in {config.source}",
        )


def _check_dropout(config: Config) -> None:
    """Raise LightningDiTError if with a second label more than all rows would lose one."""
    share = config.train.label_dropout
    if config.data.num_conditions and share > MOST_DROPPED:
        raise LightningDiTError(
            f"{config.source}: train.label_dropout is {share:g}; with data.num_conditions a third is the most, as the"
            " class, the condition, and both are dropped in that share of rows each",
            "set train.label_dropout: 0.1",
        )


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


def condition_names_of(config: Config, say: Callable[[str], None] = print) -> Names | None:
    """Return the names of the second label that a model learns, None where there is none or it has no names.

    Args:
        say: takes a line for a second label that the latents have and the model does not learn.

    Raises:
        LightningDiTError: the configuration contradicts the latents' manifest.
    """
    found, folder = Labels.conditions_of(config, trained=False), config.data.data_path or ""
    if found is None and (there := names_of_latents(folder, CONDITION_NAMES)):
        say(f"note: the {len(there)} conditions of latents in {folder} are not learnt, as data.num_conditions is 0")
    return found.identity if found else None


def training_labels(config: Config, labels: Tensor, say: Callable[[str], None]) -> Tensor:
    """Return the training's numbers of labels (N,) or (N, 2) of `data.valid_path`, whose order may be another one.

    Args:
        say: takes a line if names of one side meet numbers of the other.

    Raises:
        LightningDiTError: those latents have a class or a condition that the training's lack.
    """
    classes = Labels.of(config, trained=False).identity
    if labels.dim() == 1:
        return _renumbered(config, labels, classes, CLASS_NAMES, say)
    conditions = condition_names_of(config, say)
    columns = [
        _renumbered(config, labels[:, 0], classes, CLASS_NAMES, say),
        _renumbered(config, labels[:, 1], conditions, CONDITION_NAMES, say),
    ]
    return torch.stack(columns, dim=1)


def _renumbered(config: Config, labels: Tensor, ours: Names | None, key: str, say: Callable[[str], None]) -> Tensor:
    """Return the training's numbers of labels (N,) of one kind; `key` is `CLASS_NAMES` or `CONDITION_NAMES`."""
    folder, valid = str(config.data.data_path), str(config.data.valid_path)
    theirs = names_of_latents(valid, key)
    found = match(ours, theirs, f"latents in {folder}", f"latents in {valid}")
    if found.note:
        say(f"note: {found.note}")
    missing = found.names[len(ours) :] if ours and theirs and found.names else ()
    numbers = dict(enumerate(found.theirs)) if found.theirs else {number: number for number in labels.tolist()}
    if found.ours:  # the labels are numbers that meet our numeric names
        numbers = {value: number for number, value in enumerate(found.ours)}
        missing = [str(label) for label in labels.unique().tolist() if label not in numbers]
    if missing:
        kind, kinds = ("class", "classes") if key == CLASS_NAMES else ("condition", "conditions")
        raise LightningDiTError(
            f"latents in {valid} have the {kind} {missing[0]!r}, which latents in {folder} lack"
            f" ({', '.join((ours or ())[:LISTED])}, ...)",
            f"set data.valid_path to latents of the same {kinds}",
        )
    return torch.tensor([numbers[label] for label in labels.tolist()])
