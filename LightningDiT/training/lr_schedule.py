"""The learning rate of a step."""

from __future__ import annotations

import math


def learning_rate(step: int, base: float, warmup: int, decay: int, total: int) -> float:
    """Return the rate of `step`: a linear rise over `warmup` steps, `base`, a cosine fall over `decay` ones."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = max(0, total - step)
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / decay)) if decay else 1.0
    return base * rise * fall
