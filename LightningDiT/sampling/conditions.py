"""The second label of the images of a run: from what a person names to the numbers that the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from LightningDiT.data.labels import Labels, is_one, listed
from LightningDiT.errors import LightningDiTError

#: One for each image or one for all, by number or name; None is no condition.
Conditions: TypeAlias = "Sequence[int | str | None] | int | str | None"
NO_CONDITION = "none"  # how a command line names it, unless a condition is called so
NAME_CONDITIONS = "name a condition for each image, or train with train.label_dropout: 0.1"


def numbers_of_conditions(
    labels: Labels | None, conditions: Conditions, count: int, null_failure: str = ""
) -> list[int | None] | None:
    """Return the number of the condition of each of `count` images, None for a model without a second label.

    Args:
        labels: the model's conditions.
        null_failure: why the null condition means nothing; empty if it was trained.

    Raises:
        LightningDiTError: a condition is unknown, their number is wrong, the model has none, or an image is to have
            none and the null condition was never trained.
    """
    if labels is None:
        if conditions is not None:
            raise LightningDiTError("conditions are given, and the model has none", "leave them out")
        return None
    each = listed(conditions, "conditions")
    if is_one(conditions):
        each *= count
    if len(each) != count:
        raise LightningDiTError(
            f"{len(each)} conditions are given for {count} images", "give one for each image, or one for all"
        )
    numbers = [None if _is_none(one, labels) else labels.number(one) for one in each]
    if None in numbers and null_failure:
        raise LightningDiTError(f"{null_failure}; images without a condition need it", NAME_CONDITIONS)
    return numbers


def _is_none(one: int | str | None, labels: Labels) -> bool:
    return one is None or (one == NO_CONDITION and NO_CONDITION not in (labels.names or ()))


def condition_text(labels: Labels, numbers: Sequence[int | None], given: bool = True) -> str:
    """Return the conditions of a run in one line, each once.

    Args:
        given: whether a person named them; else the line says how to.
    """
    if not given:
        return f"{NO_CONDITION}; --conditions chooses of {labels.listing(range(labels.count))}"
    known = [number for number in numbers if number is not None]
    return "; ".join(filter(None, [labels.listing(known), NO_CONDITION if None in numbers else ""]))
