"""How sure a share of right answers is, and a difference between two: bootstrap over passes and trainings.

Windows of one pass share the walk, and neighbours share pixels, so a pass is what was drawn at random, not a window.
Intervals over windows would be several times too narrow. The same classifier trained again, from another seed, answers
otherwise, so trainings were drawn at random too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
LEVEL = 0.95  # of the intervals
NORMAL = NormalDist()
RESAMPLES = 2000
POWER = 0.8  # of the smallest difference that data can show
FEWEST_SEEDS = 2  # trainings of each row, for a verdict
WANTED = 0.03  # difference in accuracy that is worth the effort
NOTHING = 1e-12  # variance that rounding leaves where all trainings answer alike
NORMAL_FREEDOM, ANGLES = 10_000, 20_001  # freedom from which a distribution counts as normal; points of an integral
BISECTIONS = 50
HELPS, HURTS, TOO_LITTLE, NO_VERDICT = "helps", "hurts", "does not help enough", "no verdict"


@dataclass(frozen=True)
class Interval:
    """A mean over windows and trainings, and its interval by bootstrap; see `PassBootstrap`.

    Attributes:
        value: the mean.
        low, high: ends of the interval; minus and plus infinity if fewer than two passes are there.
        standard_error: of the mean; infinity if fewer than two passes are there.
        windows, passes: how many were tested.
        seeds: number of trainings; with one the interval is that of this training, whose luck it does not contain.
        seed_error: the part of the standard error that other passes would not reduce: what all passes of a training
            share.
        freedom: degrees of freedom of the standard error.
        level: share of such intervals that hold the true mean.
    """

    value: float
    low: float
    high: float
    standard_error: float
    windows: int
    passes: int
    seeds: int = 1
    seed_error: float = 0.0
    freedom: float = math.inf
    level: float = LEVEL

    @property
    def smallest(self) -> float:
        """The smallest difference that data like this shows, see `smallest_shown`."""
        return smallest_shown(self.standard_error, self.freedom, self.level)

    def at(self, level: float) -> Interval:
        """Return the interval of another level, its ends moved as far as Student's quantile moves.

        Quantiles of the resamples would not do: far out there are too few resamples.
        """
        if level == self.level:
            return self
        share = _two_sided(level, self.freedom) / _two_sided(self.level, self.freedom)
        low, high = (self.value + share * (end - self.value) for end in (self.low, self.high))
        return replace(self, low=low, high=high, level=level)

    def of_share(self) -> Interval:
        """Return the interval without the part below 0 and above 1, where no share lies; unknown ends stay."""
        if math.isinf(self.high):
            return self
        return replace(self, low=max(self.low, 0.0), high=min(self.high, 1.0))


@dataclass(frozen=True)
class Verdict:
    """What a difference means.

    Attributes:
        outcome: of HELPS, HURTS, TOO_LITTLE and NO_VERDICT.
        difference: in accuracy, with the interval that the outcome follows from.
        wanted: the difference that was asked for.
        verdicts: how many were asked for together, see `level_of`.
    """

    outcome: str
    difference: Interval
    wanted: float
    verdicts: int = 1

    @property
    def is_enough(self) -> bool:
        """Whether it helps by at least what was asked for."""
        return self.outcome == HELPS and self.difference.value >= self.wanted


def level_of(verdicts: int) -> float:
    """Return the level of each of some intervals that are to hold together in 95 % of experiments (Bonferroni)."""
    return LEVEL if verdicts == 1 else 1 - (1 - LEVEL) / verdicts


def smallest_shown(standard_error: float, freedom: float, level: float = LEVEL) -> float:
    """Return the smallest difference that a test (two sides, 5 % at the level 0.95) shows in 80 % of experiments.

    It is 2.8 standard errors with many degrees of freedom, 3.1 with ten (Bloom, Evaluation Review 19, 1995, "minimum
    detectable effect").
    """
    return (_two_sided(level, freedom) + student_quantile(freedom, POWER)) * standard_error


def _two_sided(level: float, freedom: float) -> float:
    """Return how many standard errors an interval reaches to either side."""
    return student_quantile(freedom, (1 + level) / 2)


class PassBootstrap:
    """Resamples of tested passes, the same ones for every value that is asked of them, crossed with trainings.

    **Passes.** Each person is a stratum. In a stratum of m passes, m - 1 are drawn with replacement and count
    m / (m - 1) times: the variance of a mean is then unbiased, while plain resampling gives (m - 1) / m of it (Rao and
    Wu, JASA 83, 1988), half with two passes. People with one tested pass make one stratum together (collapsed strata;
    Cochran, Sampling Techniques, 1977, section 5A.12), which errs towards wide intervals.

    **Trainings.** The mean of S trainings and P passes has the variance `a / P + b / S + e / (P S)`: of passes, of
    trainings, and of the interaction of a training with one pass. Passes vary by `a + e / S`, so the pass bootstrap of
    the mean over trainings has the first and the last part. `b / S` is the variance of the trainings' means over S,
    less the last part: that variance has it too, and the passes tell it within each training (variance components of a
    crossed design; two-way clustering of Cameron, Gelbach and Miller, JBES 29, 2011). It is 0 at least. Few trainings
    have few resamples, so their level is a normal distribution of that variance, added to each resample of passes.

    **Ends.** They are quantiles of these resamples, moved out to those that Student's distribution has (expanded
    percentiles; Hesterberg, The American Statistician 69, 2015, section 5.3): without that, ten to twenty passes give
    90 % in place of 95. Its degrees of freedom are the passes beyond the strata, and with those of S - 1 trainings as
    Satterthwaite joins them (Biometrics Bulletin 2, 1946).

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
        self._freedom = max(1, len(numbers) - len(np.unique(strata)))

    @property
    def passes(self) -> int:
        return len(self._counts)

    def smallest(self, deviation: float, level: float = LEVEL) -> float:
        """Return the smallest difference that passes of a standard deviation show; see `smallest_shown`."""
        return smallest_shown(deviation / math.sqrt(self.passes), self._freedom, level)

    def interval(self, values: Floats) -> Interval:
        """Return the mean of values (S, N) of trainings and windows with its interval; (N,) is of one training.

        For the difference of two rows give the difference of each window and seed: both rows then have the same
        resamples.
        """
        trained = np.atleast_2d(values)
        mean, (seeds, windows) = float(trained.mean()), trained.shape
        if self._weights is None:
            return Interval(mean, -math.inf, math.inf, math.inf, windows, self.passes, seeds)
        drawn = self._drawn(trained.mean(0))
        of_passes = float(drawn.var(ddof=1))
        of_seeds = self._seed_variance(trained) if seeds > 1 else 0.0
        variance, freedom = of_passes + of_seeds, float(self._freedom)
        if of_seeds:
            freedom = variance**2 / (of_passes**2 / self._freedom + of_seeds**2 / (seeds - 1))
        beyond = NORMAL.cdf(-student_quantile(freedom))
        low, high = _quantiles(drawn, math.sqrt(of_seeds), (beyond, 1 - beyond))
        errors = math.sqrt(variance), math.sqrt(of_seeds)
        return Interval(mean, low, high, errors[0], windows, self.passes, seeds, errors[1], freedom)

    def _drawn(self, values: Floats) -> Floats:
        """Return the mean of values (N,) in each resample of the passes, (R,)."""
        assert self._weights is not None
        sums = np.bincount(self._pass, values, len(self._counts))  # (P,)
        return (self._weights @ sums) / (self._weights @ self._counts)

    def _seed_variance(self, values: Floats) -> float:
        """Return b / S for values (S, N), see the class; 0 where passes explain how trainings differ."""
        seeds = len(values)
        own = [float(self._drawn(part - values.mean(0)).var(ddof=1)) for part in values]  # mean: e / P (S - 1) / S
        of_one_pass = sum(own) / (seeds * (seeds - 1))
        found = float(values.mean(1).var(ddof=1)) / seeds - of_one_pass
        return found if found > NOTHING else 0.0


@functools.cache
def student_quantile(freedom: float, share: float = (1 + LEVEL) / 2) -> float:
    """Return the quantile of Student's distribution with any number of degrees of freedom from 1 on.

    With t = sqrt(freedom) tan(angle) its density is cos(angle) ** (freedom - 1), which is integrated.
    """
    if freedom > NORMAL_FREEDOM:
        return NORMAL.inv_cdf(share)
    angles = np.linspace(0, math.pi / 2, ANGLES)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * share - 1, area / area[-1], angles)))


def _quantiles(drawn: Floats, deviation: float, shares: tuple[float, float]) -> tuple[float, float]:
    """Return two quantiles of resamples (R,) plus a normal value of that deviation, by bisection of their distribution.

    With the deviation 0 they are those of the resamples.
    """
    if not deviation:
        low, high = np.quantile(drawn, shares)
        return float(low), float(high)
    resamples, wanted = torch.from_numpy(drawn), torch.tensor(shares, dtype=torch.float64)
    reach = 40 * deviation  # beyond it a normal distribution has nothing left
    low = torch.full((2,), float(drawn.min()) - reach, dtype=torch.float64)
    high = torch.full((2,), float(drawn.max()) + reach, dtype=torch.float64)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - resamples) / deviation).mean(1) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return float(low[0]), float(high[1])


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


def conclude(difference: Interval, wanted: float = WANTED, verdicts: int = 1) -> Verdict:
    """Return what a difference in accuracy means.

    It helps (or hurts) if the interval lies above (below) 0, and the data can show a difference of `wanted` or of the
    size found: among small samples the differences that look significant are mostly too large. Else it does not help
    enough if the whole interval lies below `wanted`. Else there is no verdict: a gain of `wanted` is possible, and so
    is none. Nor is there a verdict on one training of each row, since nothing tells how much another one differs.

    Args:
        difference: with an interval of 95 %.
        verdicts: how many are asked for together; each is taken at the level that lets all of them hold at 95 %.
    """
    difference = difference.at(level_of(verdicts))
    shown = abs(difference.value) >= difference.smallest or difference.smallest <= wanted
    if difference.seeds < FEWEST_SEEDS:
        outcome = NO_VERDICT
    elif shown and difference.low > 0:
        outcome = HELPS
    elif shown and difference.high < 0:
        outcome = HURTS
    else:
        outcome = TOO_LITTLE if difference.high < wanted else NO_VERDICT
    return Verdict(outcome, difference, wanted, verdicts)
