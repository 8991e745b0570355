"""The body as points that reflect: ellipsoids of limbs, cut into points along their length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from LightningDiT.radar.population import Pass, relative_speed, rng
from LightningDiT.radar.sensor import Array, Complex, Sensor, path_times, range_gate
from LightningDiT.radar.walker import cycle_seconds, joints

RADAR_HEIGHT = 1.0  # metres
FARTHEST = 4.5  # metres beyond which the loss no longer grows
FLICKER = 0.045  # seconds in which the strength of a point changes


@dataclass(frozen=True)
class Segment:
    """A part of the body between two joints: an ellipsoid of two equal axes."""

    part: str
    start: str
    end: str
    radius: float  # over the body's height
    points: int
    strength: float  # dB over the formula's


def both_sides(part: str, start: str, end: str, radius: float, points: int, strength: float) -> list[Segment]:
    return [Segment(part, f"{side} {start}", f"{side} {end}", radius, points, strength) for side in ("right", "left")]


#: Radii as in Chen's example of a walking person; strengths so that the trunk is 10 to 20 dB above the limbs.
SEGMENTS = (
    Segment("trunk", "pelvis", "neck", 0.085, 8, 6.0),
    Segment("trunk", "right shoulder", "left shoulder", 0.04, 4, 2.0),
    Segment("head", "neck", "crown", 0.055, 2, 0.0),
    *both_sides("arm", "shoulder", "elbow", 0.029, 3, 1.0),
    *both_sides("arm", "elbow", "hand", 0.024, 5, 4.0),
    *both_sides("thigh", "hip", "knee", 0.041, 6, 0.0),
    *both_sides("shank", "knee", "ankle", 0.035, 8, 5.0),
    *both_sides("foot", "ankle", "toe", 0.029, 6, 10.0),
)
#: What is carried, as further segments.
CARRIED_SEGMENTS = {
    "Normal": (),
    "Backpack": (Segment("carried", "pack bottom", "pack top", 0.07, 4, 4.0),),
    "Bag": (Segment("carried", "right hand", "bag bottom", 0.07, 4, 4.0),),
    "Bag_Phone": (Segment("carried", "right hand", "bag bottom", 0.07, 4, 4.0),),
}


def ellipsoid_section(radius: Array | float, half: Array, cosine: Array) -> Array:
    """Return the radar cross section of an ellipsoid with two equal axes in square metres.

    pi a^4 c^2 / (a^2 sin^2 + c^2 cos^2)^2 for the angle between its long axis and the line of sight (Chen, chapter 2).

    Args:
        radius: a, metres.
        half: c, half the length, metres.
        cosine: of that angle.
    """
    square = cosine**2
    return np.pi * radius**4 * half**2 / (radius**2 * (1 - square) + half**2 * square) ** 2


def ground_path(walk: Pass, times: Array) -> tuple[Array, Array]:
    """Return the walker's place (T, 2) on the ground and its direction (T,), the radar in the origin.

    The first axis points away from the radar. A path towards the radar ends at the nearest place.
    """
    most, period, phase = walk.sway
    direction = walk.angle + most * np.sin(2 * np.pi * (times / period + phase)) + (0 if walk.away else np.pi)
    step = walk.speed * np.gradient(times) if len(times) > 1 else np.zeros(1)
    moves = step[:, None] * np.stack([np.cos(direction), np.sin(direction)], axis=-1)
    places = np.cumsum(moves, axis=0)
    nearest = places[np.argmin(places[:, 0])]
    return places - nearest + [walk.nearest, 0.0], direction


def body_joints(walk: Pass, times: Array) -> dict[str, Array]:
    """Return the joints (T, 3) about the walker's place, with those of the objects carried."""
    rv = relative_speed(walk)
    style, body = walk.style, walk.person.body
    phase = walk.start_phase + times / cycle_seconds(rv, style.cadence)
    places = joints(body, style, rv, phase)
    trunk = places["neck"] - places["pelvis"]
    back = np.array([-0.18, 0.0, 0.0])
    places["pack bottom"] = places["pelvis"] + 0.3 * trunk + back
    places["pack top"] = places["pelvis"] + 0.95 * trunk + back
    pendulum = np.radians(8) * np.sin(2 * np.pi * (phase - 0.1))
    places["bag bottom"] = places["right hand"] + 0.35 * np.stack(
        [np.sin(pendulum), 0 * pendulum, -np.cos(pendulum)], axis=-1
    )
    return places


def to_radar(places: Array, ground: Array, direction: Array) -> Array:
    """Return points (T, 3) of the walker in the radar's axes, the radar in the origin."""
    cosine, sine = np.cos(direction), np.sin(direction)
    forward, left, up = places.T
    x = ground[:, 0] + cosine * forward - sine * left
    y = ground[:, 1] + sine * forward + cosine * left
    return np.stack([x, y, up - RADAR_HEIGHT], axis=-1)


def flicker(draw: np.random.Generator, times: Array) -> Complex:
    """Return the strength (T,) of one point: complex, of variance 1, drawn anew every FLICKER seconds and joined."""
    count = int(times[-1] / FLICKER) + 3
    knots = draw.normal(size=(2, count)) / np.sqrt(2)
    at = times / FLICKER
    left = at.astype(int)
    part = at - left
    joined = knots[:, left] * (1 - part) + knots[:, left + 1] * part
    return (joined[0] + 1j * joined[1]) / np.sqrt((1 - part) ** 2 + part**2)


def scatterers(walk: Pass, sensor: Sensor, chirps: int) -> tuple[Array, Complex]:
    """Return ranges (P, K) in metres and amplitudes (P, K - 1) of all points of a pass, as `echo` takes them.

    The square of an amplitude is the cross section in square metres over (range / nearest range)^4.
    """
    times = path_times(sensor, chirps)
    ground, direction = ground_path(walk, times)
    places = {name: to_radar(p, ground, direction) for name, p in body_joints(walk, times).items()}
    trunk = np.linalg.norm((places["pelvis"] + places["neck"]) / 2, axis=1)
    middle = np.round(trunk / sensor.range_cell) * sensor.range_cell  # the cell that the tracker takes
    loss = (walk.nearest / np.minimum(trunk, FARTHEST)) ** 2
    draw = rng("echo", *walk.seeds)
    ranges, amplitudes = [], []
    for segment in (*SEGMENTS, *CARRIED_SEGMENTS[walk.carried]):
        start, axis = places[segment.start], places[segment.end] - places[segment.start]
        length = np.linalg.norm(axis, axis=1)
        centre = start + axis / 2
        cosine = (axis * centre).sum(1) / length / np.linalg.norm(centre, axis=1)
        section = ellipsoid_section(segment.radius * walk.person.height, length / 2, cosine) / segment.points
        strength = np.sqrt(section * 10 ** ((segment.strength + walk.strengths.get(segment.part, 0.0)) / 10)) * loss
        for index in range(segment.points):
            path = np.linalg.norm(start + axis * ((index + draw.uniform()) / segment.points), axis=1)
            ranges.append(path)
            amplitudes.append((flicker(draw, times) * strength * range_gate(sensor, path - middle))[:-1])
    return np.stack(ranges), np.stack(amplitudes).astype(np.complex64)
