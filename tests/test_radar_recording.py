"""Simulated recordings: who depends on which number, kinematics in the picture, passes, windows and their gaps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from LightningDiT.radar import recording as recordings
from LightningDiT.radar.population import CONDITIONS, Pass, pass_of, passes_of, person_of, relative_speed
from LightningDiT.radar.recording import Cutting, pass_spectrogram, recording, windows_of
from LightningDiT.radar.scatterers import body_joints, ground_path
from LightningDiT.radar.sensor import Sensor
from LightningDiT.radar.separability import accuracy, features, two_splits
from LightningDiT.radar.walker import cycle_seconds

SENSOR, CUTTING = Sensor(), Cutting()


def straight(number: int = 1) -> Pass:
    """A pass straight along the line of sight; odd ones lead away from the radar."""
    return replace(pass_of(0, person_of(0, 3), 0, number), angle=0.0, nearest=6.0)


def test_people_and_passes_depend_on_their_numbers_alone() -> None:
    people = [person_of(5, number) for number in range(1, 200)]
    assert person_of(5, 7) == people[6] != person_of(6, 7)
    assert len({person.height for person in people}) == len({person.speed for person in people}) == 199
    assert np.mean([person.height for person in people]) == pytest.approx(1.70, abs=0.02)
    walks = {(c, n): pass_of(5, people[6], c, n) for c in range(len(CONDITIONS)) for n in range(3)}
    assert pass_of(5, person_of(5, 7), 2, 1) == walks[2, 1]
    assert len({walk.start_phase for walk in walks.values()}) == len(walks)


def test_a_condition_changes_arms_trunk_and_speed() -> None:
    person = person_of(0, 1)
    walks = {name: pass_of(0, person, number, 0) for number, name in enumerate(CONDITIONS)}
    swing = {name: np.array(walk.style.swing) / person.style.swing for name, walk in walks.items()}
    assert swing["Bag_line"][0] / swing["Bag_line"][1] == pytest.approx(0.3)
    assert swing["Bag_Phone_line"][0] / swing["Bag_Phone_line"][1] == pytest.approx(5)
    assert walks["Backpack_line"].style.lean == pytest.approx(person.style.lean + 6)
    assert walks["Normal_line"].sway[0] == 0 < walks["Normal_free"].sway[0]


@pytest.mark.parametrize("number", [0, 1])
def test_the_trunk_lies_at_the_speed_of_the_walk(number: int) -> None:
    """In either direction the ridge lies in the lower half, on average at 2 v / wavelength."""
    walk = straight(number)
    walk = replace(walk, strengths=walk.strengths | {"trunk": 30.0, "noise": -30.0})
    columns = round(5 * cycle_seconds(relative_speed(walk), walk.style.cadence) / SENSOR.column_seconds)
    ridge = pass_spectrogram(walk, SENSOR, columns).argmax(0)
    assert ridge.mean() == pytest.approx(SENSOR.row_of(walk.speed), abs=1.5)


@pytest.mark.parametrize("number", [0, 1])
def test_what_leaves_the_picture_at_the_bottom_does_not_enter_at_the_top(number: int) -> None:
    image = pass_spectrogram(replace(straight(number), speed=1.7), SENSOR, 100)
    assert image[-1].max() > 20
    assert image[:2].max() < 14


def test_the_lower_edge_is_the_top_speed_of_the_feet() -> None:
    walk = replace(straight(), speed=1.0)
    seconds = cycle_seconds(relative_speed(walk), walk.style.cadence)
    times = np.arange(0, 4 * seconds, 1e-3)
    ground, _ = ground_path(walk, times)
    toes = [ground[:, 0] + body_joints(walk, times)[f"{side} toe"][:, 0] for side in ("right", "left")]
    top = max(np.gradient(toe, times).max() for toe in toes)
    image = pass_spectrogram(walk, SENSOR, 200)
    share = (image > 12).mean(1)  # 12 dB over the noise, where the noise alone is in 1e-7 of the cases
    assert np.flatnonzero(share > 0.005).max() == pytest.approx(SENSOR.row_of(top), abs=8)


def test_the_picture_repeats_with_the_cadence() -> None:
    """The power of the legs rises twice in a cycle of two steps."""
    walk = straight()
    legs = np.maximum(pass_spectrogram(walk, SENSOR, 400)[195:], 0).mean(0)
    spectrum = np.abs(np.fft.rfft(legs - legs.mean(), 8192))
    found = np.fft.rfftfreq(8192, SENSOR.column_seconds)[spectrum.argmax()]
    assert found == pytest.approx(2 / cycle_seconds(relative_speed(walk), walk.style.cadence), rel=0.03)


def test_passes_have_the_asked_number_of_windows() -> None:
    counts = [passes_of(0, person, 0, 80) for person in range(1, 60)]
    assert {sum(found) for found in counts} == {80}
    assert {len(found) for found in counts} == set(range(3, 12))
    assert min(map(min, counts)) >= 4
    assert passes_of(0, 1, 0, 3) == [3]


def test_neighbours_share_three_quarters_and_turns_are_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "LOST", 0.1)
    shared = CUTTING.columns - CUTTING.stride
    assert shared / CUTTING.columns == pytest.approx(0.75, abs=0.005)
    assert 256 * CUTTING.stride / CUTTING.columns == pytest.approx(63, abs=0.2)  # pixels, as in real recordings
    made = list(recording(0, 4, 0, 24, SENSOR, CUTTING))
    assert len(made) == 24 and all(image.shape == (256, 57) for _, image in made)
    pairs = list(itertools.pairwise(made))
    for (first, image), (second, other) in pairs:
        step = second.number - first.number
        if first.pass_ != second.pass_:
            assert step > CUTTING.columns / CUTTING.stride
        else:
            assert 1 <= step <= 3
            shift = step * CUTTING.stride
            np.testing.assert_array_equal(image[:, shift:], other[:, : CUTTING.columns - shift])
    assert any(first.pass_ == second.pass_ and second.number - first.number == 2 for (first, _), (second, _) in pairs)


def test_windows_are_the_same_in_every_run() -> None:
    assert windows_of(3, 2, 1, 40, CUTTING) == windows_of(3, 2, 1, 40, CUTTING) != windows_of(4, 2, 1, 40, CUTTING)
    first, again = (next(recording(3, 2, 1, 8, SENSOR, CUTTING))[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_the_classifier_learns_what_can_be_separated() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(300) % 3
    inputs = draw.normal(size=(300, 10)) + 4 * np.eye(10)[labels]
    assert accuracy(inputs[:150], labels[:150], inputs[150:], labels[150:]) > 0.98
    noise = draw.normal(size=(300, 10))
    assert accuracy(noise[:150], labels[:150], noise[150:], labels[150:]) == pytest.approx(1 / 3, abs=0.12)


def test_marks_of_passes_help_the_random_split_alone() -> None:
    """Windows that carry nothing but the mark of their pass are known at random and guessed by pass."""
    draw = np.random.default_rng(0)
    labels, passes = np.arange(400) % 4, np.arange(400) // 4 % 10
    marks = draw.normal(size=(4, 10, 60))
    inputs = marks[labels, passes] + 0.1 * draw.normal(size=(400, 60))
    at_random, by_pass = two_splits(inputs, labels, passes, 0)
    assert at_random > 0.98
    assert by_pass < 0.5


def test_features_are_means_of_blocks_of_what_is_shown() -> None:
    pictures = np.zeros((1, 64, 16), np.float32)
    pictures[0, :2, 0] = (-4, -800)  # shown as -45
    found = features(pictures).reshape(32, 8)
    assert found[0, 0] == pytest.approx(-49 / 4)
    assert np.abs(found).sum() == pytest.approx(49 / 4)
