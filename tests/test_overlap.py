"""The overlap of windows: shift, passes and leaks of a texture that scrolls by a known stride."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from LightningDiT.radar.arrays import Levels
from LightningDiT.radar.layouts import Window
from LightningDiT.radar.overlap import (
    Overlap,
    Passes,
    Shared,
    find_passes,
    grouped,
    high_passed,
    leaked,
    measure,
    number_unit,
    places,
    random_leak,
    shared_across,
    shift_curve,
)
from tests.walkers import NATIVE, SIDE, STRIDE, enlarged, scroll

Data = dict[Window, Levels]


def recording(person: str, numbers: list[int], seed: int, unit: int = 1, backwards: bool = False) -> Data:
    """Return windows of one long pass, of which those with `numbers` are there."""
    levels = scroll(seed, NATIVE + STRIDE * max(numbers))
    if backwards:
        levels = levels[:, ::-1]
    last = levels.shape[1] - NATIVE
    found = {}
    for number in numbers:
        start = last - number * STRIDE if backwards else number * STRIDE
        window = Window(f"{person}/{number}.png", None, person, "", "r", number * unit)
        found[window] = enlarged(np.ascontiguousarray(levels[:, start : start + NATIVE]))
    return found


def measured(data: Data) -> Overlap:
    return measure(list(data), SIDE, data.get)


@pytest.mark.parametrize("numbers", [list(range(8)), [0, 2, 5, 7, 10, 12, 15], [0, 1, 3, 4, 7, 9]])
@pytest.mark.parametrize(("unit", "backwards"), [(1, False), (63, False), (1, True)])
def test_the_stride_is_found_whatever_windows_are_missing(numbers: list[int], unit: int, backwards: bool) -> None:
    data = {**recording("a", numbers, 1, unit, backwards), **recording("b", numbers, 2, unit, backwards)}
    overlap = measured(data)
    assert overlap.unit == unit
    assert overlap.backwards == backwards
    assert overlap.stride == pytest.approx(STRIDE * SIDE / NATIVE, abs=1)
    assert overlap.reach == NATIVE // STRIDE - 1
    assert all(value > 0.9 for at, value in overlap.correlations.items() if at <= overlap.reach)
    assert all(value < 0.4 for at, value in overlap.correlations.items() if at > overlap.reach)


def test_windows_without_common_pixels_are_apart() -> None:
    """Each is of a walk of its own, with the same ridge."""
    data = {}
    for number in range(12):
        data |= {
            replace(window, number=number, file=str(number)): levels
            for window, levels in recording("a", [0], number).items()
        }
    overlap = measured(data)
    assert overlap.stride is None
    assert overlap.reach == 0
    assert overlap.pairs == sum(12 - distance for distance in range(1, 12))
    assert shared_across(list(data), overlap, data.get) == []


def test_without_neighbours_nothing_was_compared() -> None:
    """A recording for each window: what was not measured is no finding."""
    data = {replace(w, recording=str(w.number)): v for w, v in recording("a", list(range(8)), 1).items()}
    assert measured(data).pairs == 0


def test_the_published_stride_reaches_three_windows() -> None:
    assert [Overlap(256, 1, stride).reach for stride in (62.5, 63, 64, 128, 250, 256)] == [3, 3, 3, 1, 0, 0]


def test_a_shift_is_the_peak_of_its_curve() -> None:
    levels = scroll(3, 200)
    first, second = (high_passed(np.ascontiguousarray(levels[:, at : at + 128])) for at in (0, 37))
    curve = shift_curve(first, second)
    assert int(curve.argmax()) == 37
    assert curve[37] > 0.97


def test_a_gap_is_a_boundary_only_beyond_the_reach_and_without_common_pixels() -> None:
    """Numbers 0 to 3, a gap that windows reach over, a gap with other pixels, and one with the same pixels."""
    first = recording("a", [0, 1, 2, 3, 6, 7], 1)
    second = {replace(w, number=w.number + 20, file=f"2{w.file}"): v for w, v in recording("a", [0, 1, 2], 2).items()}
    continued = {}
    for window, levels in recording("a", [0, 1, 2, 3, 4, 5], 3).items():
        shift = 40 if window.number < 3 else 50  # the running number jumps, the walk goes on
        continued[replace(window, number=window.number + shift, file=f"3{window.file}")] = levels
    data = {**first, **second, **continued, **recording("b", list(range(6)), 4)}
    overlap = measured(data)
    assert overlap.reach == 3
    passes = find_passes(list(data), overlap, data.get)
    numbers = [passes.numbers[window.name] for window in data if window.person == "a"]
    assert numbers == [1] * 6 + [2] * 3 + [3] * 6
    assert (passes.small, passes.joined) == (1, 1)


def test_a_gap_is_bridged_where_time_runs_to_the_left() -> None:
    """The running number jumps by ten, and the walk goes on."""
    data = recording("b", list(range(6)), 4, backwards=True)
    for window, levels in recording("a", list(range(6)), 3, backwards=True).items():
        data[replace(window, number=window.number + 10 * (window.number > 2))] = levels
    overlap = measured(data)
    assert overlap.backwards
    passes = find_passes(list(data), overlap, data.get)
    assert (passes.joined, passes.small, set(passes.numbers.values())) == (1, 0, {1})


@pytest.mark.parametrize("stride", [None, 63.0])
def test_gaps_are_counted_in_units_of_the_running_number(stride: float | None) -> None:
    """One unit is no gap, and six reach further than windows do."""
    windows = [Window(str(n), None, "a", "", "", 63 * n) for n in (0, 1, 2, 3, 9, 10)]
    passes = find_passes(windows, Overlap(256, 63, stride), lambda window: None)
    assert list(passes.numbers.values()) == [1] * 4 + [2] * 2
    assert passes.small == 0


def test_passes_of_a_person_are_numbered_across_recordings() -> None:
    windows = [Window(f"{key}{n}", None, "a", key, "r", n) for key in "AB" for n in range(3)]
    passes = find_passes(windows, Overlap(256, 1, 63.0), lambda window: None)
    assert list(passes.numbers.values()) == [1] * 3 + [2] * 3


def renamed(data: Data, key: str, value: Callable[[int], str]) -> Data:
    """Return windows whose condition or recording depends on their number."""
    return {replace(one, **{key: value(one.number)}): levels for one, levels in data.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["condition", "recording"])
def test_one_walk_in_two_conditions_or_recordings_is_found(key: str) -> None:
    """Every third window of two people is in another one, as by a split at random; two walks stay two.

    Of recordings two pairs of each person are compared: of the nearest numbers, and the last with the first.
    """
    walks = recording("a", list(range(24)), 1) | recording("b", list(range(24)), 2)
    data = renamed(walks, key, lambda number: "test" if number % 3 == 1 else "train")
    [found] = shared_across(list(data), measured(data), data.get)
    assert found.conditions == (("test", "train") if key == "condition" else ("", ""))
    assert (found.found, found.compared) == ((12, 12) if key == "condition" else (2, 4))
    assert {found.first.partition("/")[0], found.second.partition("/")[0]} in ({"a"}, {"b"})
    single = renamed(walks, "recording", str)  # each window a recording of its own: nothing to measure
    assert [one.conditions for one in shared_across(list(single), measured(single), single.get)] == [("", "")]
    apart = renamed(recording("a", list(range(12)), 1) | recording("b", list(range(12)), 2), key, lambda _: "x")
    other = renamed(recording("a", list(range(12)), 3) | recording("b", list(range(12)), 4), key, lambda _: "y")
    both = apart | {replace(one, file=f"y/{one.file}"): levels for one, levels in other.items()}
    assert shared_across(list(both), measured(both), both.get) == []


def test_a_window_in_two_conditions_is_found_whatever_its_colours() -> None:
    data = recording("a", list(range(8)), 1) | recording("b", list(range(8)), 2)
    copies = {replace(one, condition="x", file=f"x/{one.file}"): levels**0.8 for one, levels in data.items()}
    both = data | copies
    assert [one.conditions for one in shared_across(list(both), measured(both), both.get)] == [("", "x")]
    assert isinstance(shared_across(list(both), Overlap(SIDE, 1), both.get)[0], Shared)


def test_gaps_that_pixels_bridge_are_closed() -> None:
    """Windows reach 3 numbers: the gap of 20 within pass 1 counts as one step, that before pass 2 stays."""
    overlap = Overlap(256, 1, 63.0)
    assert places([1, 2, 4, 24, 25, 60], [1, 1, 1, 1, 1, 2], overlap) == [1, 2, 4, 5, 6, 41]
    assert places([7, 70, 1330, 1393], [1, 1, 1, 1], replace(overlap, unit=63)) == [7, 70, 133, 196]
    assert places([], [], overlap) == []


def test_a_leak_across_a_gap_that_pixels_bridge_is_counted() -> None:
    """Numbers 1 to 4 train, 24 to 27 are tested; of these the first three are within 3 steps of number 4."""
    windows = [Window(str(n), None, "a", "", "", n) for n in (1, 2, 3, 4, 24, 25, 26, 27)]
    parts, overlap = ["training"] * 4 + ["test"] * 4, Overlap(256, 1, 63.0)
    for passes, expected in ((None, 0), ([1] * 8, 3), ([1] * 4 + [2] * 4, 0)):
        known = Passes({w.name: at for w, at in zip(windows, passes, strict=True)}, 1, 0) if passes else None
        assert leaked(parts, windows, overlap, known) == (expected, 4)


def test_windows_share_pixels_by_units_of_the_running_number() -> None:
    """Up to three units apart; of the tested windows 3 and 4 the first one is that near to number 0."""
    overlap = Overlap(256, 63, 63.0)
    assert [overlap.shares(0, 63 * n) for n in (1, 3, 4)] == [True, True, False]
    windows = [Window(str(n), None, "a", "", "", 63 * n) for n in range(5)]
    assert leaked(["training", "guard", "guard", "test", "test"], windows, overlap) == (1, 2)


def test_leaks_are_counted_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    numbers = np.flatnonzero(rng.uniform(size=120) < 0.7)
    windows = [Window(f"{p}/{n}", None, p, "", "", int(n)) for p in "ab" for n in numbers]
    overlap = Overlap(256, 1, 63.0)
    parts = list(rng.choice(["training", "test", "validation"], len(windows)))
    expected = sum(
        part == "test"
        and any(
            other == "training" and two.person == one.person and abs(two.number - one.number) <= 3
            for other, two in zip(parts, windows, strict=True)
        )
        for part, one in zip(parts, windows, strict=True)
    )
    assert leaked(parts, windows, overlap) == (expected, parts.count("test"))


def test_a_random_split_leaks_as_many_as_chance_says() -> None:
    """In a long pass a window has 6 neighbours that share pixels: 1 - (1 - share)^6 of the test leak."""
    windows = [Window(str(n), None, "a", "", "", n) for n in range(4000)]
    for share in (0.5, 0.2):
        assert random_leak(windows, Overlap(256, 1, 63.0), share) == pytest.approx(1 - (1 - share) ** 6, abs=0.01)


def test_the_unit_is_the_greatest_common_step() -> None:
    windows = [Window(str(n), None, "a", "", "", n) for n in (7, 133, 196, 448)]
    assert number_unit(grouped(windows)) == 63
    assert number_unit(grouped(windows[:1])) == 1
