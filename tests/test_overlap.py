"""The overlap of windows: shift, passes and leaks of a texture that scrolls by a known stride."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from LightningDiT.radar.arrays import Levels
from LightningDiT.radar.layouts import Window
from LightningDiT.radar.overlap import (
    Overlap,
    find_passes,
    grouped,
    high_passed,
    leaked,
    measure,
    number_unit,
    random_leak,
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
