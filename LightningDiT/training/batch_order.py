"""Which samples a step sees, and which of them a process computes: both follow from the seed and the step."""

from __future__ import annotations

import torch
from torch import Tensor

from LightningDiT.errors import LightningDiTError
from LightningDiT.seeds import generator_for


class BatchOrder:
    """Which samples step `s` sees: a fresh permutation an epoch, known from the seed and the step alone.

    A resumed run asks for the same step and gets the same samples; no position has to be stored.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise LightningDiTError(
                f"a batch of {batch_size} is asked of {count} samples", f"set a global batch of at most {count}"
            )
        self.batch_size = batch_size
        self.count = count
        self.seed = seed
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


def share_of(batch_size: int, rank: int, count: int) -> range:
    """Return the rows of a global batch that process `rank` of `count` computes: equal parts, in order.

    Raises:
        LightningDiTError: the batch cannot be parted equally.
    """
    rows, rest = divmod(batch_size, count)
    if rest:
        raise LightningDiTError(
            f"a batch of {batch_size} cannot be parted equally among {count} processes",
            f"set the global batch to a multiple of {count}",
        )
    return range(rank * rows, (rank + 1) * rows)
