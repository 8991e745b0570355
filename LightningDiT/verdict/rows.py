"""The rows that are compared, the real images that a row may see, and which windows train and which are tested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.level_images import Windows


@dataclass(frozen=True)
class Row:
    """What a classifier is trained on.

    Attributes:
        title, chinese: in reports.
        real: whether the real images are among it.
        augmented: classical augmentation of every image, real or generated.
        generated: how many generated images for each real one of a person.
        filtered: of these, only such as pass the filter.
        speckled: their speckle is put back, see `speckle`.
    """

    title: str
    chinese: str
    real: bool = True
    augmented: bool = True
    generated: int = 0
    filtered: bool = False
    speckled: bool = False


REAL, BASE, ALONE = "real", "augmented", "alone"
FILTERED, PLAIN, SPECKLED = "filtered-", "plain-", "speckle-"  # first parts of names
#: By name. With generated images everything is augmented as in `BASE`, so that the difference to it is theirs alone;
#: the plain rows differ from `REAL` in the same way.
ROWS = {
    REAL: Row("real", "真实", augmented=False),
    BASE: Row("real + classical augmentation", "真实 + 传统增强"),
    **{
        f"{name}{times}x": Row(
            f"real + generated {times}x{english}",
            f"真实 + 生成 {times} 倍{chinese}",
            augmented=name != PLAIN,
            generated=times,
            filtered=name == FILTERED,
            speckled=name == SPECKLED,
        )
        for name, english, chinese in (
            ("", "", ""),
            (FILTERED, ", filtered", "，经筛选"),
            (PLAIN, ", no augmentation", "，无增强"),
            (SPECKLED, ", speckle put back", "，补回散斑"),
        )
        for times in (1, 2, 4)
    },
    ALONE: Row("generated alone, 4x", "仅生成数据，4 倍", real=False, generated=4),
}
USUAL = (REAL, BASE, "1x", "2x", "4x", ALONE)


def spread(windows: Windows, images: int | None) -> Tensor:
    """Return the rows (K,) of `windows` that make `images` a person: evenly from the passes, evenly spaced in each.

    A person with fewer windows keeps all of them. Classifier and generator of a row both see exactly these.

    Args:
        images: None: all.
    """
    if images is None or not len(windows.people):
        return torch.arange(len(windows.people))
    chosen = []
    for person in windows.people.unique().tolist():
        own = windows.people == person
        passes = [torch.nonzero(own & (windows.passes == one))[:, 0] for one in windows.passes[own].unique().tolist()]
        for rows, count in zip(passes, _shares([len(rows) for rows in passes], images), strict=True):
            places = ((torch.arange(count) + 0.5) * len(rows) / max(1, count)).long()
            chosen.append(rows[places])
    return torch.cat(chosen).sort().values


def _shares(sizes: list[int], wanted: int) -> list[int]:
    """Return how many to take of each group: as equal as the sizes allow, the first ones more where it does not divide.

    sum(shares) is the smaller one of `wanted` and sum(sizes).
    """
    shares = [0] * len(sizes)
    left = min(wanted, sum(sizes))
    while left:
        for at, size in enumerate(sizes):
            if left and shares[at] < size:
                shares[at] += 1
                left -= 1
    return shares


@dataclass(frozen=True)
class Generated:
    """Generated windows.

    Attributes:
        pixels: (N, 1, H, W) float32 in [-1, 1].
        people, conditions: (N,) as in `Windows`; conditions are zeros if there is one.
    """

    pixels: Tensor
    people: Tensor
    conditions: Tensor

    def __getitem__(self, rows: Tensor) -> Generated:
        return Generated(self.pixels[rows], self.people[rows], self.conditions[rows])

    def __len__(self) -> int:
        return len(self.people)


def taken(generated: Generated, people: Tensor, times: int) -> Tensor:
    """Return the rows (K,) of the generated windows that join real windows of `people` (N,), `times` for each.

    The first ones of each person, with the conditions in turn, so the windows for 1 are among the windows for 2.
    There are fewer where fewer were generated.
    """
    rows = []
    for person, count in zip(*(part.tolist() for part in people.unique(return_counts=True)), strict=True):
        own = torch.nonzero(generated.people == person)[:, 0]
        conditions = generated.conditions[own]
        turn = torch.zeros(len(own), dtype=torch.long)
        for condition in conditions.unique().tolist():
            turn[conditions == condition] = torch.arange(int((conditions == condition).sum()))
        order = torch.argsort(turn, stable=True)
        rows.append(own[order[: times * count]])
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)


# ---- which windows train and which are tested


PAIRS = "pairs"  # in place of the name of an unseen condition


@dataclass(frozen=True)
class Scenario:
    """Pairs of person and condition that nothing but the test sees: neither classifier, nor validation, nor generator.

    Attributes:
        name: for reports and files.
        held_out: the pairs; without any, all test windows are tested.
    """

    name: str = "usual"
    held_out: frozenset[tuple[int, int]] = frozenset()

    def _held(self, windows: Windows) -> Tensor:
        pairs = zip(windows.people.tolist(), windows.conditions.tolist(), strict=True)
        return torch.tensor([pair in self.held_out for pair in pairs], dtype=torch.bool)

    def seen(self, windows: Windows) -> Windows:
        """Return the windows that may train or validate."""
        return subset(windows, torch.nonzero(~self._held(windows))[:, 0])

    def tested(self, windows: Windows) -> Windows:
        """Return the windows that are tested; they are of test passes in any case."""
        return subset(windows, torch.nonzero(self._held(windows))[:, 0]) if self.held_out else windows


def subset(windows: Windows, rows: Tensor) -> Windows:
    """Return some of the windows."""
    parts = (windows.pixels, windows.people, windows.conditions, windows.passes, windows.rows)
    return Windows(*(part[rows] for part in parts), windows.class_names, windows.condition_names, windows.db_range)


def scenario_of(unseen: str | None, training: Windows, test: Windows) -> Scenario:
    """Return what nothing but the test of a fold sees.

    Args:
        unseen: `PAIRS`, or the name of a condition; None: everything is seen.
        training, test: of the fold.

    Raises:
        LightningDiTError: see `unseen_condition` and `unseen_pairs`.
    """
    if unseen is None:
        return Scenario()
    return unseen_pairs(training, test) if unseen == PAIRS else unseen_condition(test, unseen)


def unseen_condition(windows: Windows, condition: str) -> Scenario:
    """Return the scenario in which nobody's windows of a condition are seen.

    Raises:
        LightningDiTError: there is no such condition, or one alone.
    """
    names = windows.condition_names or ()
    if not names:
        raise LightningDiTError(
            f"condition {condition!r} is to be unseen; the data has one condition alone", "omit --unseen"
        )
    if condition not in names:
        raise LightningDiTError(
            f"condition {condition!r} is to be unseen; there are {', '.join(names)}", "choose one of these"
        )
    at = names.index(condition)
    return Scenario(f"unseen {condition}", frozenset((person, at) for person in range(len(windows.class_names))))


def unseen_pairs(training: Windows, test: Windows) -> Scenario:
    """Return the scenario in which each person lacks one condition that others show.

    It is one in which the person has test windows, and has training windows of another one, and of which others keep
    training windows: what nobody shows, nothing learns. Of several such conditions person p lacks number p mod their
    count, or the next one that others keep. Other people lack none.

    Args:
        training, test: of one fold.

    Raises:
        LightningDiTError: nobody has such a condition.
    """
    trained, tested = _conditions(training), _conditions(test)
    held = set()
    for person, conditions in tested.items():
        possible = [one for one in sorted(conditions) if trained.get(person, set()) - {one}]
        for at in range(len(possible)):
            pair = person, possible[(person + at) % len(possible)]
            if any(pair[1] in shown and (one, pair[1]) not in held | {pair} for one, shown in trained.items()):
                held.add(pair)
                break
    if not held:
        raise LightningDiTError(
            "unseen pairs of person and condition are asked for, and nobody has two conditions that others have too",
            "record several people under two conditions or more",
        )
    return Scenario("unseen pairs", frozenset(held))


def _conditions(windows: Windows) -> dict[int, set[int]]:
    """Return the conditions of each person."""
    found: dict[int, set[int]] = {}
    for person, condition in zip(windows.people.tolist(), windows.conditions.tolist(), strict=True):
        found.setdefault(person, set()).add(condition)
    return found
