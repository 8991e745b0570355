"""From trials to what a report says: accuracies, differences to the row without generated images, and the verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from LightningDiT.verdict.intervals import RESAMPLES, WANTED, Interval, PassBootstrap, Verdict, conclude
from LightningDiT.verdict.rows import BASE, REAL, ROWS
from LightningDiT.verdict.trials import Trial

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Tested:
    """Every test window of all folds, each once, and which rows were right about it.

    Attributes:
        people, conditions, passes: (N,).
        right: by row, (S, N): 1 where the training with that seed was right.
        trials: by row, those that it comes from.
    """

    people: Numbers
    conditions: Numbers
    passes: Numbers
    right: Mapping[str, Floats]
    trials: Mapping[str, Sequence[Trial]]


def pooled(trials: Sequence[Trial]) -> Tested:
    """Return the trials of one scenario and one number of images, with their folds joined.

    Raises:
        ValueError: rows or seeds were tested on other windows than the rest, or a pass was tested in two folds.
    """
    by_row: dict[str, dict[int, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in sorted(trials, key=lambda trial: (trial.fold, trial.seed)):
        by_row[trial.row][trial.seed].append(trial)
    first = next(iter(next(iter(by_row.values())).values()))
    for own in by_row.values():
        for folds in own.values():
            if [trial.windows for trial in folds] != [trial.windows for trial in first]:
                raise ValueError("rows were tested on different windows")
    tested = [number for trial in first for number in set(trial.passes)]
    if len(tested) != len(set(tested)):
        raise ValueError("a pass was tested in two folds")

    def joined(name: str, folds: Sequence[Trial]) -> Numbers:
        return np.concatenate([np.asarray(getattr(trial, name), np.int64) for trial in folds])

    people = joined("people", first)
    right = {
        row: np.stack([(joined("predicted", folds) == people).astype(np.float64) for folds in own.values()])
        for row, own in by_row.items()
    }
    listed = {row: [trial for folds in own.values() for trial in folds] for row, own in by_row.items()}
    return Tested(people, joined("conditions", first), joined("passes", first), right, listed)


@dataclass(frozen=True)
class RowResult:
    """One row.

    Attributes:
        row: name in `rows.ROWS`.
        accuracy: mean over seeds.
        seeds: accuracy of each seed.
        people, conditions: accuracy by number.
        difference: to the row `base`, seed by seed; None for that row itself.
        real, generated, validation: windows that a training used, mean over folds.
        valid_accuracy: mean over folds and seeds; None without validation windows.
    """

    row: str
    accuracy: Interval
    seeds: tuple[float, ...]
    people: Mapping[int, Interval]
    conditions: Mapping[int, Interval]
    base: str
    difference: Interval | None
    real: float
    generated: float
    validation: float
    valid_accuracy: float | None


@dataclass(frozen=True)
class Results:
    """One scenario at one number of images a person.

    Attributes:
        rows: in the order of the trials.
        judged: the row of the verdict, see `judged_row`; None without a row of real and generated images.
        verdict: on its difference, whose interval is wider where several verdicts are asked for; None without it.
        joined: see `PassBootstrap`.
    """

    scenario: str
    images: int | None
    rows: tuple[RowResult, ...]
    judged: str | None
    verdict: Verdict | None
    joined: int

    def __getitem__(self, row: str) -> RowResult:
        return next(result for result in self.rows if result.row == row)


def summarise(
    trials: Sequence[Trial], wanted: float = WANTED, resamples: int = RESAMPLES, seed: int = 0, verdicts: int = 1
) -> list[Results]:
    """Return the results of each scenario and number of images, in the order of the trials.

    Args:
        verdicts: how many are asked for together, see `conclude`.
    """
    groups: dict[tuple[str, int | None], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.scenario, trial.images].append(trial)
    return [_results(*key, own, (wanted, verdicts), resamples, seed) for key, own in groups.items()]


def _results(
    scenario: str, images: int | None, trials: Sequence[Trial], asked: tuple[float, int], resamples: int, seed: int
) -> Results:
    """Return the results of one group; `asked` are the wanted difference and the number of verdicts."""
    tested = pooled(trials)
    bootstrap = PassBootstrap(tested.people, tested.passes, resamples, seed)
    rows = tuple(_row_result(row, tested, bootstrap, resamples, seed) for row in tested.right)
    judged = judged_row(rows)
    difference = next((row.difference for row in rows if row.row == judged), None)
    verdict = conclude(difference, *asked) if difference else None
    return Results(scenario, images, rows, judged, verdict, bootstrap.joined)


def _row_result(row: str, tested: Tested, bootstrap: PassBootstrap, resamples: int, seed: int) -> RowResult:
    right, trials, base = tested.right[row], tested.trials[row], base_of(row, tested.right)
    checked = [trial.valid_accuracy for trial in trials if trial.valid_accuracy is not None]

    def by(groups: Numbers) -> dict[int, Interval]:
        found = {}
        for group in np.unique(groups).tolist():
            own = groups == group
            part = PassBootstrap(tested.people[own], tested.passes[own], resamples, seed)
            found[group] = part.interval(right[:, own]).of_share()
        return found

    return RowResult(
        row=row,
        accuracy=bootstrap.interval(right).of_share(),
        seeds=tuple(right.mean(1).tolist()),
        people=by(tested.people),
        conditions=by(tested.conditions),
        base=base,
        difference=bootstrap.interval(right - tested.right[base]) if base != row else None,
        real=float(np.mean([trial.real for trial in trials])),
        generated=float(np.mean([trial.generated for trial in trials])),
        validation=float(np.mean([trial.validation for trial in trials])),
        valid_accuracy=float(np.mean(checked)) if checked else None,
    )


def base_of(row: str, there: Mapping[str, object]) -> str:
    """Return the row that a row is compared with: real images, augmented in the same way, as far as it is there."""
    wanted = BASE if ROWS[row].augmented else REAL
    others = [name for name in (wanted, REAL) if name in there and row != REAL]
    return others[1] if row == BASE and len(others) > 1 else (others or [row])[0]


def judged_row(rows: Sequence[RowResult]) -> str | None:
    """Return the row of real and generated images that the verdict is about.

    It is the one with the best mean accuracy on validation windows, so that the test windows choose nothing and one
    difference is tested of each network and number of images, not one for each amount; of equal ones, and without
    validation windows, the smallest amount.
    Filtered rows are reported apart.
    """
    mixed = [row for row in rows if ROWS[row.row].generated and ROWS[row.row].real and not ROWS[row.row].filtered]
    augmented = [row for row in mixed if ROWS[row.row].augmented] or mixed
    ranked = sorted(augmented, key=lambda row: (-(row.valid_accuracy or 0.0), ROWS[row.row].generated))
    return ranked[0].row if ranked else None
