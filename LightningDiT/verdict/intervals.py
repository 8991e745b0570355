"""How sure a share of right answers is, and a difference between two: bootstrap over passes, not over windows.

Windows of one pass share the walk, and neighbours share pixels, so a pass is what was drawn at random. Intervals over
windows would be several times too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
LEVEL = 0.95  # of the intervals
NORMAL = NormalDist()
RESAMPLES = 2000
#: Standard errors in the smallest difference that a test at 5 % (two sides) shows in 80 % of experiments: 1.96 + 0.84
#: (Bloom, Evaluation Review 19, 1995, "minimum detectable effect"; Gelman and Hill 2007, section 20.1).
POWER_FACTOR = 2.8
WANTED = 0.03  # difference in accuracy that is worth the effort
HELPS, HURTS, NO_EFFECT, NO_VERDICT = "helps", "hurts", "does not help", "no verdict"


@dataclass(frozen=True)
class Interval:
    """A mean over windows and its interval by bootstrap over passes.

    Attributes:
        value: the mean.
        low, high: ends of the 95 % interval; minus and plus infinity if fewer than two passes are there.
        standard_error: standard deviation of the resamples; infinity if fewer than two passes are there.
        windows, passes: how many were tested.
    """

    value: float
    low: float
    high: float
    standard_error: float
    windows: int
    passes: int

    @property
    def smallest(self) -> float:
        """The smallest difference that data like this shows with a power of 80 %; see `POWER_FACTOR`."""
        return POWER_FACTOR * self.standard_error


@dataclass(frozen=True)
class Verdict:
    """What a difference means.

    Attributes:
        outcome: of HELPS, HURTS, NO_EFFECT and NO_VERDICT.
        difference: in accuracy, with its interval.
        wanted: the difference that was asked for.
    """

    outcome: str
    difference: Interval
    wanted: float

    @property
    def is_enough(self) -> bool:
        """Whether it helps by at least what was asked for."""
        return self.outcome == HELPS and self.difference.value >= self.wanted


class PassBootstrap:
    """Resamples of tested passes, the same ones for every value that is asked of them.

    Each person is a stratum. In a stratum of m passes, m - 1 are drawn with replacement and count m / (m - 1) times:
    the variance of a mean is then unbiased, while plain resampling gives (m - 1) / m of it (Rao and Wu, JASA 83, 1988),
    half with two passes. People with one tested pass make one stratum together (collapsed strata; Cochran, Sampling
    Techniques, 1977, section 5A.12), which errs towards wide intervals. The ends are quantiles of the resamples, moved
    out to those that Student's distribution has with as many degrees of freedom as there are passes beyond the strata
    (expanded percentiles; Hesterberg, The American Statistician 69, 2015, section 5.3): without that, ten to twenty
    passes give 90 % in place of 95.

    Args:
        people, passes: (N,) of each window; no pass number belongs to two people.
        resamples: number of resamples.
        seed: of the draws.

    Attributes:
        joined: number of people whose single pass was resampled together with others.
    """

    def __init__(self, people: Numbers, passes: Numbers, resamples: int = RESAMPLES, seed: int = 0) -> None:
        numbers, first, self._pass = np.unique(passes, return_index=True, return_inverse=True)
        if len(np.unique(np.stack([passes, people]), axis=1).T) != len(numbers):
            raise ValueError("a pass number belongs to two people")
        strata, self.joined = _strata(people[first])
        self._counts = np.bincount(self._pass, minlength=len(numbers)).astype(np.float64)  # (P,) windows
        self._weights = _weights(strata, resamples, np.random.default_rng(seed)) if len(numbers) > 1 else None
        beyond = NORMAL.cdf(-student_quantile(max(1, len(numbers) - len(np.unique(strata)))))
        self._tails = beyond, 1 - beyond

    @property
    def passes(self) -> int:
        return len(self._counts)

    def interval(self, values: Floats) -> Interval:
        """Return the mean of values (N,) over windows with its interval.

        For the difference of two rows give the difference of each window: both rows then have the same resamples.
        """
        sums = np.bincount(self._pass, values, len(self._counts))  # (P,)
        mean, windows = float(sums.sum() / self._counts.sum()), len(values)
        if self._weights is None:
            return Interval(mean, -math.inf, math.inf, math.inf, windows, self.passes)
        drawn = (self._weights @ sums) / (self._weights @ self._counts)  # (R,)
        low, high = np.quantile(drawn, self._tails)
        return Interval(mean, float(low), float(high), float(drawn.std(ddof=1)), windows, self.passes)


def student_quantile(freedom: int) -> float:
    """Return the quantile of Student's distribution that leaves half of 1 - LEVEL above it.

    For 1 and 2 degrees of freedom it has a closed form; from 3 on a series in 1 / freedom (Abramowitz and Stegun,
    26.7.5) is right within 1 %.
    """
    share = (1 + LEVEL) / 2
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NORMAL.inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (at + 1) for at, term in enumerate(terms))


def _strata(people: Numbers) -> tuple[Numbers, int]:
    """Return the stratum (P,) of each pass, and the number of people whose only pass lies in a common one."""
    names, strata, counts = np.unique(people, return_inverse=True, return_counts=True)
    single = np.flatnonzero(counts == 1)
    if len(single) == 1 and len(names) > 1:  # joins the smallest of the others, the first of equal ones
        others = np.where(counts == 1, counts.max() + 1, counts)
        return np.where(strata == single[0], others.argmin(), strata), 1
    return np.where(np.isin(strata, single), len(names), strata), len(single)


def _weights(strata: Numbers, resamples: int, rng: np.random.Generator) -> Floats:
    """Return how often each pass counts in each resample, (R, P)."""
    weights = np.zeros((resamples, len(strata)))
    for stratum in np.unique(strata):
        own = np.flatnonzero(strata == stratum)
        share = np.full(len(own), 1 / len(own))
        weights[:, own] = rng.multinomial(len(own) - 1, share, resamples) * (len(own) / (len(own) - 1))
    return weights


def conclude(difference: Interval, wanted: float = WANTED) -> Verdict:
    """Return what a difference in accuracy means.

    It helps (or hurts) if the interval lies above (below) 0, and the data can show a difference of `wanted` or of what
    was found. Else, if the data cannot show `wanted`, there is no verdict, whatever was found: among small samples the
    differences that look significant are mostly too large. Else it does not help.
    """
    shown = abs(difference.value) >= difference.smallest or difference.smallest <= wanted
    if shown and difference.low > 0:
        outcome = HELPS
    elif shown and difference.high < 0:
        outcome = HURTS
    else:
        outcome = NO_EFFECT if difference.smallest <= wanted else NO_VERDICT
    return Verdict(outcome, difference, wanted)
