"""Trouble in a run: which steps are left out, and when it goes back to its last good state.

A step whose loss or gradient is not finite leaves the weights as they are. A run of such steps, or a loss far above
the running median, shows that the weights themselves have gone wrong: the run then goes back to its newest checkpoint,
leaves out the batches that set it off (as Chowdhery et al., "PaLM", arXiv 2204.02311, section 5.1) and goes on with a
lower rate. All that is decided here follows from what checkpoints hold, so that a resumed run decides the same.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from LightningDiT.errors import LightningDiTError

MEDIAN_OF, MEDIAN_FROM = 100, 20  # losses that the running median is of, and how many it needs
MAX_RETURNS = 5  # to one checkpoint, before the run ends with an error


class NotFiniteError(LightningDiTError):
    """A loss or gradient is NaN or infinite; the weights are as they were before the step.

    Attributes:
        counts: whether it counts as trouble; where a loss scale is being sought it does not.
    """

    def __init__(self, name: str, step: int, counts: bool = True) -> None:
        super().__init__(
            f"the {name} of step {step} is not finite",
            "lower optimizer.lr or set optimizer.max_grad_norm: 1.0, and give the same command again",
        )
        self.counts = counts


def require_finite(name: str, value: Tensor, step: int) -> None:
    """End a step before a loss or gradient that is not finite reaches the weights.

    Raises:
        NotFiniteError: `value` is NaN or infinite.
    """
    if not bool(torch.isfinite(value.detach()).all()):
        raise NotFiniteError(name, step)


@dataclass(frozen=True)
class GuardSettings:
    """When a run goes back.

    Attributes:
        max_skips: so many steps in a row that are not finite.
        spike_factor: a loss so many times the median of the last 100; 0 is off.
        rate_cut: what the learning rate is multiplied by at each return.
    """

    max_skips: int = 10
    spike_factor: float = 0.0
    rate_cut: float = 0.5


class Guard:
    """Watches the steps of one run.

    Attributes:
        rate_scale: factor on the learning rate.
        skipped: steps so far that changed no weight.
        returns: how often the run went back since it last got beyond its trouble.
        trouble: the steps of the present run of bad ones.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.rate_scale = 1.0
        self.skipped = 0
        self.returns = 0
        self.trouble: list[int] = []
        self._left_out: set[int] = set()
        self._recent: deque[float] = deque(maxlen=MEDIAN_OF)

    def leaves_out(self, step: int) -> bool:
        """Whether `step` set off trouble before and is not tried again."""
        return step in self._left_out

    def good(self, step: int, loss: float) -> bool:
        """Note the finite loss of a step; return whether the run must go back because it is a spike."""
        watched = self.settings.spike_factor > 0 and len(self._recent) >= MEDIAN_FROM
        if watched and loss > self.settings.spike_factor * self.median:
            self.trouble.append(step)
            return True
        self._recent.append(loss)
        self.trouble = []
        return False

    def bad(self, step: int) -> bool:
        """Note a step that was not finite; return whether the run must go back."""
        self.skipped += 1
        self.trouble.append(step)
        return len(self.trouble) >= self.settings.max_skips

    @property
    def median(self) -> float:
        """The median of the last losses."""
        return statistics.median(self._recent)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Take over the history of the older `state`, and keep what the trouble has taught."""
        scale, left_out = self.rate_scale * self.settings.rate_cut, self._left_out | set(self.trouble)
        skipped, returns = self.skipped, self.returns + 1
        self.load_state_dict(state)
        self.rate_scale, self.skipped, self.returns, self.trouble = scale, skipped, returns, []
        self._left_out = left_out

    def passed(self, step: int) -> None:
        """Note that the run stands well after `step` steps; beyond the trouble, its returns are forgotten."""
        if all(step > left for left in self._left_out):
            self.returns = 0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "rate_scale": self.rate_scale,
            "skipped": self.skipped,
            "returns": self.returns,
            "trouble": list(self.trouble),
            "left_out": sorted(self._left_out),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rate_scale, self.skipped, self.returns = state["rate_scale"], state["skipped"], state["returns"]
        self.trouble = list(state["trouble"])
        self._left_out = set(state["left_out"])
        self._recent = deque(state["recent"], maxlen=MEDIAN_OF)
