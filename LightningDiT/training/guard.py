"""Trouble in a run: which steps are skipped, and when the run goes back to its last good state.

A step whose loss or gradient is not finite leaves the weights as they are. Several of them in a row, or a loss far
above the running median, show that the weights themselves have gone wrong. The run then goes back to its newest
checkpoint, skips the batches that caused the trouble (as Chowdhery et al., "PaLM", arXiv 2204.02311, section 5.1) and
goes on at a lower learning rate. Checkpoints hold all that decides this, so a resumed run decides the same.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from LightningDiT.errors import LightningDiTError

MEDIAN_OF, MEDIAN_FROM = 100, 20  # losses in the running median, and how many it needs before it counts
MAX_RETURNS = 5  # without getting beyond the trouble; then the run ends with an error


class NotFiniteError(LightningDiTError):
    """A loss or gradient is NaN or infinite; the weights are as they were before the step.

    Attributes:
        counts: whether it counts as trouble; it does not while the loss scale is sought.
    """

    def __init__(self, name: str, step: int, counts: bool = True) -> None:
        super().__init__(
            f"the {name} of step {step} is not finite",
            "lower optimizer.lr or set optimizer.max_grad_norm: 1.0, and run the command again",
        )
        self.counts = counts


def fetched(arriving: Callable[[], list[float]]) -> list[float]:
    """Return the numbers of `device.sent_to_cpu`; a step waits for its GPU here and nowhere else."""
    return arriving()


@dataclass(frozen=True)
class GuardSettings:
    """When a run goes back, and how far it lowers the learning rate."""

    max_skips: int = 10  # non-finite steps in a row
    spike_factor: float = 0.0  # a loss above this many times the median of the last 100; 0: off
    rate_cut: float = 0.5  # factor on the learning rate each time


class Guard:
    """Counts the bad steps of one run and tells when it must go back.

    Attributes:
        rate_scale: factor on the learning rate.
        skipped: steps so far that were not finite.
        returns: how often the run went back since it last got beyond its trouble.
        trouble: the bad steps in a row up to now.
        last_finite: the newest step whose loss was finite and no spike; -1: there was none.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.rate_scale = 1.0
        self.skipped = 0
        self.returns = 0
        self.trouble: list[int] = []
        self.last_finite = -1
        self._left_out: set[int] = set()
        self._recent: deque[float] = deque(maxlen=MEDIAN_OF)

    def skips(self, step: int) -> bool:
        """Whether `step` caused trouble before and is not tried again."""
        return step in self._left_out

    def finite_step(self, step: int, loss: float) -> bool:
        """Note the finite loss of a step; return whether it is a spike, so that the run must go back."""
        watched = self.settings.spike_factor > 0 and len(self._recent) >= MEDIAN_FROM
        if watched and loss > self.settings.spike_factor * statistics.median(self._recent):
            self.trouble.append(step)
            return True
        self._recent.append(loss)
        self.trouble = []
        self.last_finite = step
        return False

    def non_finite_step(self, step: int) -> bool:
        """Note a step that was not finite; return whether the run must go back."""
        self.skipped += 1
        self.trouble.append(step)
        return len(self.trouble) >= self.settings.max_skips

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Restore the older `state`, but keep the count of skipped steps, the steps to skip and a lower rate."""
        scale, left_out = self.rate_scale * self.settings.rate_cut, self._left_out | set(self.trouble)
        skipped, returns = self.skipped, self.returns + 1
        self.load_state_dict(state)
        self.rate_scale, self.skipped, self.returns, self.trouble = scale, skipped, returns, []
        self._left_out = left_out

    def passed(self) -> None:
        """Note that the run is well; its returns are forgotten after a finite step beyond all trouble."""
        if all(self.last_finite > left for left in self._left_out):
            self.returns = 0

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "rate_scale": self.rate_scale,
            "skipped": self.skipped,
            "returns": self.returns,
            "trouble": list(self.trouble),
            "left_out": sorted(self._left_out),
            "last_finite": self.last_finite,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rate_scale, self.skipped, self.returns = state["rate_scale"], state["skipped"], state["returns"]
        self.trouble = list(state["trouble"])
        self._left_out = set(state["left_out"])
        self._recent = deque(state["recent"], maxlen=MEDIAN_OF)
        self.last_finite = state.get("last_finite", 0 if self._recent else -1)  # older checkpoints do not hold it
