"""Measures of a walk with known answers, distances between sets of windows, and the filter."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.scores import proportion
from LightningDiT.radar.level_images import Windows
from LightningDiT.radar.population import pass_of, person_of, relative_speed
from LightningDiT.radar.recording import Cutting, recording
from LightningDiT.radar.sensor import Sensor
from LightningDiT.radar.walker import cycle_seconds
from LightningDiT.verdict import fidelity as module
from LightningDiT.verdict.classifiers import Recipe, SmallResidual
from LightningDiT.verdict.fidelity import equal_numbers, feature_scores, features_of, fidelity, gait_distances
from LightningDiT.verdict.filter import KEPT, PARTS, fit_filter, parts_of, scores_of, shares_kept
from LightningDiT.verdict.gait import axes_of, cadence, measure
from LightningDiT.verdict.rows import Generated
from tests.test_verdict_trials import walkers

SENSOR = Sensor()
DB = (-45.0, 0.0)


def generated(windows: Windows) -> Generated:
    return Generated(windows.pixels, windows.people, windows.conditions)


def test_axes_follow_from_sensor_and_native_columns_and_are_pixels_without_them() -> None:
    known = axes_of({"native_columns": 57}, (128, 64), SENSOR)
    assert known.column_seconds == pytest.approx(57 * 263 * 95e-6 / 64)
    assert known.row_speed == pytest.approx(2 * SENSOR.speed_step)
    assert known.speed(np.array([64.0, 96.0])) == pytest.approx([0, 64 * SENSOR.speed_step])
    assert (known.time_unit, known.speed_unit, known.rate_unit) == ("s", "m/s", "Hz")
    no_time, nothing = axes_of({}, (128, 64), SENSOR), axes_of({"native_columns": 57}, (128, 64), None)
    assert (no_time.time_unit, no_time.speed_unit, no_time.rate_unit) == ("columns", "m/s", "cycles a column")
    assert (nothing.time_unit, nothing.speed_unit, nothing.speed(np.array([65.0]))[0]) == ("columns", "rows", 1.0)
    assert "unknown" in no_time.note[0] and "unknown" in nothing.note[0] and "57 native columns" in known.note[0]


def test_ridge_envelopes_and_bounds_of_bars_of_known_power() -> None:
    """A column with equal power in rows 10 to 29: 5 % of it is one row; a stronger row is the ridge."""
    levels = torch.zeros(1, 1, 64, 20)
    levels[:, :, 10:30] = 0.8
    axes = axes_of({"native_columns": 20}, (64, 20), SENSOR)
    step = 4 * SENSOR.speed_step  # m/s a row
    found = measure(2 * levels - 1, axes, DB)
    assert found.lower[0] == pytest.approx((10 + 0.5 - 32) * step)  # one row of twenty, from its upper edge at 9.5
    assert found.upper[0] == pytest.approx((28 + 0.5 - 32) * step)
    assert (found.slowest[0], found.fastest[0]) == pytest.approx((found.lower[0, 0], found.upper[0, 0]))
    levels[:, :, 17] = 0.9
    levels[..., 3] = 0  # level 0 is no power, not a little
    found = measure(2 * levels - 1, axes, DB)
    assert found.ridge[0, :3] == pytest.approx([(17 - 32) * step] * 3)
    assert np.isnan(found.ridge[0, 3]) and np.isnan(found.upper[0, 3])
    assert np.isfinite(found.fastest[0])
    power = 10 ** (-4.5 * (1 - 0.9)) - 10**-4.5, 10 ** (-4.5 * (1 - 0.8)) - 10**-4.5
    upper_rows = 0.05 * (power[0] + 19 * power[1]) / power[1]
    assert found.upper[0, 0] == pytest.approx((29.5 - upper_rows - 32) * step)


def test_the_texture_is_what_a_mean_over_neighbours_lacks() -> None:
    """Independent pixels of deviation s keep s sqrt(8 / 9): the mean of nine has a covariance of s^2 / 9 with each."""
    noise = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    axes = axes_of({}, (200, 200), None)
    assert measure(0.2 * noise, axes, DB).texture[0] == pytest.approx(0.1 * np.sqrt(8 / 9), rel=0.01)
    assert measure(torch.full((1, 1, 8, 8), 0.3), axes, DB).texture[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rate", [1.3, 1.9, 2.6])
def test_the_cadence_is_that_of_a_sinusoid_on_a_slope(rate: float) -> None:
    """Of less than two cycles, where the peak of a Fourier transform is off by 0.2 Hz."""
    time = np.arange(57) * 0.025
    signals = np.stack([2 * np.sin(2 * np.pi * rate * time + phase) + 5 * time + 3 for phase in (0.0, 1.0, 2.5)])
    assert cadence(signals, 0.025) == pytest.approx([rate] * 3, abs=0.0126)
    assert cadence(signals, None) == pytest.approx([0.025 * rate] * 3, abs=0.0005)
    assert np.isnan(cadence(np.stack([3 + 2 * time, np.where(time > 1, np.nan, time)]), 0.025)).all()


def test_the_cadence_and_speed_of_simulated_walkers_are_found() -> None:
    errors, ratios = [], []
    axes = axes_of({"native_columns": 57}, (256, 57), SENSOR)
    for number in (1, 2, 3):
        person = person_of(0, number)
        passes: dict[int, list[np.ndarray]] = {}
        for window, image in recording(0, number, 0, 12, SENSOR, Cutting()):
            passes.setdefault(window.pass_, []).append(np.clip(1 + (image - image.max()) / 45, 0, 1))
        for at, images in passes.items():
            walk = pass_of(0, person, 0, at)
            found = measure(2 * torch.tensor(np.stack(images))[:, None] - 1, axes, DB)
            errors += list(found.cadence - 2 / cycle_seconds(relative_speed(walk), walk.style.cadence))
            ratios.append(np.nanmedian(found.ridge) / (walk.speed * np.cos(walk.angle)))
    assert np.nanmedian(np.abs(errors)) < 0.1
    assert np.median(ratios) == pytest.approx(1, abs=0.1)


def test_equal_sets_are_at_no_distance_and_a_shift_in_speed_is_its_own_size() -> None:
    pytest.importorskip("scipy")
    training = walkers(2, 2, 6)
    axes = axes_of({"native_columns": 16}, (16, 16), SENSOR)
    moved = replace(training, pixels=training.pixels.roll(2, 2))
    found = {one.quantity: one for one in gait_distances(generated(moved), training, training, axes)}
    assert set(found) >= {"ridge", "upper", "lower", "fastest", "slowest", "texture"}
    assert found["ridge"].real == 0
    assert found["ridge"].generated == pytest.approx(2 * 16 * SENSOR.speed_step, rel=0.02)
    assert found["ridge"].unit == "m/s"
    assert found["ridge"].people.keys() == {0, 1}
    assert found["ridge"].means[1] == found["ridge"].means[2]
    assert found["ridge"].ratio == float("inf")
    same = {one.quantity: one for one in gait_distances(generated(training), training, training, axes)}
    assert all(one.generated == one.real == 0 and one.ratio == 1 for one in same.values())


def test_windows_without_a_ridge_are_counted_beside_those_of_real_ones() -> None:
    """Every second generated window has no power, and no real one."""
    pytest.importorskip("scipy")
    training = walkers(2, 2, 6)
    made = generated(replace(training, pixels=training.pixels.clone()))
    made.pixels[1::2] = -1.0
    axes = axes_of({"native_columns": 16}, (16, 16), None)
    found = {one.quantity: one for one in gait_distances(made, training, training, axes)}
    assert found["ridge"].lacking == (0.5, 0)


def test_people_are_compared_in_equal_numbers() -> None:
    made, held, known = (
        torch.tensor([0] * 9 + [2] * 3),
        torch.tensor([0] * 4 + [1] * 5 + [2] * 8),
        torch.tensor([0, 2, 2]),
    )
    found = equal_numbers(made, held, known)
    assert {person: [len(rows) for rows in own] for person, own in found.items()} == {0: [4, 4, 1], 2: [3, 3, 2]}
    assert all(bool((made[own[0]] == person).all()) for person, own in found.items())
    assert all(bool((held[own[1]] == person).all()) for person, own in found.items())
    assert torch.equal(equal_numbers(made, held, known)[0][0], found[0][0])


def test_feature_scores_of_points_far_away_and_of_the_reference_itself() -> None:
    """Two normal sets of equal covariance at distance d have the Frechet distance d^2."""
    pytest.importorskip("torch_fidelity")
    known = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = feature_scores(known + torch.tensor([30.0, 40.0, 0]), known, known)
    assert found.frechet == pytest.approx((2500, 0), rel=1e-4, abs=1e-4)
    assert found.precision is not None and found.recall is not None
    assert [score.value for score in (*found.precision, *found.recall)] == [0, 1, 0, 1]
    few = feature_scores(known[:3], known[3:6], known)
    assert few.precision is None and few.recall is None


def test_precision_is_a_share_of_the_windows_compared_and_recall_of_the_training_windows() -> None:
    """The intervals of shares of 20 and of 60, whatever the shares are."""
    pytest.importorskip("torch_fidelity")
    known = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    found = feature_scores(known[:20], known[20:40] + 1, known)
    assert found.precision is not None and found.recall is not None
    assert found.precision == tuple(proportion(score.value, 20) for score in found.precision)
    assert found.recall == tuple(proportion(score.value, 60) for score in found.recall)
    assert 0 < found.recall[0].value < 1


def test_features_are_means_over_the_bands_of_doppler() -> None:
    model = SmallResidual(2, (16, 16)).eval()
    pixels = walkers(2, 1, 2).pixels
    whole, found = model.features(pixels), features_of(model, pixels)
    assert (whole.shape, found.shape) == ((4, 2048), (4, 256))
    assert torch.allclose(found[:, 3], whole[:, 24:32].mean(1), atol=1e-6)


def test_features_are_compared_of_the_windows_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three sets of different sizes, each by its own rows."""
    pytest.importorskip("scipy")
    training, held = walkers(3, 2, 6), walkers(3, 2, 12, 10, seed=1)
    looked: list[torch.Tensor] = []
    monkeypatch.setattr(module, "features_of", lambda judge, pixels: looked.append(pixels) or pixels[:, 0, :4, 0])
    made = generated(walkers(3, 1, 9, seed=2))
    fidelity(made, held, training, axes_of({}, (16, 16), None), Recipe(steps=2, batch=8))
    chosen = equal_numbers(made.people, held.people, training.people)
    drawn = [torch.cat(rows) for rows in zip(*chosen.values(), strict=True)]
    for pixels, windows, rows in zip(looked, (made, held, training), drawn, strict=True):
        assert torch.equal(pixels, windows.pixels[rows])


def test_fidelity_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    training, held = walkers(3, 2, 6), walkers(2, 2, 12, 10, seed=1)
    axes = axes_of({}, (16, 16), None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_prc", None)
    found = fidelity(generated(training), held, training, axes, Recipe(steps=2, batch=8))
    assert found.copies.samples == 1.0
    assert found.copies.held_out < 0.2
    assert found.features.precision is None
    assert any("pip install torch-fidelity" in note[0] for note in found.notes)
    assert found.notes[-1][0] == "people without generated or held-out windows, who are left out: 1"
    with pytest.raises(LightningDiTError, match="nobody has generated"):
        gait_distances(generated(training)[torch.tensor([], dtype=torch.long)], held, training, axes)


def test_passes_are_dealt_whole_to_the_parts_of_the_filter() -> None:
    people = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    passes = torch.tensor([0, 0, 1, 2, 3, 9, 9])
    parts = parts_of(people, passes)
    assert parts.tolist() == [0, 0, 1, 2, 0, -1, -1]
    assert PARTS == 3


def test_the_filter_keeps_the_right_people_and_refuses_others() -> None:
    training = walkers(3, 3, 8)
    found = fit_filter(training, steps=60)
    assert len(found.judges) == 3
    assert found.judged == len(training.people)
    assert 2 * KEPT - 1 <= found.real_kept <= KEPT + 1 / found.judged
    fresh = generated(walkers(3, 1, 20, seed=8))
    kept = found.keeps(fresh)
    assert float(kept.double().mean()) > 0.6
    swapped = Generated(fresh.pixels, (fresh.people + 1) % 3, fresh.conditions)
    assert not found.keeps(swapped).any()
    assert shares_kept(kept, fresh.people).keys() == {0, 1, 2}
    assert sum(shares_kept(kept, fresh.people).values()) / 3 == pytest.approx(float(kept.double().mean()))
    confidence, margin = scores_of(found.judges[0], fresh.pixels, fresh.people)
    assert bool(((confidence > 0.5) <= (margin > 0)).all())
    with pytest.raises(LightningDiTError, match="nobody has two of them"):
        fit_filter(walkers(3, 1, 4), steps=1)
