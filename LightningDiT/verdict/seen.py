"""What the networks of a cell of step 6 see of a split, and the windows that they are asked for."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from LightningDiT.data.labels import CONDITION_NAMES, names_of_model
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import open_regular
from LightningDiT.radar.level_images import Windows, listed_windows
from LightningDiT.radar.split import Split
from LightningDiT.verdict.rows import Scenario, scenario_of, spread, subset

HEADS = ("class", "class,condition")  # first lines of `labels_text`


@dataclass(frozen=True)
class Seen:
    """The windows that the networks of a cell see, without pixels.

    Attributes:
        training: that they are trained on; validation: that their weights are chosen by, maybe none.
        tested: that step 7 tests on.
        scenario: what they do not see.
    """

    training: Windows
    validation: Windows
    tested: Windows
    scenario: Scenario


def seen_of(split: Split, unseen: str | None, fold: int, images: int | None) -> Seen:
    """Return what the networks of a cell see.

    Args:
        unseen: see `rows.scenario_of`.
        images: of a person; None: all.

    Raises:
        LightningDiTError: there is nothing that could be unseen, or nothing else is left to train on or to test.
    """
    training, validation, test = (listed_windows(split, part, fold) for part in ("training", "validation", "test"))
    scenario = scenario_of(unseen, training, test)
    seen, tested = scenario.seen(training), scenario.tested(test)
    if not len(seen.people) or not len(tested.people):
        raise LightningDiTError(
            f"fold {fold} has no {'test' if len(seen.people) else 'training'} windows of the scenario"
            f" {scenario.name!r}",
            "choose other --folds or another --unseen",
        )
    return Seen(subset(seen, spread(seen, images)), scenario.seen(validation), tested, scenario)


def known_conditions(seen: Seen, starts: Sequence[str | None]) -> set[int]:
    """Return the conditions that all networks of a cell learn: by its windows, or by the weights that they start from.

    The label of another one has no meaning.

    Args:
        starts: weights of each network; None: random ones.
    """
    names = seen.training.condition_names or ()
    known = set(range(len(names)))
    for start in starts:
        there = names_of_model(start, CONDITION_NAMES) if start else None
        known &= {number for number, name in enumerate(names) if name in (there or ())}
    return known | set(seen.training.conditions.tolist())


def labels_text(seen: Seen, times: int, known: Collection[int]) -> str:
    """Return the table of the windows to generate: `times` rounds, each with as many rows as there are real windows.

    Each row has the person and the condition of a real window. Where conditions are unseen, a person's rows have in
    turn all conditions that the person shows and the unseen ones, as far as they are in `known`: the networks take both
    labels, so they can draw people under conditions that only others show.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names, windows = seen.training.condition_names, seen.training
    text.write(f"{HEADS[bool(names)]}\n")
    people, own = windows.people.tolist(), windows.conditions.tolist()
    turns = {
        person: itertools.cycle(
            sorted({condition for one, condition in zip(people, own, strict=True) if one == person} | wanted)
        )
        for person in set(people)
        if (wanted := {condition for one, condition in seen.scenario.held_out if one == person and condition in known})
    }
    for _ in range(times):
        for person, condition in zip(people, own, strict=True):
            asked = next(turns[person]) if person in turns else condition
            table.writerow([windows.class_names[person], *([names[asked]] if names else [])])
    return text.getvalue()


def is_labels(path: Path) -> bool:
    """Return whether a file begins as `labels_text` does."""
    try:
        with open_regular(path) as file:
            return file.readline(100) in [f"{head}\n".encode() for head in HEADS]
    except OSError:
        return False
