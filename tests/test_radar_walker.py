"""The walking model against Boulic's relations and the geometry of limbs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from LightningDiT.radar.walker import (
    Body,
    Style,
    ankle_flexion,
    curve,
    cycle_seconds,
    elbow_flexion,
    hip_flexion,
    joints,
    knee_flexion,
    pelvis_drop,
    thorax_torsion,
)

Flexion = Callable[[np.ndarray, float], np.ndarray]
PHASE = np.linspace(0, 1, 4001)
SPEEDS = [0.3, 0.9, 1.3, 1.7, 2.9]
BODY = Body().scaled(1.80)


@pytest.mark.parametrize(
    ("height", "speed", "seconds"), [(1.80, 1.4, 1.0694), (1.60, 1.4, 1.0083), (1.80, 0.7, 1.5124)]
)
def test_the_cadence_follows_speed_and_height(height: float, speed: float, seconds: float) -> None:
    """1.346 sqrt(0.491 height / speed), the leg being 0.491 of the height."""
    body = Body().scaled(height)
    duration = cycle_seconds(speed / body.leg)
    assert duration == pytest.approx(seconds, abs=1e-4)
    assert duration * speed == pytest.approx(1.346 * np.sqrt(speed / body.leg) * body.leg)  # the length of a cycle


@pytest.mark.parametrize("flexion", [hip_flexion, knee_flexion, ankle_flexion, elbow_flexion, thorax_torsion])
@pytest.mark.parametrize("rv", SPEEDS)
def test_angles_repeat_without_jumps(flexion: Flexion, rv: float) -> None:
    values = flexion(PHASE, rv)
    assert values[0] == pytest.approx(values[-1])
    assert np.abs(np.diff(values)).max() < 0.6  # degrees in 1/4000 of a cycle
    np.testing.assert_allclose(flexion(PHASE - 3, rv), values, atol=1e-6)


@pytest.mark.parametrize(
    ("flexion", "rv", "low", "high"),
    [
        (hip_flexion, 1.0, -15, 25),
        (hip_flexion, 3.0, -15, 31),
        (hip_flexion, 0.25, -7.5, 12.5),
        (knee_flexion, 1.0, 3, 70),
        (knee_flexion, 3.0, 3, 65),
        (ankle_flexion, 1.0, -20, 8),
        (elbow_flexion, 1.3, 14, 44),
        (elbow_flexion, 3.0, 8, 70),
        (pelvis_drop, 1.0, -3.32, 3.32),
    ],
)
def test_limits_of_angles(flexion: Flexion, rv: float, low: float, high: float) -> None:
    """Those of the control points, as Boulic prints them."""
    values = flexion(PHASE, rv)
    assert (values.min(), values.max()) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_the_curve_is_that_of_scipy() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    at, degrees = (0.17, 0.4, 0.75, 1.0), (3.0, 5.0, 70.0, 4.0)
    places = np.concatenate([np.array(at) + turn for turn in (-2, -1, 0, 1)])
    reference = interpolate.PchipInterpolator(places, np.tile(degrees, 4))(PHASE)
    np.testing.assert_allclose(curve(PHASE, at, degrees), reference, atol=1e-9)


@pytest.mark.parametrize("rv", SPEEDS)
def test_limbs_keep_their_lengths(rv: float) -> None:
    places = joints(BODY, Style(limp=0.02, swing=(1.5, 0.2), elbow=(10, 100), lean=5), rv, PHASE)
    limbs = {("pelvis", "neck"): BODY.torso, ("neck", "crown"): BODY.head}
    for side in ("right", "left"):
        limbs[f"{side} hip", f"{side} knee"] = BODY.thigh
        limbs[f"{side} knee", f"{side} ankle"] = BODY.shank
        limbs[f"{side} ankle", f"{side} toe"] = BODY.foot
        limbs[f"{side} shoulder", f"{side} elbow"] = BODY.upper_arm
        limbs[f"{side} elbow", f"{side} hand"] = BODY.forearm
    for (start, end), length in limbs.items():
        np.testing.assert_allclose(np.linalg.norm(places[end] - places[start], axis=1), length, rtol=1e-9)


def speeds(places: dict[str, np.ndarray], joint: str, base: str, seconds: float) -> np.ndarray:
    """Return the forward speed of a joint against another's in m/s."""
    return np.gradient(places[joint][:, 0] - places[base][:, 0], PHASE * seconds)


def test_the_top_speed_of_a_straight_leg_is_that_of_a_pendulum() -> None:
    rv, seconds = 1.7, cycle_seconds(1.7)
    places = joints(BODY, Style(knee=0.0), rv, PHASE)
    found = np.linalg.norm(np.gradient(places["right ankle"] - places["right hip"], PHASE * seconds, axis=0), axis=1)
    turn = np.abs(np.gradient(np.radians(hip_flexion(PHASE, rv)), PHASE * seconds))
    assert found.max() == pytest.approx(BODY.leg * turn.max(), rel=1e-3)


@pytest.mark.parametrize("speed", [1.0, 1.4, 1.8])
def test_a_foot_stands_and_swings(speed: float) -> None:
    """In its stance it hardly moves, though the model lets it slide at high speeds; in swing it is 2.5 to 4 times as
    fast as the body.
    """
    rv = speed / BODY.leg
    on_ground = speed + speeds(joints(BODY, Style(), rv, PHASE), "right ankle", "pelvis", cycle_seconds(rv))
    standing = on_ground[(PHASE > 0.15) & (PHASE < 0.4)]
    assert np.abs(standing.mean()) < 0.3 * speed
    assert 2.5 * speed < on_ground.max() < 4 * speed
    assert on_ground.mean() == pytest.approx(speed, rel=1e-2)


def test_arms_swing_against_legs_as_a_style_says() -> None:
    places = joints(BODY, Style(swing=(1.0, 0.25)), 1.7, PHASE)
    swing = {side: places[f"{side} elbow"][:, 0] - places[f"{side} shoulder"][:, 0] for side in ("right", "left")}
    thigh = places["right knee"][:, 0] - places["right hip"][:, 0]
    assert np.corrcoef(swing["right"], thigh)[0, 1] < -0.8
    assert np.ptp(swing["left"]) / np.ptp(swing["right"]) == pytest.approx(0.25, abs=0.02)
