"""Randomness as an argument: one generator per purpose, so that a draw depends on its seeds alone."""

from __future__ import annotations

import numpy as np
import torch


def generator_for(*seeds: int) -> torch.Generator:
    """Return a CPU generator that depends on all of `seeds` (non-negative integers) and on nothing else.

    The seeds are mixed by NumPy's SeedSequence, so that neighbouring pairs (seed, index) give independent
    streams.
    """
    state = np.random.SeedSequence(list(seeds)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
