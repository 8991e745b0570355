"""Draws of a window against closed forms: circular shifts, added powers, exact gains, and moved Doppler lines."""

from __future__ import annotations

import numpy as np
import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.augmentation import (
    EXAMPLE,
    NAMES,
    Augmentation,
    amplified,
    augmented,
    parsed,
    scaled,
    shifted,
    vector,
    with_noise,
)
from tests.walkers import scroll

SPAN = 50.0  # dB


@pytest.fixture(scope="module")
def window() -> np.ndarray:
    return scroll(3, 40, 64) * np.float32(0.8)


def test_a_shift_that_is_undone_is_nothing_and_columns_come_in_again(window: np.ndarray) -> None:
    np.testing.assert_array_equal(shifted(shifted(window, 13), -13), window)
    np.testing.assert_array_equal(shifted(window, 1)[:, 0], window[:, -1])
    np.testing.assert_array_equal(shifted(window, 1)[:, 1:], window[:, :-1])


def test_a_gain_is_exact_in_decibels_and_ends_at_the_range(window: np.ndarray) -> None:
    inside = (window > 0.1) & (window < 0.9)
    louder = amplified(window, 5.0, SPAN)
    np.testing.assert_allclose((louder - window)[inside] * SPAN, 5.0, atol=1e-4)
    assert amplified(window, -SPAN, SPAN).max() == 0


def test_powers_add(window: np.ndarray) -> None:
    """Twice the power is 3.0103 dB more; power far below a value moves it by p / (x ln 10 / 10)."""
    own = 10 ** (window.astype(np.float64) * SPAN / 10)
    twice = with_noise(window, own, SPAN)
    np.testing.assert_allclose((twice - window) * SPAN, 10 * np.log10(2), atol=1e-4)
    two, three = np.full((1, 1), 20 / SPAN, np.float32), np.full((1, 1), 100.0 * 2)
    np.testing.assert_allclose(with_noise(two, three, SPAN) * SPAN, 10 * np.log10(300), atol=1e-4)


@pytest.mark.parametrize("zero", [None, 10.0, 40.0])
@pytest.mark.parametrize("factor", [0.9, 1.05])
def test_a_line_moves_by_the_factor_from_the_row_of_velocity_zero(factor: float, zero: float | None) -> None:
    rows = np.arange(64)
    line = np.repeat(np.exp(-(((rows - 26) / 2.0) ** 2))[:, None], 3, 1).astype(np.float32)
    found = scaled(line, factor, zero)[:, 1]
    at = float((found * rows).sum() / found.sum())
    middle = 31.5 if zero is None else zero
    assert at == pytest.approx(middle + factor * (26 - middle), abs=0.02)
    assert scaled(line, 1.0) is line


def test_draw_0_is_the_window_and_the_others_follow_from_seed_window_and_draw(window: np.ndarray) -> None:
    settings = Augmentation()
    same, told = augmented(window, settings, SPAN, 0, 5, 0)
    assert same is window
    assert told.tolist() == [0.0] * len(NAMES)
    first, again = (augmented(window, settings, SPAN, 0, 5, 3) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    for other in ((1, 5, 3), (0, 6, 3), (0, 5, 4)):
        assert not np.array_equal(augmented(window, settings, SPAN, *other)[1], first[1])


@pytest.mark.parametrize("kind", ["shift", "gain", "noise", "doppler"])
def test_what_the_vector_tells_undoes_the_draw(window: np.ndarray, kind: str) -> None:
    """Each kind alone, made again from the vector: of the noise only its level is told."""
    settings, kinds = parsed(kind), {"shift": (0, 1), "gain": (2,), "noise": (3,), "doppler": (4,)}
    for draw in range(1, 9):
        found, told = augmented(window, settings, SPAN, 0, 0, draw)
        assert {at for at in range(5) if told[at]} <= set(kinds[kind])
        if kind == "shift":
            columns = round(float(np.arctan2(told[0], 1 - told[1])) / (2 * np.pi) * window.shape[1])
            np.testing.assert_array_equal(shifted(found, -columns), window)
        elif kind == "gain":
            np.testing.assert_allclose(found, amplified(window, 6 * told[2], SPAN), atol=1e-6)
        elif kind == "doppler":
            np.testing.assert_allclose(found, scaled(window, 1.05 ** float(told[4])), atol=1e-5)
        else:
            floor = np.percentile(window, 20)
            added = 10 ** (found.astype(np.float64) * SPAN / 10) - 10 ** (window.astype(np.float64) * SPAN / 10)
            rise = 10 * np.log10(1 + added.mean() / 10 ** (floor * SPAN / 10))
            assert rise == pytest.approx(6 * told[3], abs=0.25)


def test_values_of_the_vector_lie_in_their_range_and_are_spread() -> None:
    level = np.full((8, 32), 0.5, np.float32)
    told = np.stack([augmented(level, Augmentation(), SPAN, 0, 0, draw)[1] for draw in range(1, 400)])
    low, high = told.min(0), told.max(0)
    np.testing.assert_allclose(low, [-1, 0, -1, 0, -1], atol=0.05)
    np.testing.assert_allclose(high, [1, 2, 1, 1, 1], atol=0.1)
    np.testing.assert_allclose(vector(Augmentation(), 0.25, 3.0, 1.5, 1.05), [1, 1, 0.5, 0.25, 1], atol=1e-6)


def test_nothing_reaches_the_high_end_that_was_not_there() -> None:
    """A window whose largest value is the high end gets softer, one 2 dB below it at most 2 dB louder."""
    for top in (1.0, 0.96):
        window = scroll(5, 32, 32)
        window *= np.float32(top) / window.max()
        for draw in range(1, 60):
            found, told = augmented(window, parsed("gain=6,noise=6"), SPAN, 0, 0, draw)
            assert (found >= 1).sum() <= (window >= 1).sum()
            assert 6 * told[2] <= SPAN * (1 - top) + 1e-3


def test_no_draw_is_a_mirror(window: np.ndarray) -> None:
    """Every draw is nearer to a shift of the window than to any shift of a mirrored one, in time or in Doppler."""

    def nearest(found: np.ndarray, of: np.ndarray) -> float:
        return min(float(((shifted(of, by) - found) ** 2).mean()) for by in range(of.shape[1]))

    for draw in range(1, 12):
        found, _ = augmented(window, Augmentation(), SPAN, 0, 1, draw)
        found = found + float((window - found).mean())
        assert nearest(found, window) < min(nearest(found, window[:, ::-1]), nearest(found, window[::-1]))


def test_texts_name_the_kinds_and_their_limits() -> None:
    assert parsed(EXAMPLE) == Augmentation()
    assert parsed("gain=3", 20.0) == Augmentation(False, 3.0, 0.0, 0.0, 20.0)
    for wrong in ("", "mirror", "shift=3", "gain=x", "gain=-1", "doppler=2", "noise=nan"):
        with pytest.raises(LightningDiTError, match="shift,gain=6,noise=6,doppler=0.05"):
            parsed(wrong)
