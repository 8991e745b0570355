"""The states of every source of random numbers, as a checkpoint holds them.

The trainings draw from generators that follow from (seed, step, sample) alone; these states are for what a layer or a
package may draw besides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from LightningDiT.device import gpu_random_states, set_gpu_random_states


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators as tensors and plain values."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "gpus": gpu_random_states(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take over what `random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    keys, position, has_gauss, numpy_gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(state["torch"].clone())
    set_gpu_random_states([value.clone() for value in state["gpus"]])
