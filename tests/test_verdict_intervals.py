"""Intervals over passes and trainings: closed forms of their error, strata, pairs, and what a difference means."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from LightningDiT.verdict.intervals import (
    HELPS,
    HURTS,
    NO_VERDICT,
    TOO_LITTLE,
    Interval,
    PassBootstrap,
    conclude,
    level_of,
    student_quantile,
)
from studies import interval_study

MANY = 20_000  # resamples: the standard error is then known within about 0.5 %


def layout(people: int, passes: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return person and pass of each window, every person with as many passes and every pass with as many windows."""
    numbers = np.repeat(np.arange(people * passes), windows)
    return numbers // passes, numbers


@pytest.mark.parametrize("passes", [2, 3, 12])
def test_one_window_a_pass_has_the_error_of_the_binomial(passes: int) -> None:
    """s / sqrt(m) with s^2 = p (1 - p) m / (m - 1), also for two passes, where plain resampling gives 0.71 of it."""
    people, numbers = layout(1, passes, 1)
    right = (np.arange(passes) < max(1, passes // 3)).astype(float)
    found = PassBootstrap(people, numbers, MANY).interval(right)
    share = right.mean()
    assert found.value == share
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (passes - 1)), rel=0.03)
    assert (found.passes, found.windows) == (passes, passes)


def test_windows_of_a_pass_that_agree_do_not_narrow_the_interval() -> None:
    once, often = layout(2, 6, 1), layout(2, 6, 40)
    right = np.random.default_rng(0).integers(0, 2, 12).astype(float)
    few = PassBootstrap(*once, 500).interval(right)
    many = PassBootstrap(*often, 500).interval(np.repeat(right, 40))
    assert (many.low, many.high, many.standard_error) == pytest.approx((few.low, few.high, few.standard_error))
    assert few.low < few.value < few.high


def test_the_error_of_unequal_passes_is_that_of_a_ratio() -> None:
    """Cochran (1977), section 6.3: sqrt(m / (m - 1) sum e^2) / windows with e = right - share * windows of a pass."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(20, 60, 30)
    numbers = np.repeat(np.arange(30), sizes)
    right = (rng.random(len(numbers)) < np.repeat(rng.uniform(0.3, 0.9, 30), sizes)).astype(float)
    residuals = np.bincount(numbers, right) - right.mean() * sizes
    expected = math.sqrt(30 / 29 * (residuals**2).sum()) / sizes.sum()
    found = PassBootstrap(np.zeros_like(numbers), numbers, MANY).interval(right)
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    expected *= student_quantile(29) / 1.96
    assert (found.low, found.high) == pytest.approx(
        (right.mean() - 1.96 * expected, right.mean() + 1.96 * expected), abs=0.01
    )


def test_quantiles_of_students_distribution() -> None:
    """The table of any book on statistics."""
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 10_000: 1.960, math.inf: 1.960}
    assert {freedom: student_quantile(freedom) for freedom in known} == pytest.approx(known, rel=3e-4)
    assert student_quantile(2.5) == pytest.approx(3.5747, abs=1e-3)  # scipy.stats.t.ppf(0.975, 2.5)
    assert student_quantile(10, 0.8) == pytest.approx(0.879, abs=1e-3)


def test_few_passes_move_the_ends_out() -> None:
    """Four passes of one stratum: the ends leave 0.00074 of the resamples, as 3.18 leaves of a normal distribution."""
    people, numbers = np.array([0, 0, 0, 0]), np.arange(4)
    values = np.array([0.0, 1.0, 2.0, 10.0])
    found = PassBootstrap(people, numbers, MANY).interval(values)
    draws = np.random.default_rng(0).multinomial(3, np.full(4, 0.25), MANY) @ values / 3
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.00074, 1 - 0.00074])), abs=0.01)


def test_what_differs_between_people_alone_is_no_error() -> None:
    people, numbers = layout(4, 3, 5)
    found = PassBootstrap(people, numbers).interval((people % 2).astype(float))
    assert (found.value, found.low, found.high, found.standard_error) == (0.5, 0.5, 0.5, 0.0)


def test_people_with_one_pass_are_one_stratum() -> None:
    """Their mean has the error of their passes; a stratum each would say that nothing varies."""
    people, numbers = layout(8, 1, 10)
    right = np.repeat([1.0, 0, 1, 1, 0, 1, 1, 1], 10)
    bootstrap = PassBootstrap(people, numbers, MANY)
    assert bootstrap.joined == 8
    assert bootstrap.interval(right).standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 7), rel=0.03)
    alone = PassBootstrap(np.array([0, 0, 1]), np.array([0, 1, 2]), MANY)  # joins the other person
    assert alone.joined == 1
    assert alone.interval(np.array([0.0, 0, 1])).standard_error == pytest.approx(1 / 3, rel=0.03)


def test_an_interval_of_a_share_ends_at_0_and_1() -> None:
    wide, inside = (Interval(0.3, *ends, 0.2, 9, 4) for ends in ((-0.05, 1.2), (0.1, 0.5)))
    assert wide.of_share() == replace(wide, low=0.0, high=1.0)
    assert inside.of_share() == inside
    unknown = Interval(0.3, -math.inf, math.inf, math.inf, 9, 1)
    assert unknown.of_share() == unknown


def test_one_pass_has_no_interval() -> None:
    found = PassBootstrap(np.zeros(9, int), np.zeros(9, int)).interval(np.ones(9))
    assert (found.value, found.low, found.high) == (1.0, -math.inf, math.inf)
    assert conclude(found).outcome == NO_VERDICT


def test_equal_predictions_differ_by_nothing_and_pairs_are_narrower_than_two_rows() -> None:
    people, numbers = layout(3, 5, 8)
    rng = np.random.default_rng(2)
    first = np.repeat(rng.random(15) < 0.7, 8).astype(float)
    second = np.where(numbers == 4, 1 - first, first)  # one pass of fifteen changes
    bootstrap = PassBootstrap(people, numbers)
    same = bootstrap.interval(first - first)
    assert (same.value, same.low, same.high, same.smallest) == (0, 0, 0, 0)
    assert conclude(replace(same, seeds=3)).outcome == TOO_LITTLE
    paired = bootstrap.interval(second - first)
    assert abs(paired.value) == pytest.approx(1 / 15)
    assert paired.standard_error < bootstrap.interval(first).standard_error
    assert paired.standard_error == pytest.approx(math.sqrt(5 / 4 * (0.8**2 + 4 * 0.2**2)) / 15, rel=0.1)


def test_a_row_of_the_study_holds_the_truth_and_passes_alone_do_not() -> None:
    """300 intervals of three trainings, which vary as much as the passes: 93 to 97 % within 2.6 standard errors."""
    row = interval_study.row_of(interval_study.LAYOUTS[0], interval_study.PARTS[3], seeds=3, tests=300, resamples=200)
    both, alone, error = (float(cell.rstrip("%")) for cell in row[3:])
    assert 93 - 3.3 < both < 97 + 2.6
    assert alone < 90
    assert 0.8 < error < 1.2  # standard error that the intervals say, over the true one


def test_the_study_prints_its_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interval_study, "LAYOUTS", interval_study.LAYOUTS[1:2])
    assert interval_study.main(["--tests", "3", "--seeds", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[1] for row in rows[1:]] == [name for name, _ in interval_study.PARTS]


def test_the_error_of_passes_and_trainings_is_that_of_variance_components() -> None:
    """Mean squares by hand: of passes within people, of trainings, and of the rest within people."""
    people, passes, seeds = 6, 3, 4
    count = people * passes
    values = interval_study.drawn(np.random.default_rng(7), seeds, count, (1, 0.7, 0.5)) + 2
    found = PassBootstrap(*layout(people, passes, 1), MANY).interval(values)
    within = values.reshape(seeds, people, passes)
    of_passes = within.mean(0).var(1, ddof=1).mean() / count
    rest = within - within.mean(0) - within.mean(2, keepdims=True) + within.mean((0, 2))[:, None]
    of_one_pass = (rest**2).sum() / ((seeds - 1) * people * (passes - 1)) / (count * seeds)
    of_seeds = values.mean(1).var(ddof=1) / seeds - of_one_pass
    assert found.value == pytest.approx(values.mean())
    assert found.seed_error == pytest.approx(math.sqrt(of_seeds), rel=0.02)
    assert found.standard_error == pytest.approx(math.sqrt(of_passes + of_seeds), rel=0.02)
    freedom = (of_passes + of_seeds) ** 2 / (of_passes**2 / (count - people) + of_seeds**2 / (seeds - 1))
    assert found.freedom == pytest.approx(freedom, rel=0.03)
    quantile = student_quantile(found.freedom)
    expected = quantile * found.standard_error
    assert (found.value - found.low, found.high - found.value) == pytest.approx((expected, expected), rel=0.06)
    assert found.smallest == pytest.approx((quantile + student_quantile(found.freedom, 0.8)) * found.standard_error)
    assert (found.seeds, found.passes, found.windows) == (seeds, count, count)


def test_trainings_that_answer_alike_leave_the_interval_of_the_passes() -> None:
    people, numbers = layout(3, 4, 4)
    right = (np.random.default_rng(5).random(48) < 0.6).astype(float)
    bootstrap = PassBootstrap(people, numbers)
    one, three = bootstrap.interval(right), bootstrap.interval(np.stack([right] * 3))
    assert (three.low, three.high, three.standard_error, three.smallest) == (
        one.low,
        one.high,
        one.standard_error,
        one.smallest,
    )
    assert (one.seeds, three.seeds, three.seed_error, three.freedom) == (1, 3, 0, 12 - 3)
    half = np.tile([0.0, 0, 1, 1], 12)  # trainings that answer other windows of each pass, and as many
    assert bootstrap.interval(np.stack([half, 1 - half])).standard_error == 0


def test_trainings_alone_have_the_interval_of_student() -> None:
    """No pass differs from another: mean and t_2 * s / sqrt(3) of three numbers."""
    values = np.array([0.1, 0.2, 0.6])
    found = PassBootstrap(*layout(5, 2, 3)).interval(np.repeat(values[:, None], 30, 1))
    error = values.std(ddof=1) / math.sqrt(3)
    assert (found.value, found.standard_error, found.freedom) == pytest.approx((0.3, error, 2))
    assert (found.low, found.high) == pytest.approx((0.3 - 4.303 * error, 0.3 + 4.303 * error), rel=1e-3)


def test_one_training_gives_no_verdict() -> None:
    people, numbers = layout(10, 4, 10)
    found = PassBootstrap(people, numbers).interval(np.where(numbers % 2, 0.3, 0.29))
    assert found.low > 0
    assert conclude(found).outcome == NO_VERDICT
    assert conclude(replace(found, seeds=2)).outcome == HELPS


def test_the_seed_alone_decides_the_draws() -> None:
    people, numbers = layout(2, 6, 3)
    right = np.random.default_rng(3).random(36)
    first, again, other = (PassBootstrap(people, numbers, 100, seed).interval(right) for seed in (0, 0, 1))
    assert first == again
    assert first.low != other.low


def test_a_pass_of_two_people_is_refused() -> None:
    with pytest.raises(ValueError, match="two people"):
        PassBootstrap(np.array([0, 1]), np.array([5, 5]))


@pytest.mark.parametrize(
    ("value", "error", "outcome", "enough"),
    [
        (0.05, 0.01, HELPS, True),
        (0.02, 0.005, HELPS, False),
        (0.03, 0.0103, HELPS, True),  # the data can show 2.9 points
        (-0.02, 0.005, HURTS, False),
        (0.005, 0.01, TOO_LITTLE, False),
        (0.04, 0.03, NO_VERDICT, False),
        (0.10, 0.04, NO_VERDICT, False),  # above 0, but such data often show too much: 11 points are what it shows
        (0.30, 0.04, HELPS, True),
        (-0.30, 0.04, HURTS, False),
        (0.02, 0.0105, NO_VERDICT, False),  # such data shows 3 points, and up to 4 are possible
        (-0.04, 0.03, TOO_LITTLE, False),  # too few passes to show 3 points, but 1.9 are the most that is possible
        (-0.10, 0.04, TOO_LITTLE, False),
    ],
)
def test_what_a_difference_means(value: float, error: float, outcome: str, enough: bool) -> None:
    found = conclude(Interval(value, value - 1.96 * error, value + 1.96 * error, error, 100, 10, 3), wanted=0.03)
    assert (found.outcome, found.is_enough) == (outcome, enough)
    assert found.difference.smallest == pytest.approx(2.8 * error, rel=1e-3)


@pytest.mark.parametrize(("high", "outcome"), [(0.18, TOO_LITTLE), (0.2, NO_VERDICT), (0.22, NO_VERDICT)])
def test_a_gain_that_is_possible_is_not_ruled_out(high: float, outcome: str) -> None:
    assert conclude(Interval(0.08, -0.02, high, 0.05, 500, 20, 3), 0.2).outcome == outcome


def test_a_gain_of_what_was_asked_for_is_hardly_ever_denied() -> None:
    """The true gain is the wanted one: intervals end below it in 2.5 %, here at most three standard errors more."""
    people, passes = layout(31, 2, 1)
    bootstrap, rng = PassBootstrap(people, passes, 300), np.random.default_rng(3)
    deviations = np.sqrt(np.array([0.5, 0.2, 0.3]) * [62, 3, 62 * 3]) * 0.03 / 2.9  # the data just shows 3 points
    verdicts = [conclude(bootstrap.interval(0.03 + interval_study.drawn(rng, 3, 62, deviations))) for _ in range(400)]
    denied = [one for one in verdicts if one.outcome == TOO_LITTLE]
    assert all(one.difference.high < 0.03 for one in denied)
    assert len(denied) / 400 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 400)
    assert sum(one.outcome == HELPS for one in verdicts) > 200  # 80 % where the data can show it


def test_an_interval_of_another_level_reaches_as_far_as_students_quantile() -> None:
    """Quantiles of tables: 1.960 and 2.576 of a normal distribution, 2.228 and 3.169 with ten degrees of freedom."""
    assert [level_of(number) for number in (1, 5, 10)] == pytest.approx([0.95, 0.99, 0.995])
    for freedom, quantiles in ((math.inf, (1.960, 2.576)), (10, (2.228, 3.169))):
        low, high = 0.05 - quantiles[0] * 0.01, 0.05 + 2 * quantiles[0] * 0.01  # twice as far above
        found = Interval(0.05, low, high, 0.01, 9, 9, 3, freedom=freedom)
        wide = found.at(level_of(5))
        ends = 0.05 - quantiles[1] * 0.01, 0.05 + 2 * quantiles[1] * 0.01
        assert (wide.low, wide.high) == pytest.approx(ends, abs=2e-5)
        assert wide.smallest - found.smallest == pytest.approx((quantiles[1] - quantiles[0]) * 0.01, abs=2e-5)
        assert found.at(level_of(1)) is found
    endless = Interval(0.1, -math.inf, math.inf, math.inf, 9, 1, 3).at(0.99)
    assert (endless.low, endless.high, endless.smallest) == (-math.inf, math.inf, math.inf)


def test_of_several_verdicts_none_is_wrong_in_95_percent_of_calls() -> None:
    """Nothing helps: 1 - 0.95^8 = 34 % of calls with eight verdicts would find something, each at 95 %."""
    values = 0.005 * np.random.default_rng(0).standard_normal((1000, 8))

    def wrong(verdicts: int) -> float:
        def is_wrong(value: float) -> bool:
            found = Interval(value, value - 1.96 * 0.005, value + 1.96 * 0.005, 0.005, 100, 50, 3)
            return conclude(found, verdicts=verdicts).outcome in (HELPS, HURTS)

        return float(np.mean([any(map(is_wrong, call)) for call in values.tolist()]))

    assert wrong(1) == pytest.approx(1 - 0.95**8, abs=0.045)  # three standard errors
    assert wrong(8) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    one, five = (conclude(Interval(0.03, 0.0098, 0.0502, 0.0103, 100, 50, 3), verdicts=number) for number in (1, 5))
    assert (one.outcome, five.outcome, five.verdicts) == (HELPS, NO_VERDICT, 5)  # 3.5 points are shown now
    assert five.difference.level == pytest.approx(0.99)
