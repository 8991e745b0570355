"""Randomness as an argument: one generator per purpose; a draw depends on its seeds alone."""

from __future__ import annotations

import numpy as np
import torch


def generator_for(*seeds: int) -> torch.Generator:
    """Return a CPU generator that depends on `seeds` (non-negative integers) alone.

    NumPy's SeedSequence mixes them, so that neighbouring pairs (seed, index) give independent streams.
    """
    state = np.random.SeedSequence(list(seeds)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
