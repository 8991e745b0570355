"""How a person walks: Boulic, Thalmann and Thalmann, "A global human walking model with real-time kinematic
personification", The Visual Computer 6 (1990), as printed in V. C. Chen, The Micro-Doppler Effect in Radar, chapter 4.

The model knows one quantity, the relative speed RV: the speed in leg lengths a second. Angles are in degrees, phases in
cycles; a cycle begins when the right heel strikes the ground. What a person adds to the model is in `Style`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MOST_RELATIVE_SPEED = 3.0  # of the model
ANKLE_HEIGHT = 0.039  # of the body's height (Winter, Biomechanics and Motor Control of Human Movement, figure 4.1)


@dataclass(frozen=True)
class Body:
    """Lengths of the body's segments in metres, by Chen's table of segments for a height of 1."""

    head: float = 0.130
    shoulder: float = 0.1295  # half the distance of both
    torso: float = 0.288
    hip: float = 0.0955  # half the distance of both
    thigh: float = 0.245
    shank: float = 0.246
    foot: float = 0.143
    upper_arm: float = 0.188
    forearm: float = 0.152

    def scaled(self, height: float, legs: float = 1.0, arms: float = 1.0, width: float = 1.0) -> Body:
        """Return the body of a height in metres, its legs, arms and width longer by these factors."""
        factors = {"thigh": legs, "shank": legs, "upper_arm": arms, "forearm": arms, "shoulder": width, "hip": width}
        return Body(**{name: height * length * factors.get(name, 1.0) for name, length in vars(self).items()})

    @property
    def leg(self) -> float:
        return self.thigh + self.shank


@dataclass(frozen=True)
class Style:
    """How a walk departs from the model; pairs are (right, left)."""

    cadence: float = 1.0  # cycles a second over those of the model
    swing: tuple[float, float] = (1.0, 1.0)  # of the shoulders, over that of the model
    elbow: tuple[float, float] = (0.0, 0.0)  # degrees by which the elbows are bent more
    hip: float = 1.0  # range of the hips' flexion over that of the model
    knee: float = 1.0
    bounce: float = 1.0  # of the spine's motion over that of the model
    lean: float = 0.0  # degrees by which the trunk is bent forward
    limp: float = 0.0  # cycles by which the left side is late


def cycle_seconds(relative_speed: float, cadence: float = 1.0) -> float:
    """Return the duration of a cycle of two steps: 1.346 / sqrt(RV) seconds (Boulic's length of a cycle over RV)."""
    return 1.346 / np.sqrt(relative_speed) / cadence


def curve(phase: Array, at: Sequence[float], degrees: Sequence[float]) -> Array:
    """Return the monotone cubic through control points, repeated with period 1 (Fritsch and Butland, 1984).

    Args:
        phase: where, in cycles; any shape.
        at: ascending places of the control points within one cycle.
        degrees: their values.
    """
    places = np.concatenate([np.asarray(at) + turn for turn in (-1, 0, 1)])
    values = np.tile(np.asarray(degrees, dtype=float), 3)
    step, rise = np.diff(places), np.diff(values) / np.diff(places)
    before, after = rise[:-1], rise[1:]
    weight = (step[:-1] + 2 * step[1:], 2 * step[:-1] + step[1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (weight[0] + weight[1]) / (weight[0] / before + weight[1] / after)
    slope = np.zeros_like(values)
    slope[1:-1] = np.where(before * after > 0, mean, 0.0)
    where = (phase - at[0]) % 1.0 + at[0]
    left = np.clip(np.searchsorted(places, where, side="right") - 1, 0, len(step) - 1)
    width = step[left]
    x = (where - places[left]) / width
    return (
        values[left] * (1 + 2 * x) * (1 - x) ** 2
        + values[left + 1] * x**2 * (3 - 2 * x)
        + width * x * (1 - x) * (slope[left] * (1 - x) - slope[left + 1] * x)
    )


def hip_flexion(phase: Array, rv: float) -> Array:
    """Return the flexion of the right hip; the thigh is in front of the trunk where it is positive."""
    over, slow = max(0.0, rv - 1.3) / 1.7, min(1.0, 2 * rv)
    if over:
        return curve(phase, (0.2 * over - 0.1, 0.5, 0.9), (5 * over + 25, -15, 6 * over + 25))
    return curve(phase, (-0.1, 0.5), (25 * slow, -15 * slow))


def knee_flexion(phase: Array, rv: float) -> Array:
    """Return the flexion of the right knee, 0 for a straight leg."""
    over, slow = max(0.0, rv - 1.3) / 1.7, min(1.0, 2 * rv)
    at = (0.17 - 0.05 * over, 0.4, 0.75 - 0.05 * over, 1 - 0.03 * over)
    return curve(phase, at, (3 + 22 * over, 3, 70 * slow - 5 * over, 3 + 3 * over))


def ankle_flexion(phase: Array, rv: float) -> Array:
    """Return the flexion of the right ankle; the toes point up where it is positive."""
    over, slow = max(0.0, rv - 1.3) / 1.7, min(1.0, 2 * rv)
    support = 0.752 - 0.143 / cycle_seconds(rv)  # share of the cycle in which the foot stands
    at = (0.0, 0.08, 0.5 - 0.1 * over, support, 0.85)
    down, up, push = -3 - 15 * slow + 4 * over, -3 + 11 * slow - 3 * over, -3 - 17 * slow - 8 * over
    return curve(phase, at, (-3 + 5 * over, down, up, push, -3 + 5 * over))


def elbow_flexion(phase: Array, rv: float) -> Array:
    """Return the flexion of the right elbow, 0 for a straight arm."""
    if rv < 0.5:
        return curve(phase, (0.05, 0.5, 0.9), (6 * rv + 3, 34 * rv + 3, 10 * rv + 3))
    if rv < 1.3:
        part = (rv - 0.5) / 0.8
        return curve(phase, (0.05, 0.01 * part + 0.5, 0.9), (8 * part + 6, 24 * part + 20, 9 * part + 8))
    part = (rv - 1.3) / 1.7
    at = (0.05, 0.04 * part + 0.51, 0.9 - 0.1 * part)
    return curve(phase, at, (14 - 6 * part, 44 + 26 * part, 17 - 6 * part))


def thorax_torsion(phase: Array, rv: float) -> Array:
    """Return the turn of the shoulders about the spine."""
    return curve(phase, (0.1, 0.4, 0.6, 0.9), (4 / 3 * rv, -1.5 * rv, -4 / 3 * rv, 1.5 * rv))


def spine(phase: Array, rv: float) -> Array:
    """Return the motion (T, 3) of the pelvis about its mean path: forward, to the left, up; in leg lengths."""
    slow = 4 * rv * (1 - rv) if rv < 0.5 else 1.0
    support = 0.752 - 0.143 / cycle_seconds(rv)
    forward = -0.021 * slow * np.sin(2 * np.pi * (2 * phase + 2 * (0.625 - support)))
    lateral = -0.032 * slow * np.sin(2 * np.pi * (phase - 0.1))
    vertical = 0.015 * rv * (np.sin(2 * np.pi * (2 * phase - 0.35)) - 1)
    return np.stack([forward, lateral, vertical], axis=-1)


def pelvis_drop(phase: Array, rv: float) -> Array:
    """Return the roll of the pelvis, which falls on the side of the leg that swings."""
    rest = 1.66 * rv
    turn = phase % 1.0
    first, half = np.where(turn < 0.5, 1.0, -1.0), turn % 0.5
    rising = -rest + rest * np.cos(2 * np.pi * 10 * half / 3)
    falling = -rest - rest * np.cos(2 * np.pi * 10 * (half - 0.15) / 7)
    return first * np.where(half < 0.15, rising, falling)


def along(degrees: Array | float, length: float) -> Array:
    """Return the vector (T, 3) of a limb of this length, which hangs down at 0 degrees and points forward at 90."""
    angle = np.radians(degrees)
    return length * np.stack([np.sin(angle), np.zeros_like(angle), -np.cos(angle)], axis=-1)


def joints(body: Body, style: Style, relative_speed: float, phase: Array) -> dict[str, Array]:
    """Return the positions (T, 3) of the joints: forward, to the left, up, in metres.

    The origin moves with the mean speed on the ground below the pelvis.

    Args:
        phase: (T,) cycles since a strike of the right heel.
    """
    rv = relative_speed
    pelvis = style.bounce * body.leg * spine(phase, rv)
    pelvis[:, 2] += body.leg + ANKLE_HEIGHT * body.foot / Body.foot
    nod = 2 * style.bounce * (4 * rv * (1 - rv) if rv < 0.5 else 1.0)
    pitch = style.lean + nod * (1 - np.sin(2 * np.pi * (2 * phase - 0.1)))
    neck = pelvis + along(180 - pitch, body.torso)
    yaw = np.radians((-4 * rv * np.cos(2 * np.pi * phase), thorax_torsion(phase, rv)))
    roll = np.radians(pelvis_drop(phase, rv))
    places = {"pelvis": pelvis, "neck": neck, "crown": neck + np.array([0, 0, 1]) * body.head}
    for index, side in enumerate(("right", "left")):
        left = side == "left"
        own = phase + (0.5 + style.limp) * left
        out = 2 * left - 1
        hip = pelvis + body.hip * out * np.stack([-np.sin(yaw[0]), np.cos(yaw[0]), np.sin(roll)], axis=-1)
        thigh = style.hip * hip_flexion(own, rv)
        shank = thigh - style.knee * knee_flexion(own, rv)
        knee = hip + along(thigh, body.thigh)
        ankle = knee + along(shank, body.shank)
        shoulder = neck + body.shoulder * out * np.stack([-np.sin(yaw[1]), np.cos(yaw[1]), 0 * phase], axis=-1)
        most = 9.88 * rv * style.swing[index]
        arm = 3 - most / 2 - most * np.cos(2 * np.pi * own)
        elbow = shoulder + along(arm, body.upper_arm)
        bend = style.elbow[index] + min(1.0, style.swing[index]) * elbow_flexion(own, rv)
        places |= {
            f"{side} hip": hip,
            f"{side} knee": knee,
            f"{side} ankle": ankle,
            f"{side} toe": ankle + along(90 + shank + ankle_flexion(own, rv), body.foot),
            f"{side} shoulder": shoulder,
            f"{side} elbow": elbow,
            f"{side} hand": elbow + along(arm + bend, body.forearm),
        }
    return places
