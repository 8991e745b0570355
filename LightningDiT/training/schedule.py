"""What follows from a step's number: the samples that it sees, each process's rows of them, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from LightningDiT.errors import LightningDiTError
from LightningDiT.seeds import generator_for


class BatchOrder:
    """The samples of every step: a new permutation each epoch, from the seed and the step alone.

    A resumed run asks for the same step and gets the same samples, so no position is stored.

    Raises:
        LightningDiTError: a batch is larger than the data.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise LightningDiTError(
                f"a global batch of {batch_size} exceeds the {count} samples",
                f"set one of at most {count}",
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """Return the sample numbers of `step`, (batch_size,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = torch.randperm(self.count, generator=generator_for(self.seed, 0, epoch))
        return self._permutation[position * self.batch_size :][: self.batch_size]


def process_rows(batch_size: int, rank: int, count: int) -> range:
    """Return the rows of a global batch that process `rank` of `count` computes: equal parts, in order.

    Raises:
        LightningDiTError: the batch cannot be divided equally.
    """
    rows, rest = divmod(batch_size, count)
    if rest:
        raise LightningDiTError(
            f"a batch of {batch_size} cannot be divided equally among {count} processes",
            f"set the global batch to a multiple of {count}",
        )
    return range(rank * rows, (rank + 1) * rows)


def schedule_lengths(warmup: float, decay: float, total: int, where: str) -> tuple[int, int]:
    """Return the steps of the learning rate's rise and fall, which may be given as shares of all steps.

    Args:
        where: the file and section of the settings, for the message.

    Raises:
        LightningDiTError: rise and fall take more steps than there are, so the rate never reaches its height.
    """
    rise, fall = (round(value * total) if 0 < value < 1 else int(value) for value in (warmup, decay))
    if rise + fall > total:
        raise LightningDiTError(
            f"{where}: warmup_steps {rise} and decay_steps {fall} are more than the {total} steps of the training",
            "set shares of max_steps, such as warmup_steps: 0.05 and decay_steps: 0.5",
        )
    return rise, fall


def learning_rate(step: int, base: float, warmup: int, decay: int, total: int) -> float:
    """Return the rate of `step`: a linear rise over `warmup` steps, `base`, a cosine fall over the last `decay`."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = max(0, total - step)
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / decay)) if decay else 1.0
    return base * rise * fall
