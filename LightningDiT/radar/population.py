"""Who walks: people, conditions and passes, each drawn from the seed and its own numbers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from LightningDiT.radar.walker import MOST_RELATIVE_SPEED, Body, Style

CARRIED = ("Normal", "Backpack", "Bag", "Bag_Phone")
WAYS = ("line", "free")
#: Conditions in the order of their numbers: Normal_line, Normal_free, Backpack_line, ...
CONDITIONS = tuple(f"{carried}_{way}" for carried in CARRIED for way in WAYS)
#: What differs in strength; the trunk does not, so that its echo stands equally far above the mean noise.
PARTS = ("head", "arm", "thigh", "shank", "foot", "carried", "noise")
#: What numbers are drawn for.
PURPOSES = ("person", "recording", "pass", "echo", "windows", "interference", "noise")
FEWEST_PASSES, MOST_PASSES = 3, 11


@dataclass(frozen=True)
class Spread:
    """Standard deviations of a quantity from person to person, and from pass to pass of one person."""

    person: float
    pass_: float


#: Relative ones for factors, dB for strengths. Chosen so that a plain classifier finds people as in real recordings:
#: see docs/radar.md for what `--check` measures.
SPREADS = {
    "speed": Spread(0.12, 0.06),
    "cadence": Spread(0.05, 0.03),
    "swing": Spread(0.35, 0.20),
    "hip": Spread(0.08, 0.05),
    "knee": Spread(0.08, 0.05),
    "bounce": Spread(0.30, 0.20),
    "strength": Spread(7.5, 3.5),
    "noise": Spread(2.0, 3.5),
}
MEAN_SPEED = 1.40  # m/s


def spread_of(part: str) -> Spread:
    """Return the spread in dB of one of PARTS."""
    return SPREADS["noise" if part == "noise" else "strength"]


@dataclass(frozen=True)
class Person:
    """One walker: what holds for all passes."""

    number: int
    height: float  # metres
    body: Body
    style: Style
    speed: float  # m/s
    strengths: dict[str, float]  # dB by part


@dataclass(frozen=True)
class Pass:
    """One walk in one direction."""

    person: Person
    carried: str
    style: Style
    speed: float  # m/s
    strengths: dict[str, float]  # dB by part
    away: bool
    angle: float  # radians between path and line of sight
    sway: tuple[float, float, float]  # of a free path's direction: radians, seconds of a period, phase
    start_phase: float  # cycles
    nearest: float  # metres from the radar
    seeds: tuple[int, ...]  # of the values drawn chirp by chirp


def rng(purpose: str, *seeds: int) -> np.random.Generator:
    """Return a generator that depends on one of PURPOSES and these numbers alone.

    The purpose comes first because SeedSequence takes (1, 2) and (1, 2, 0) for the same.
    """
    return np.random.default_rng(np.random.SeedSequence((PURPOSES.index(purpose), *seeds)))


def person_of(seed: int, number: int) -> Person:
    """Return person `number` (from 1) of the population `seed`."""
    draw = rng("person", seed, number)
    height = float(np.clip(draw.normal(1.70, 0.09), 1.45, 2.0))
    legs, arms, width = draw.normal(1, (0.03, 0.04, 0.06))

    def factor(name: str) -> float:
        return float(np.exp(draw.normal(0, SPREADS[name].person)))

    swing, one_sided = factor("swing"), float(np.exp(draw.normal(0, 0.15)))
    style = Style(
        cadence=factor("cadence"),
        swing=(swing * one_sided, swing / one_sided),
        elbow=(float(draw.normal(5, 6)), float(draw.normal(5, 6))),
        hip=factor("hip"),
        knee=factor("knee"),
        bounce=factor("bounce"),
        lean=float(draw.normal(2, 2)),
        limp=float(draw.normal(0, 0.012)),
    )
    speed = MEAN_SPEED * factor("speed") * np.sqrt(height / 1.70)
    strengths = {part: float(draw.normal(0, spread_of(part).person)) for part in PARTS}
    return Person(number, height, Body().scaled(height, legs, arms, width), style, float(speed), strengths)


def pass_of(seed: int, person: Person, condition: int, number: int) -> Pass:
    """Return pass `number` (from 0) of a person under a condition (from 0, see CONDITIONS)."""
    seeds = (seed, person.number, condition, number)
    draw = rng("pass", *seeds)
    carried, way = CARRIED[condition // len(WAYS)], WAYS[condition % len(WAYS)]

    def factor(name: str) -> float:
        return float(np.exp(draw.normal(0, SPREADS[name].pass_)))

    own = person.style
    swing = factor("swing")
    style = replace(
        own,
        cadence=own.cadence * factor("cadence"),
        swing=(own.swing[0] * swing, own.swing[1] * swing),
        hip=own.hip * factor("hip"),
        knee=own.knee * factor("knee"),
        bounce=own.bounce * factor("bounce"),
    )
    free = way == "free"
    strengths = {part: dB + draw.normal(0, spread_of(part).pass_) for part, dB in person.strengths.items()}
    walk = Pass(
        person=person,
        carried=carried,
        style=style,
        speed=person.speed * factor("speed"),
        strengths={part: float(dB) for part, dB in strengths.items()},
        away=bool(number % 2),
        angle=float(draw.normal(0, 0.25 if free else 0.07)),
        sway=(float(abs(draw.normal(0, 0.35))) if free else 0.0, float(draw.uniform(4, 9)), float(draw.uniform())),
        start_phase=float(draw.uniform()),
        nearest=float(draw.uniform(2.5, 3.5)),
        seeds=seeds,
    )
    return loaded(walk)


def loaded(walk: Pass) -> Pass:
    """Return a pass as what is carried changes it: arms, posture, speed and the trunk's strength."""
    right, left = walk.style.swing
    bent = walk.style.elbow
    if walk.carried == "Backpack":
        style = replace(walk.style, lean=walk.style.lean + 6, swing=(0.8 * right, 0.8 * left))
        return replace(walk, style=style, speed=0.97 * walk.speed)
    if walk.carried == "Bag":
        return replace(walk, style=replace(walk.style, swing=(0.3 * right, left)), speed=0.98 * walk.speed)
    if walk.carried == "Bag_Phone":
        style = replace(walk.style, swing=(0.3 * right, 0.06 * left), elbow=(bent[0], bent[1] + 100), lean=6.0)
        return replace(walk, style=style, speed=0.9 * walk.speed)
    return walk


def relative_speed(walk: Pass) -> float:
    """Return the speed in leg lengths a second, as the model of walking takes it."""
    return float(np.clip(walk.speed / walk.person.body.leg, 0.1, MOST_RELATIVE_SPEED))


def passes_of(seed: int, person: int, condition: int, windows: int, fewest: int = 4) -> list[int]:
    """Return the number of windows of each pass: 3 to 11 passes, fewer if some would have less than `fewest`."""
    draw = rng("recording", seed, person, condition)
    most = max(1, min(MOST_PASSES, windows // fewest))
    count = int(draw.integers(min(FEWEST_PASSES, most), most + 1))
    shares = draw.uniform(0.6, 1.4, count)
    spare = (
        (shares / shares.sum() * (windows - fewest * count)).astype(int) if windows >= fewest * count else 0 * shares
    )
    lengths = [min(fewest, windows) + int(more) for more in spare]
    lengths[-1] += windows - sum(lengths)
    return lengths
