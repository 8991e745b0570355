"""Rows, the images that they see, and trials that are kept; results of folds and seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.level_images import Windows
from LightningDiT.verdict import trials as module
from LightningDiT.verdict.classifiers import (
    Recipe,
    classically_augmented,
    make_classifier,
    predicted,
    train_classifier,
)
from LightningDiT.verdict.results import base_of, judged_row, pooled, summarise
from LightningDiT.verdict.rows import (
    ROWS,
    Generated,
    Scenario,
    spread,
    subset,
    taken,
    unseen_condition,
    unseen_pairs,
)
from LightningDiT.verdict.trials import FoldData, Plan, Trial, load_trials, run_trials

SIDE = 16
SHORT = Recipe(steps=2, batch=4, looks=1)


def walkers(people: int, passes: int, each: int, first_pass: int = 0, conditions: int = 1, seed: int = 0) -> Windows:
    """Return windows whose ridge lies where the person is; the condition of a pass is its number mod `conditions`."""
    person = torch.arange(people).repeat_interleave(passes * each)
    number = torch.arange(passes).repeat_interleave(each).repeat(people)
    rows = torch.arange(SIDE)[:, None]
    ridge = torch.exp(-((rows - 3 - 4.0 * person[:, None, None]) ** 2) / 4)  # (N, H, 1)
    noise = 0.3 * torch.rand(len(person), SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    names = tuple(f"c{number}" for number in range(conditions)) if conditions > 1 else None
    return Windows(
        (2 * (0.7 * ridge + noise) - 1)[:, None],
        person,
        number % conditions,
        first_pass + 100 * person + number,
        1000 * first_pass + torch.arange(len(person)),
        tuple(f"ID_{name}" for name in range(people)),
        names,
        (-45.0, 0.0),
    )


def fold(number: int, generated: Generated | None = None, conditions: int = 1) -> FoldData:
    parts = [walkers(3, 2 * conditions, 4, 10 * number + at, conditions, 10 * number + at) for at in (0, 40, 70)]
    return FoldData(*parts, lambda images: generated, lambda images: generated)


def made(each: int = 20) -> Generated:
    windows = walkers(3, 1, each, seed=99)
    return Generated(windows.pixels, windows.people, windows.conditions)


def test_images_of_a_person_are_spread_over_passes_and_within_them() -> None:
    windows = walkers(2, 3, 10)
    rows = spread(windows, 7)
    counts = torch.stack([windows.people[rows], windows.passes[rows]]).unique(dim=1, return_counts=True)[1]
    assert counts.tolist() == [3, 2, 2, 3, 2, 2]
    assert (rows[:3] % 10).tolist() == [1, 5, 8]  # the middles of thirds of ten
    assert torch.equal(spread(windows, None), torch.arange(60))
    assert torch.equal(spread(windows, 500), torch.arange(60))
    short = subset(windows, torch.cat([torch.arange(2), torch.arange(10, 60)]))  # two windows in the first pass
    assert (short.people[spread(short, 12)] == 0).sum() == 12


def test_generated_windows_are_taken_person_by_person_with_conditions_in_turn() -> None:
    people = torch.tensor([0, 0, 1, 1, 0, 0, 1, 0])
    conditions = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])
    generated = Generated(torch.zeros(8, 1, 2, 2), people, conditions)
    real = torch.tensor([0, 0, 1])
    assert taken(generated, real, 1).tolist() == [0, 5, 2]
    assert taken(generated, real, 2).tolist() == [0, 5, 1, 7, 2, 3]
    assert taken(generated, real, 4).tolist() == [0, 5, 1, 7, 4, 2, 3, 6]  # there are no more


def test_unseen_conditions_and_pairs_are_neither_trained_nor_validated() -> None:
    windows = walkers(3, 4, 2, conditions=2)
    scenario = unseen_condition(windows, "c1")
    assert scenario.seen(windows).conditions.unique().tolist() == [0]
    assert scenario.tested(windows).conditions.unique().tolist() == [1]
    assert len(Scenario().tested(windows).people) == len(windows.people)
    pairs = unseen_pairs(windows, windows)
    assert pairs.held_out == {(0, 0), (1, 1), (2, 0)}
    line = windows.conditions == 0
    lacking = subset(windows, torch.nonzero(line | (windows.people == 2))[:, 0])  # 0 and 1 train under one condition
    assert unseen_pairs(lacking, windows).held_out == {(0, 1), (1, 1), (2, 0)}
    slow = subset(windows, torch.nonzero(windows.conditions == 1)[:, 0])  # all would lack c1, and one must show it
    assert unseen_pairs(windows, slow).held_out == {(0, 1), (1, 1)}
    seen, tested = pairs.seen(windows), pairs.tested(windows)
    assert len(seen.people) + len(tested.people) == len(windows.people)
    assert set(zip(tested.people.tolist(), tested.conditions.tolist(), strict=True)) == pairs.held_out
    with pytest.raises(LightningDiTError, match="'c9' is to be unseen; there are c0, c1"):
        unseen_condition(windows, "c9")
    with pytest.raises(LightningDiTError, match="nobody has two conditions"):
        unseen_pairs(walkers(3, 2, 2), walkers(3, 2, 2))


def test_a_classifier_learns_who_walks_and_the_seed_decides_everything() -> None:
    data, valid = walkers(3, 2, 8), walkers(3, 1, 4, seed=5)
    both = (data.pixels, data.people, (valid.pixels, valid.people), 3)
    run = train_classifier(*both, Recipe(steps=24, batch=12, looks=2), 0, True)
    assert run.valid_accuracy == 1.0
    test = walkers(3, 1, 4, seed=6)
    assert torch.equal(predicted(run.model, test.pixels), test.people)
    models = [train_classifier(*both, SHORT, seed, True).model for seed in (0, 0, 1)]
    first, again, other = (next(model.parameters()) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_look_is_kept_and_the_last_one_without_validation() -> None:
    data = walkers(3, 2, 8)
    recipe = Recipe(steps=10, batch=12, looks=10)
    wrong = (data.people + 1) % 3  # validation that wants what is never taught: the earliest, untrained looks are best
    kept = train_classifier(data.pixels, data.people, (data.pixels, wrong), 3, recipe, 0, False)
    assert kept.step < 10
    assert kept.valid_accuracy == float((predicted(kept.model, data.pixels) == wrong).double().mean())
    last = train_classifier(data.pixels, data.people, (data.pixels[:0], wrong[:0]), 3, recipe, 0, False)
    assert (last.step, last.valid_accuracy) == (10, None)


@pytest.mark.parametrize(("name", "size"), [("small", (16, 16)), ("small", (64, 40)), ("resnet18", (64, 40))])
def test_classifiers_take_windows_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = make_classifier(name, 5, size).eval()
    assert model(torch.zeros(2, 1, *size)).shape == (2, 5)
    if name == "small":
        weights = sum(weight.numel() for weight in model.parameters())
        assert 0.25e6 < weights - model.stem.weight.numel() < 0.35e6  # the stem's kernel grows with the window


def test_an_unknown_classifier_is_refused() -> None:
    with pytest.raises(LightningDiTError, match="'vgg' is unknown; small and resnet18 are there"):
        make_classifier("vgg", 2, (16, 16))


def test_classical_augmentation_moves_a_ridge_in_time_and_scales_its_speed_about_zero() -> None:
    pixels = torch.full((200, 1, 65, 24), -1.0)
    pixels[:, :, 62, 5] = 1.0  # 30 rows beyond velocity zero, row 32: 5 % are 1.5 rows
    changed = classically_augmented(pixels, torch.Generator().manual_seed(0))
    assert float(changed.abs().max()) <= 1
    rows, columns = np.unravel_index(changed[:, 0].flatten(1).argmax(1).numpy(), (65, 24))
    assert set(columns) == set(range(24))
    assert {61, 62, 63} <= set(rows) <= {60, 61, 62, 63, 64}
    middle = torch.full((50, 1, 65, 24), -1.0)
    middle[:, :, 32] = 1.0
    assert set(classically_augmented(middle, torch.Generator().manual_seed(1))[:, 0].mean(2).argmax(1).tolist()) == {32}


def test_trials_are_kept_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folds = tmp_path / "trials.json", {number: fold(number, made()) for number in range(2)}
    plan = Plan((0, 1), (3,), ("real", "2x", "alone"), 2, SHORT)
    trained: list[tuple[int, str, int]] = []
    real_trial = module._trial

    def counted(plan: Plan, number: int, images: int | None, row: str, seed: int, *rest: object) -> Trial:
        if len(trained) == stop:
            raise KeyboardInterrupt
        trained.append((number, row, seed))
        return real_trial(plan, number, images, row, seed, *rest)

    monkeypatch.setattr(module, "_trial", counted)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        run_trials(plan, folds.__getitem__, path)
    assert len(load_trials(path)) == 5
    stop = 100
    found = run_trials(plan, folds.__getitem__, path)
    assert len(trained) == len(set(trained)) == plan.count == 12
    assert [trial.name for trial in found[:4]] == [
        ("usual", 0, 3, "real", 0),
        ("usual", 0, 3, "2x", 0),
        ("usual", 0, 3, "alone", 0),
        ("usual", 0, 3, "real", 1),
    ]
    assert {(trial.row, trial.real, trial.generated, trial.validation) for trial in found} == {
        ("real", 9, 0, 24),
        ("2x", 9, 18, 24),
        ("alone", 0, 36, 24),
    }
    assert found[0].passes == tuple(folds[0].test.passes.tolist())
    assert run_trials(plan, folds.__getitem__, path) == found == load_trials(path)
    assert len(trained) == 12
    changed = {0: fold(0, made(30)), 1: folds[1]}  # other generated windows: only rows that use them are trained again
    changed[0] = replace(
        changed[0], generated=lambda images: Generated(-made().pixels, made().people, made().conditions)
    )
    run_trials(plan, changed.__getitem__, path)
    assert sorted(trained[12:]) == [(0, "2x", 0), (0, "2x", 1), (0, "alone", 0), (0, "alone", 1)]
    monkeypatch.setattr(module, "VERSION", 0)
    run_trials(Plan((1,), (3,), ("real",), 1, SHORT), folds.__getitem__, path)
    assert trained[16:] == [(1, "real", 0)]


def test_who_has_no_training_windows_in_a_scenario_is_not_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = fold(0, conditions=2)
    kept = torch.nonzero((data.training.conditions == 0) | (data.training.people > 0))[:, 0]
    alone = replace(data, training=subset(data.training, kept))  # person 0 trains under condition 0 alone
    plan = Plan((0,), (3,), ("real",), 1, SHORT, unseen_condition(data.test, "c0"))
    (found,) = run_trials(plan, lambda number: alone, tmp_path / "trials.json")
    assert set(found.people) == {1, 2}
    assert set(found.conditions) == {0}
    assert found.validation == 24
    assert "1 people have no training windows in the scenario 'unseen c0'" in capsys.readouterr().out


def test_a_trial_is_the_same_however_the_plan_was_cut(tmp_path: Path) -> None:
    data = fold(0, made())
    whole = run_trials(Plan((0,), (3,), ("real", "1x"), 1, SHORT), lambda number: data, tmp_path / "a.json")
    alone = run_trials(Plan((0,), (3,), ("1x",), 1, SHORT), lambda number: data, tmp_path / "b.json")
    assert whole[1] == alone[0]


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, int, tuple[torch.Tensor, torch.Tensor]]]:
    """Return recipe, seed and validation windows of each training, as they come; those that are timed do not count."""
    seen, real = [], module.train_classifier

    def spy(
        pixels: torch.Tensor, people: torch.Tensor, valid: tuple[torch.Tensor, torch.Tensor], classes: int,
        recipe: Recipe, seed: int, augmented: bool,
    ) -> object:  # fmt: skip
        if recipe.steps != module.TIMED_STEPS:
            seen.append((recipe, seed, valid))
        return real(pixels, people, valid, classes, recipe, seed, augmented)

    monkeypatch.setattr(module, "train_classifier", spy)
    return seen


def test_a_trial_trains_by_its_own_seed_and_looks_at_validation_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, data = trainings(monkeypatch), fold(0)
    run_trials(Plan((0,), (3,), ("real",), 3, SHORT), lambda number: data, tmp_path / "trials.json")
    assert [seed for _, seed, _ in seen] == [0, 1, 2]
    for _, _, (pixels, people) in seen:
        assert torch.equal(pixels, data.validation.pixels) and torch.equal(people, data.validation.people)


def test_a_trial_of_other_settings_or_windows_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch, other validation windows, and the same test windows in other passes, each change by itself."""
    seen, data = trainings(monkeypatch), fold(0)
    before = run_trials(Plan((0,), (3,), ("real",), 1, SHORT), lambda number: data, tmp_path / "before.json")
    moved = replace(data.test, passes=data.test.passes + 1000)
    others = [
        (replace(SHORT, batch=3), data),
        (SHORT, replace(data, validation=walkers(3, 2, 4, seed=44))),
        (SHORT, replace(data, test=moved)),
    ]
    for at, (recipe, windows) in enumerate(others):
        plan, path = Plan((0,), (3,), ("real",), 1, recipe), tmp_path / f"{at}.json"
        (found,) = run_trials(plan, lambda number, windows=windows: windows, path, before)
        assert (len(seen), seen[-1][0]) == (2 + at, recipe)
        assert found.passes == tuple(windows.test.passes.tolist())


def renamed(data: FoldData) -> FoldData:
    """Return the same windows with the first condition renamed so that it sorts last, and a window gone before them."""
    test = data.test
    names = (*(test.condition_names or ())[1:], "z")
    last = len(names) - 1
    numbers = torch.where(test.conditions == 0, last, test.conditions - 1)
    return replace(data, test=replace(test, conditions=numbers, condition_names=names, rows=test.rows - 1))


def test_kept_trials_are_read_with_the_windows_and_names_of_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A condition is renamed, and a window that no row uses is gone: pixels, people and passes are as before."""
    data, path = fold(0, conditions=2), tmp_path / "trials.json"
    first = subset(data.test, torch.nonzero((data.test.conditions == 0) | (data.test.people > 0))[:, 0])
    data = replace(data, test=first)  # fewer windows of c1 than of c0
    run_trials(Plan((0,), (3,), ("real",), 1, SHORT), lambda number: data, path)
    now = renamed(data)
    found = run_trials(Plan((0,), (3,), ("real", "augmented"), 1, SHORT), lambda number: now, path)
    assert f"note: {path} has trials under other names of people or conditions" in capsys.readouterr().out
    for trial in found:
        assert (trial.conditions, trial.windows) == (tuple(now.test.conditions.tolist()), tuple(now.test.rows.tolist()))
    counts = {name: int((first.conditions == at).sum()) for at, name in enumerate(first.condition_names or ())}
    (results,) = summarise(found)  # both rows were tested on the same windows
    by_name = {now.test.condition_names[at]: part.windows for at, part in results["real"].conditions.items()}
    assert by_name == {"z": counts["c0"], "c1": counts["c1"]}
    assert json.loads(path.read_text())["condition_names"] == ["c1", "z"]
    assert len(load_trials(path)) == 2
    shifted = replace(now, test=replace(now.test, rows=now.test.rows - 1))  # the names stay
    found = run_trials(Plan((0,), (3,), ("augmented",), 1, SHORT), lambda number: shifted, path)
    assert found[0].windows == tuple(shifted.test.rows.tolist())
    assert "1 trials were trained again" in capsys.readouterr().out


def test_what_cannot_be_tried_is_said(tmp_path: Path) -> None:
    path = tmp_path / "trials.json"
    with pytest.raises(LightningDiTError, match=r"row '3x' is unknown; real, augmented, 1x, 2x, 4x"):
        Plan(rows=("3x",))
    with pytest.raises(LightningDiTError, match="row 'real' is named more than once; fix: take each row once"):
        Plan(rows=("real", "1x", "real"))
    with pytest.raises(LightningDiTError, match="row '1x' needs generated windows for 30 images a person"):
        run_trials(Plan(rows=("1x",), recipe=SHORT), lambda number: fold(0), path)
    small = Generated(torch.zeros(3, 1, 8, 4), torch.arange(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(LightningDiTError, match="generated windows have 4x8 pixels, real ones 16x16"):
        run_trials(Plan(rows=("1x",), recipe=SHORT), lambda number: fold(0, small), path)
    with pytest.raises(LightningDiTError, match="no test windows are left in the scenario 'other'"):
        scenario = Scenario("other", frozenset({(7, 0)}))
        run_trials(Plan(recipe=SHORT, scenario=scenario), lambda number: fold(0), path)
    path.write_text("{}")
    with pytest.raises(LightningDiTError, match="holds no trials"):
        run_trials(Plan(recipe=SHORT), lambda number: fold(0), path)
    assert path.read_text() == "{}"


def trial(row: str, fold: int, seed: int, right: str, valid: float | None = 0.5, images: int = 30) -> Trial:
    """Return a trial of two people with three passes each in two folds; `right` has 1 for each window known rightly."""
    people = (0, 0, 0, 1, 1, 1)
    passes = tuple(10 * person + fold for person in people)
    seen = tuple(person if one == "1" else 1 - person for person, one in zip(people, right, strict=True))
    windows = tuple(range(6 * fold, 6 * fold + 6))
    return Trial("usual", fold, images, row, seed, 60, 60, 6, 100, valid, people, (0,) * 6, passes, windows, seen, "k")


def test_results_average_seeds_and_join_folds() -> None:
    trials = [
        *(trial("augmented", fold, seed, right) for fold, seed, right in [(0, 0, "111000"), (1, 0, "111110")]),
        *(trial("augmented", fold, seed, right) for fold, seed, right in [(0, 1, "111111"), (1, 1, "111110")]),
        *(trial("1x", fold, seed, "111111", 0.7) for fold in range(2) for seed in range(2)),
        *(trial("4x", fold, seed, "000000", 0.6) for fold in range(2) for seed in range(2)),
    ]
    (found,) = summarise(trials)
    base, once = found["augmented"], found["1x"]
    assert base.seeds == pytest.approx((8 / 12, 11 / 12))
    assert base.accuracy.value == pytest.approx(19 / 24)
    assert base.difference is None
    assert once.difference is not None
    assert once.difference.value == pytest.approx(5 / 24)
    assert (once.difference.windows, once.difference.passes) == (12, 4)
    assert {person: part.value for person, part in base.people.items()} == pytest.approx({0: 1.0, 1: 7 / 12})
    assert (once.real, once.generated, once.validation) == (60, 60, 6)
    assert found.judged == "1x"
    assert found.verdict is not None
    assert found.verdict.difference == once.difference
    assert np.allclose(pooled(trials).right["augmented"].mean(0)[3:6], [0.5, 0.5, 0.5])


def test_accuracies_are_shares_and_differences_may_exceed_them() -> None:
    """One training knows every window and the other none: with one degree of freedom all ends lie beyond 0 and 1."""
    rights = [("real", 0, "000000"), ("real", 1, "000000"), ("augmented", 0, "111111"), ("augmented", 1, "000000")]
    found = summarise([trial(row, fold, seed, right) for row, seed, right in rights for fold in range(2)])[0][
        "augmented"
    ]
    parts = [found.accuracy, *found.people.values(), *found.conditions.values()]
    assert [(part.value, part.low, part.high) for part in parts] == [(0.5, 0.0, 1.0)] * 4
    assert found.difference is not None
    assert found.difference.low < 0 and found.difference.high > 1


def test_folds_that_test_a_pass_twice_and_rows_with_other_windows_are_refused() -> None:
    twice = [trial("real", 0, 0, "111111"), replace(trial("real", 1, 0, "111111"), passes=(0, 0, 0, 10, 10, 10))]
    with pytest.raises(ValueError, match="a pass was tested in two folds"):
        pooled(twice)
    with pytest.raises(ValueError, match="different windows"):
        pooled([trial("real", 0, 0, "111111"), trial("1x", 1, 0, "111111")])


def test_the_row_of_the_verdict_is_chosen_by_validation_windows() -> None:
    def judged(**valid: float | None) -> str | None:
        trials = [trial(row, 0, 0, "111000", value) for row, value in valid.items()]
        return judged_row(summarise(trials)[0].rows)

    assert judged(augmented=0.9, **{"1x": 0.6, "2x": 0.7, "4x": 0.7, "filtered-1x": 0.8, "alone": 0.95}) == "2x"
    assert judged(**{"4x": None, "1x": None}) == "1x"
    assert judged(real=0.5, augmented=0.9) is None
    assert judged(real=0.5, **{"plain-2x": 0.5}) == "plain-2x"
    there = dict.fromkeys(ROWS)
    assert {row: base_of(row, there) for row in ("real", "augmented", "1x", "plain-1x", "alone")} == {
        "real": "real",
        "augmented": "real",
        "1x": "augmented",
        "plain-1x": "real",
        "alone": "augmented",
    }
    assert base_of("1x", {"real": 0, "1x": 0}) == "real"
    assert base_of("1x", {"1x": 0}) == "1x"


def test_the_file_of_trials_has_everything_by_name(tmp_path: Path) -> None:
    run_trials(Plan((0,), (None,), ("real",), 1, SHORT), lambda number: fold(0), tmp_path / "trials.json")
    content = json.loads((tmp_path / "trials.json").read_text())
    assert content["class_names"] == ["ID_0", "ID_1", "ID_2"]
    (entry,) = content["trials"]
    assert {"fold", "row", "seed", "people", "conditions", "passes", "predicted"} <= set(entry)
    entry["predicted"] = entry["predicted"][:-1]
    (tmp_path / "trials.json").write_text(json.dumps(content))
    with pytest.raises(LightningDiTError, match="have different lengths"):
        load_trials(tmp_path / "trials.json")
