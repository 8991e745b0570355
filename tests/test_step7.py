"""Step 7 from a folder of step 6, or of another generator, to its report; what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import step7_judge_generated as step7
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import fingerprint
from LightningDiT.images import save_levels
from LightningDiT.radar.level_images import Windows, load_windows, open_level_files, open_levels
from LightningDiT.radar.split import PARENT, load_split, save_restricted, save_split
from LightningDiT.sampling.resumable_run import BY_CLASS, LAYOUT, LEVELS, PIXELS
from LightningDiT.verdict import judging
from LightningDiT.verdict.adapting import write_cells
from LightningDiT.verdict.cells import judged_models
from LightningDiT.verdict.classifiers import Recipe
from LightningDiT.verdict.generated import read_generated
from LightningDiT.verdict.intervals import HELPS, TOO_LITTLE, conclude
from LightningDiT.verdict.judging import Asked, Loader, Outcome, folder_of_windows
from LightningDiT.verdict.plan import cell_folder, load_plan, make_plan, save_plan
from LightningDiT.verdict.results import Results
from LightningDiT.verdict.rows import ROWS, spread, subset
from LightningDiT.verdict.speckle import fit_speckle, put_back
from LightningDiT.verdict.trials import Plan, load_trials, run_trials
from tests.test_verdict_report import interval, results
from tests.test_verdict_trials import fold
from tests.test_verdict_trials import made as generated
from tests.walkers import levels_of, prepared, render

SIDE, IMAGES, TIMES = 16, 6, 2
PASSES = {"1": [4, 4, 4, 4], "2": [4, 4, 4, 4], "10": [4, 4, 4, 4]}
SHORT = ("--steps", 2, "--seeds", 2)


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("walkers"), PASSES)


@pytest.fixture(scope="module")
def made(walkers: Path) -> Path:
    """Return a folder as step 6 leaves it: `TIMES` copies of each image, turned in time, as what was generated."""
    folder = walkers / "adapted"
    opened = open_level_files(walkers / "levels", walkers / "out" / "split.json")
    plan = make_plan("quick", opened, images=(IMAGES,), generated=TIMES, seeds=2)
    save_plan(plan, folder)
    write_cells(plan, folder, opened.split)
    cell = cell_folder(folder, 0, IMAGES)
    latents = {"split": {"digest": load_split(cell / "split.json").digest, "fold": 0, "part": "training"}}
    write(cell / "latents" / "manifest.json", latents)
    windows = load_windows(walkers / "levels", walkers / "out" / "split.json", "training")
    seen = subset(windows, spread(windows, IMAGES))
    pixels = torch.cat([seen.pixels.roll(3 + turn, -1) for turn in range(TIMES)])
    write_run(cell / "transformer", {"labels": seen.people.repeat(TIMES).tolist()}, pixels, list(seen.class_names))
    return folder


def write_run(run: Path, facts: Mapping[str, list[int]], pixels: torch.Tensor, names: list[str]) -> None:
    """Write weights, their choice, and the windows (N, 1, H, W) that they generated."""
    run.mkdir()
    (run / "transformer.safetensors").write_bytes(b"weights")
    write(run / "choice.json", {"text": "weights of step 7 are kept"})
    for at, label in enumerate(facts["labels"]):
        path = run / "generated" / names[label] / f"{at:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_levels(pixels[at : at + 1], [path])
    more = {"class_names": names, "sample": {}, "seed": 0, LAYOUT: BY_CLASS, PIXELS: LEVELS}
    weights = {"transformer": fingerprint(run / "transformer.safetensors")}
    write(run / "generated" / "manifest.json", {**facts, **more, "weights": weights})


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def run(capsys: pytest.CaptureFixture[str], *options: object, code: int = 0) -> str:
    assert run_main(lambda: step7.main([str(option) for option in options])) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_folds_that_could_be_tested_too(made: Path, walkers: Path) -> None:
    split = load_split(walkers / "out" / "split.json")  # four passes a person: the fifth fold tests nothing
    judged = judged_models(made, None)["transformer"]
    assert (split.folds, judging.wider_folds(judged, split)) == (5, (0, 1, 2, 3))
    assert judging.wider_folds(replace(judged, folds=(3, 0, 1)), split) == (3, 0, 1, 2)
    assert judging.wider_folds(replace(judged, folds=(3, 0, 1, 2)), split) == ()
    other = folder_of_windows(made, walkers / "levels", walkers / "out" / "split.json")  # of no generator of step 6
    assert judging.wider_folds(other, split) == ()


def test_a_folder_of_step_6_is_judged_and_the_same_command_trains_nothing_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNINGDIT_LANG", "zh")
    options = ("--adapted", made, "--output", tmp_path, "--rows", "real,1x,filtered-1x,4x", "--steps", 2)
    said = run(capsys, *options)
    assert "8 trainings of 2 steps" in said
    assert "fewer generated windows than 4 for each real one of 3 people, such as ID_1: 12 for 6" in said
    assert "No verdict: real + generated" in said or "do not help enough: real" in said
    assert "The smallest difference that this data can show is" in said
    assert "这些数据能显示的最小差异" in said
    assert said.splitlines()[-2].startswith("Next: ")
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["row"]: row for row in report["results"][0]["rows"]}
    assert [rows[name]["generated"] for name in ("real", "1x", "4x")] == [0, 18, 36]
    assert {row["real"] for row in rows.values()} == {18}
    assert rows["real"]["accuracy"]["windows"] == len(load_split(made.parent / "out" / "split.json").part("test"))
    assert report["facts"]["Weights and sampling, fold0-6"] == "guidance 1, seed 0; weights of step 7 are kept"
    assert report["fidelity"]["copies"]["samples"] == 1.0  # they are training windows, turned
    assert report["filter"]["kept"] <= 1
    assert (tmp_path / "report.html").read_text().count('<div class="triple">') == 4  # three people and the nearest
    before = (tmp_path / "trials.json").stat().st_mtime_ns
    assert "trainings of 2 steps" not in run(capsys, *options)
    assert (tmp_path / "trials.json").stat().st_mtime_ns == before


def test_what_is_read_is_what_was_generated(made: Path, walkers: Path) -> None:
    opened = open_level_files(walkers / "levels", walkers / "out" / "split.json")
    windows = load_windows(walkers / "levels", walkers / "out" / "split.json", "training")
    seen = subset(windows, spread(windows, IMAGES))
    found = read_generated(cell_folder(made, 0, IMAGES) / "transformer" / "generated", opened, 0)
    assert torch.equal(found.people, seen.people.repeat(TIMES))
    torch.testing.assert_close(found.pixels[: len(seen.people)], seen.pixels.roll(3, -1), rtol=0, atol=2 / 65535)


def test_any_generators_folders_are_judged(
    made: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cell_folder(made, 0, IMAGES) / "transformer" / "generated"
    shutil.copytree(folder, tmp_path / "own", ignore=shutil.ignore_patterns("*.json"))
    own = ("--generated", tmp_path / "own", "--levels", walkers / "levels")
    own = (*own, "--split-file", walkers / "out" / "split.json", "--images", IMAGES)
    said = run(capsys, *own, "--rows", "real,1x", "--output", tmp_path / "v", *SHORT, "--dry-run")
    assert "nothing shows what this generator saw" in said
    assert "4 trainings of 2 steps" in said
    assert not (tmp_path / "v").exists()
    test = load_windows(walkers / "levels", walkers / "out" / "split.json", "test")
    save_levels(test.pixels[:1], [tmp_path / "own" / "ID_10" / "000000.png"])
    said = run(capsys, *own, "--output", tmp_path / "v", *SHORT, code=1)
    assert "000000.png is the real window" in said
    (tmp_path / "own" / "ID_3").mkdir()
    save_levels(test.pixels[:1], [tmp_path / "own" / "ID_3" / "1.png"])
    assert "windows of 'ID_3', and the split has no such person" in run(
        capsys, *own, "--output", tmp_path / "v", *SHORT, code=1
    )
    shutil.rmtree(tmp_path / "own")
    said = run(capsys, *own, "--output", tmp_path / "v", *SHORT, code=1)
    assert f"{tmp_path / 'own'} is no folder of generated windows that is there; fix: generate them as levels" in said
    assert not (tmp_path / "v" / "trials.json").exists()  # none of these cost a training


def test_windows_of_8_bits_are_widened_and_counted(
    made: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_level_files(walkers / "levels", walkers / "out" / "split.json")
    (tmp_path / "ID_1").mkdir()
    Image.fromarray(np.full((SIDE, SIDE), 51, np.uint8)).save(tmp_path / "ID_1" / "0.png")
    found = read_generated(tmp_path, opened, 0)
    torch.testing.assert_close(found.pixels, torch.full((1, 1, SIDE, SIDE), 51 / 255 * 2 - 1))
    assert "note: 1 of 1 generated windows have 8 bits, the real ones have 16" in capsys.readouterr().out


def test_what_is_not_there_names_the_command_that_makes_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(capsys, "--adapted", tmp_path, code=1)
    assert f"there is no {tmp_path / 'plan.json'}, which step 6 writes; fix: python step6_adapt_models.py" in said
    said = run(capsys, "--adapted", made, "--unseen", "Bag", "--dry-run", code=1)
    assert "condition 'Bag' is to be unseen; the data has one condition alone; fix: omit --unseen" in said


def spoil(folder: Path, how: str) -> None:
    """Change one thing in a folder of step 6."""
    cell = cell_folder(folder, 0, IMAGES)
    run, split = cell / "transformer", load_split(cell / "split.json")
    if how == "weights":
        (run / "transformer.safetensors").write_bytes(b"other weights")
    elif how == "missing":
        shutil.rmtree(run / "generated")
    elif how == "incomplete":
        next((run / "generated" / "ID_2").glob("*.png")).unlink()
    elif how == "latents":
        write(cell / "latents" / "manifest.json", {"split": {"digest": split.digest, "fold": 0, "part": "test"}})
    elif how == "plan":
        write(folder / "plan.json", {**json.loads((folder / "plan.json").read_text()), "split": "another"})
    else:
        plan = load_plan(folder)
        whole = load_split(plan.split_file)
        training = [at for at, row in enumerate(whole.rows) if row.part == "training"]
        save_restricted(cell / "split.json", whole, plan.split_file, training[:-1], 0)
        digest = load_split(cell / "split.json").digest
        write(cell / "latents" / "manifest.json", {"split": {"digest": digest, "fold": 0, "part": "training"}})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "was generated by other weights than"),
        ("missing", "has no generated windows yet"),
        ("incomplete", "lacks 1 of 36 generated windows"),
        ("latents", "are not those of its training windows"),
        ("plan", "is another split than the one that"),
        ("images", "the generator of fold 0 saw 23 images, the classifiers see 18"),
    ],
)
def test_cells_that_say_nothing_about_unseen_passes_are_refused(
    made: Path, tmp_path: Path, how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "adapted")
    spoil(tmp_path / "adapted", how)
    said = run(capsys, "--adapted", tmp_path / "adapted", "--output", tmp_path / "v", *SHORT, code=1)
    assert message in said
    assert "step6_adapt_models.py" in said or how == "incomplete"
    assert not (tmp_path / "v" / "report.html").exists()
    assert not (tmp_path / "v" / "trials.json").exists()


def test_a_cell_that_trains_on_a_test_window_is_refused(made: Path, tmp_path: Path) -> None:
    """The split of the cell is one of another fold, whose training windows are tested in this one."""
    shutil.copytree(made, tmp_path / "adapted")
    plan = load_plan(tmp_path / "adapted")
    whole = load_split(plan.split_file)
    swapped = [type(row)(**{**row.__dict__, "parts": (row.parts[1], *row.parts[1:])}) for row in whole.rows]
    cell = cell_folder(tmp_path / "adapted", 0, IMAGES)
    save_split(cell / "split.json", Path("d"), Path("r"), swapped, {PARENT: whole.digest})
    with pytest.raises(LightningDiTError, match="is a test window of fold 0 and stands among the training"):
        judged_models(tmp_path / "adapted")


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return two people under two conditions, with their levels."""
    root = tmp_path_factory.mktemp("conditions")
    for person, condition, key in (("1", "fast", "1"), ("2", "fast", "2"), ("1", "slow", "3"), ("2", "slow", "4")):
        name = f"ID_{person}/ID{person}_case1_1_Doppler{{number}}.jpg"
        render(root / "data" / condition, {key: [4, 4, 4]}, name=name)
    return levels_of(root, str(SIDE))


@pytest.fixture(scope="module")
def without_pairs(conditions: Path) -> Path:
    """Return a folder of step 6 whose networks saw no unseen pair, in two folds: turned images of those they saw."""
    folder = conditions / "adapted"
    opened = open_level_files(conditions / "levels", conditions / "out" / "split.json")
    plan = make_plan("quick", opened, conditions, images=(IMAGES,), folds=(0, 1), generated=1, seeds=1, unseen="pairs")
    save_plan(plan, folder)
    write_cells(plan, folder, opened.split)
    for number in plan.folds:
        cell, windows = cell_folder(folder, number, IMAGES), plan.seen(opened.split, number, IMAGES).training
        latents = {"split": {"digest": load_split(cell / "split.json").digest, "fold": number, "part": "training"}}
        write(cell / "latents" / "manifest.json", latents)
        pixels = [torch.from_numpy(opened.read(row) * 2 - 1)[None] for row in windows.rows.tolist()]
        rows = [row.split(",") for row in (cell / "labels.csv").read_text().splitlines()[1:]]
        facts = {
            "labels": [int(row[0][3]) - 1 for row in rows],
            "conditions": [("fast", "slow").index(row[1]) for row in rows],
            "condition_names": ["fast", "slow"],
        }
        write_run(cell / "transformer", facts, torch.stack(pixels).roll(5, -1), list(windows.class_names))
    return folder


def test_an_unseen_condition_is_neither_trained_nor_validated(conditions: Path) -> None:
    judged = folder_of_windows(conditions, conditions / "levels", conditions / "out" / "split.json")
    loader = Loader(judged, Asked(unseen="slow"))
    assert loader(0).training.conditions.unique().tolist() == [0]
    assert loader.scenario(0).tested(loader(0).test).conditions.unique().tolist() == [1]
    pairs = Loader(judged, Asked(unseen="pairs"))
    held = pairs.scenario(0).held_out
    seen = set(zip(pairs(0).training.people.tolist(), pairs(0).training.conditions.tolist(), strict=True))
    assert held
    assert not held & seen


def test_generated_windows_of_unseen_pairs_are_judged_on_unseen_pairs_in_every_fold(
    without_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--adapted", without_pairs, "--output", tmp_path, "--rows", "real,1x", "--steps", 2, "--seeds", 2)
    said = run(capsys, *options)
    assert "unseen, by step 6: pairs; rows are tested on windows of it alone" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [results["scenario"] for results in report["results"]] == ["unseen pairs"]
    plan = load_plan(without_pairs)
    opened = open_level_files(plan.levels, plan.split_file)
    held = {number: plan.seen(opened.split, number, None).scenario.held_out for number in plan.folds}
    made = {trial.fold: trial for trial in load_trials(tmp_path / "trials.json") if trial.row == "1x"}
    for number, trial in made.items():
        assert set(zip(trial.people, trial.conditions, strict=True)) <= held[number]
        generated = Loader(judged_models(without_pairs)["transformer"], Asked())(number).generated(IMAGES)
        pairs = set(zip(generated.people.tolist(), generated.conditions.tolist(), strict=True))
        assert pairs & held[number]
    assert report["fidelity_of_folds"].keys() == {"0", "1"}
    assert report["facts"]["Fidelity and pictures: folds (of; time limit)"] == "0, 1"
    assert (tmp_path / "report.html").read_text().count('<div class="triple">') == 2 * 3  # two people and the nearest
    said = run(capsys, *options, "--unseen", "slow", code=1)
    assert "images, the classifiers see" in said
    assert "run step6_adapt_models.py --unseen slow with the same images" in said


def test_further_folds_are_left_out_when_time_is_up(
    without_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "LOOK_SECONDS", 0.0)
    asked = Asked(("real", "1x"), 1, Recipe(steps=1, batch=4, looks=1))
    found, _ = judging.judge(judged_models(without_pairs)["transformer"], asked, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fidelity_of_folds"].keys() == {"0"}
    assert report["facts"]["Fidelity and pictures: folds (of; time limit)"] == "0 (2; 0 min)"
    assert found.sentences[0][0].startswith("No verdict") and "give --seeds 3" in found.sentences[0][0]
    assert found.sentences[1][0].startswith("Warning: 100.0 % of the generated windows look like copies")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_cell_that_sees_an_unseen_pair_is_refused(without_pairs: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(without_pairs, tmp_path / "adapted")
    plan = load_plan(tmp_path / "adapted")
    whole, cell = load_split(plan.split_file), cell_folder(tmp_path / "adapted", 1, IMAGES)
    parts = {name: [at for at, row in enumerate(whole.rows) if row.parts[1] == name] for name in ("training", part)}
    seen = plan.seen(whole, 1, IMAGES)
    validating = None if part == "validation" else seen.validation.rows.tolist()
    kept = parts["training"] if part == "training" else seen.training.rows.tolist()
    save_restricted(cell / "split.json", whole, plan.split_file, kept, 1, validating)
    digest = load_split(cell / "split.json").digest
    write(cell / "latents" / "manifest.json", {"split": {"digest": digest, "fold": 1, "part": "training"}})
    with pytest.raises(LightningDiTError, match=f"among its {part} windows, and pairs is to be unseen"):
        judged_models(tmp_path / "adapted")


def test_a_row_has_speckle_put_back_by_the_tokenizer_of_step_6(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judging, "reconstructed", lambda config, weights, pixels: called.append(weights) or pixels / 2)
    called: list[Path] = []
    judged = judged_models(made)["transformer"]
    data = Loader(judged, Asked())(0)
    plain, speckled = data.generated(IMAGES), data.speckled(IMAGES)
    assert called == [cell_folder(made, 0, IMAGES) / "tokenizer" / "tokenizer.safetensors"]
    seen = data.training.pixels[spread(data.training, IMAGES)]
    torch.testing.assert_close(speckled.pixels, put_back(fit_speckle(seen, seen / 2), plain.pixels, 0))
    assert torch.equal(speckled.people, plain.people)
    assert data.speckled(None) is None
    assert data.made_for(ROWS["speckle-2x"]) is data.speckled
    folder = cell_folder(made, 0, IMAGES) / "transformer" / "generated"
    own = ("--generated", folder, "--levels", made.parent / "levels", "--split-file", made.parent / "out/split.json")
    said = run(capsys, *own, "--images", IMAGES, "--rows", "real,speckle-1x", "--output", tmp_path, *SHORT, code=1)
    assert "rows with speckle put back need the tokenizer of step 6" in said


def test_a_filtered_row_keeps_the_windows_of_the_filter(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third one here, by a filter that learns from the images that the generator saw and no others."""
    learnt: list[Windows] = []
    third = {"keeps": lambda windows: torch.arange(len(windows)) % 3 == 0}
    third |= {"real_kept": 0.9, "confidence": 0.5, "margin": 0.0}
    monkeypatch.setattr(
        judging, "fit_filter", lambda windows, steps: learnt.append(windows) or SimpleNamespace(**third)
    )
    data = Loader(judged_models(made)["transformer"], Asked(recipe=Recipe(steps=2)))(0)
    whole, kept = data.generated(IMAGES), data.filtered(IMAGES)
    assert torch.equal(kept.pixels, whole.pixels[::3]) and torch.equal(kept.people, whole.people[::3])
    assert torch.equal(learnt[0].rows, data.training.rows[spread(data.training, IMAGES)])


def test_fidelity_is_of_test_windows_and_of_those_that_the_generator_saw(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the verdict is about the difference that was asked for."""
    seen, real = list[tuple[Windows, Windows]](), judging.fidelity
    monkeypatch.setattr(judging, "fidelity", lambda made, *sets: seen.append((sets[0], sets[1])) or real(made, *sets))
    judged = judged_models(made)["transformer"]
    asked = Asked(("augmented", "1x"), 2, Recipe(steps=1, batch=4, looks=1), wanted=0.123)
    found, _ = judging.judge(judged, asked, tmp_path)
    data = Loader(judged, asked)(0)
    ((held, training),) = seen
    assert torch.equal(held.rows, data.test.rows)
    assert torch.equal(training.rows, data.training.rows[spread(data.training, IMAGES)])
    assert [one.verdict.wanted for one in found.results if one.verdict] == [0.123]


def test_a_second_model_takes_the_rows_without_generated_windows_from_the_first(tmp_path: Path) -> None:
    plan = Plan((0,), (4,), ("real", "1x"), 1, Recipe(steps=1, batch=4, looks=1))
    first = run_trials(plan, lambda number: fold(number, generated()), tmp_path / "a.json")
    other = run_trials(plan, lambda number: fold(number, generated(9)), tmp_path / "b.json", first)
    assert other[0] is first[0]
    assert other[1].key != first[1].key
    assert [trial.row for trial in load_trials(tmp_path / "b.json")] == ["1x"]
    data = fold(0)
    named = replace(data, test=replace(data.test, class_names=("a", "b", "c")))  # other people of the same pixels
    real = replace(plan, rows=("real",))
    assert run_trials(real, lambda number: data, tmp_path / "c.json", first)[0] is first[0]
    assert run_trials(real, lambda number: named, tmp_path / "d.json", first)[0].key != first[0].key


def test_all_verdicts_of_a_call_hold_together(
    made: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two networks of one number of images, and one of two numbers: two verdicts of 97.5 % each."""
    shutil.copytree(made, tmp_path / "a")
    plan = load_plan(tmp_path / "a")
    save_plan(replace(plan, models=(*plan.models, replace(plan.models[0], name="unet"))), tmp_path / "a")
    cell = cell_folder(tmp_path / "a", 0, IMAGES)
    shutil.copytree(cell / "transformer", cell / "unet")
    said = run(capsys, "--adapted", tmp_path / "a", "--output", tmp_path / "v", "--rows", "augmented,1x", *SHORT)
    assert said.count("(97.5 % interval ") == 2
    assert "Each of the 2 verdicts of this call has an interval of 97.5 %" in said
    for name in ("transformer", "unet"):
        (one,) = json.loads((tmp_path / "v" / name / "report.json").read_text())["results"]
        assert (one["verdict"]["verdicts"], one["verdict"]["difference"]["level"]) == (2, pytest.approx(0.975))
    files = cell / "transformer" / "generated", walkers / "levels", walkers / "out" / "split.json"
    judged = replace(folder_of_windows(*files), images=(4, IMAGES), folders={(0, 4): files[0], (0, IMAGES): files[0]})
    asked = Asked(("augmented", "1x"), 2, Recipe(steps=1, batch=4, looks=1))
    found, _ = judging.judge(judged, asked, tmp_path / "w")
    assert [one.verdict.verdicts for one in found.results if one.verdict] == [2, 2]


def test_rows_named_twice_are_trained_once(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--adapted", made, "--output", tmp_path, "--rows", "real,real,augmented")
    said = run(capsys, *options, *SHORT)
    assert "note: --rows names real more than once; each row is trained once" in said
    assert "4 trainings of 2 steps" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["row"] for row in report["results"][0]["rows"]] == ["real", "augmented"]


def test_a_renamed_condition_keeps_its_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three people under Alpha and two under Beta; Alpha becomes Zeta, so that the numbers of both are exchanged."""
    for condition, people in (("Alpha", "123"), ("Beta", "45")):
        render(tmp_path / "data" / condition, {person: [4, 4, 4] for person in people})
    levels_of(tmp_path, str(SIDE))
    files = ("--levels", tmp_path / "levels", "--split-file", tmp_path / "out" / "split.json")
    options = ("--generated", tmp_path / "g", *files, "--images", 1, "--output", tmp_path / "v", *SHORT)

    def windows() -> dict[str, int]:
        run(capsys, *options, "--rows", "real,augmented")
        rows = json.loads((tmp_path / "v" / "report.json").read_text())["results"][0]["rows"]
        return {name: part["windows"] for name, part in rows[0]["conditions"].items()}

    assert windows() == {"Alpha": 12, "Beta": 8}
    (tmp_path / "data" / "Alpha").rename(tmp_path / "data" / "Zeta")
    levels_of(tmp_path, str(SIDE))
    assert windows() == {"Zeta": 12, "Beta": 8}


def test_levels_that_were_written_again_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other pixels under the same names and of the same size."""
    data = prepared(tmp_path / "w", PASSES)
    save_plan(make_plan("quick", open_level_files(data / "levels", data / "out" / "split.json")), tmp_path / "adapted")
    shutil.copytree(data / "levels", tmp_path / "moved")
    levels_of(data, str(SIDE), "--colour-map", "gray")
    said = run(capsys, "--adapted", tmp_path / "adapted", "--output", tmp_path / "v", code=1)
    changed = (
        f"the levels in {data / 'levels'} were written again with other settings since {tmp_path / 'adapted'} began"
    )
    assert f"{changed}; fix: run step6_adapt_models.py again with another --output" in said
    moved = ("--levels", tmp_path / "moved")  # of the first call
    said = run(capsys, "--adapted", tmp_path / "adapted", "--output", tmp_path / "v", *moved, code=1)
    assert "began" not in said and str(cell_folder(tmp_path / "adapted", 0, 30) / "split.json") in said
    shutil.copytree(data / "levels", tmp_path / "other")
    moved = ("--levels", tmp_path / "other")
    said = run(capsys, "--adapted", tmp_path / "adapted", "--output", tmp_path / "v", *moved, code=1)
    assert f"the levels in {tmp_path / 'other'} are not those with which {tmp_path / 'adapted'} began" in said
    assert not (tmp_path / "v").exists()


def test_a_folder_of_an_earlier_release_is_judged_if_its_latents_are_of_the_levels(
    made: Path, walkers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "a")
    content = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert content.pop("levels_digest")
    write(tmp_path / "a" / "plan.json", content)
    cell = cell_folder(tmp_path / "a", 0, IMAGES)
    (cell / "tokenizer").mkdir()
    with pytest.raises(LightningDiTError, match=r"manifest.json does not say which levels its latents are of"):
        judged_models(tmp_path / "a")
    latents = json.loads((cell / "latents" / "manifest.json").read_text())
    plan = load_plan(tmp_path / "a")
    key = open_levels(walkers / "levels", cell / "split.json", "training", 0, plan.draws, plan.seed).key
    write(cell / "latents" / "manifest.json", {**latents, "settings": {"image_list": "of other levels"}})
    with pytest.raises(LightningDiTError, match="were written again with other settings since"):
        judged_models(tmp_path / "a")
    capsys.readouterr()
    write(cell / "latents" / "manifest.json", {**latents, "settings": {"image_list": key}})
    assert judged_models(tmp_path / "a").keys() == {"transformer"}
    assert f"note: the plan in {tmp_path / 'a'} is of an earlier release and names no levels" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_plan_leads_nowhere_else(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network whose name is a path: neither what it generated is read nor a report written there."""
    adapted, stranger = tmp_path / "project" / "adapted", tmp_path / "project" / "stranger"
    shutil.copytree(made, adapted)
    cell = cell_folder(adapted, 0, IMAGES)
    shutil.copytree(cell / "transformer", adapted / "stranger")
    write(stranger / "report.json", "precious")
    values = json.loads((adapted / "plan.json").read_text())
    models = [*values["models"], {**values["models"][0], "name": "../stranger"}]
    write(adapted / "plan.json", {**values, "models": models})
    before = contents(tmp_path)
    options = ("--adapted", adapted, "--output", tmp_path / "project" / "verdict", "--rows", "real,1x", *SHORT)
    said = run(capsys, *options, code=1)
    assert f"{adapted / 'plan.json'}: models: name is '../stranger'; transformer or unet is expected" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folds": ["0"]}, "folds is '0'; int is expected"),
        ({"folds": []}, "folds is (); one number from 0 or several, none twice, is expected"),
        ({"images": []}, "images is (); one number from 1 (null: all) or several, none twice, is expected"),
        ({"models": []}, "models is []; one network or several, none twice, is expected"),
        ({"seeds": -2}, "seeds is -2; a number from 1 to below 2^32 is expected"),
        ({"folds": [99]}, "fold 99 of"),
    ],
)
def test_a_plan_that_makes_no_sense_is_one_line(
    changed: dict[str, object], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "plan.json", {**json.loads((made / "plan.json").read_text()), **changed})
    said = run(capsys, "--adapted", tmp_path, "--output", tmp_path / "v", "--dry-run", *SHORT, code=1).splitlines()
    assert said[0] == "Step 7: does generated data help?" and message in said[1] and len(said) == 2


@pytest.mark.parametrize("name", ["report.html", "report.json", "trials.json"])
def test_files_of_others_in_the_output_stay(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is trained or written; so is a link."""
    options = ("--adapted", made, "--output", tmp_path / "v", "--rows", "augmented,1x", *SHORT)
    write(tmp_path / "v" / name, {"precious": 1})
    before = contents(tmp_path)
    for more in ((), ("--dry-run",)):
        said = run(capsys, *options, *more, code=1)
        assert f"{tmp_path / 'v' / name} cannot be written (this program did not write the one that is there)" in said
        assert contents(tmp_path) == before
    (tmp_path / "v" / name).rename(tmp_path / "mine")
    (tmp_path / "v" / name).symlink_to(tmp_path / "mine")
    said = run(capsys, *options, code=1)
    assert f"{tmp_path / 'v' / name} cannot be written (it is a link)" in said and "trainings of" not in said
    (tmp_path / "v" / name).unlink()
    for _ in range(2):  # the second time over its own
        run(capsys, *options)
    assert (tmp_path / "mine").read_text() == '{"precious": 1}'


def test_verdicts_of_other_calls_in_the_output_are_said(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 1x twice, then 2x twice, which are not alone; then 1x elsewhere, and after a call without a verdict."""
    monkeypatch.setenv("LIGHTNINGDIT_LANG", "zh")

    def judged(rows: str, output: str) -> str:
        options = ("--adapted", made, "--output", tmp_path / output, "--rows", rows, *SHORT)
        monkeypatch.setattr("sys.argv", ["step7_judge_generated.py", *map(str, options)])
        return run(capsys, *options)

    english = "The folder has had verdicts of other calls too: 95 % holds for the verdict of this call, not for those"
    chinese = "该文件夹中还有过其他命令的结论：95 % 的把握只针对本次命令的结论"
    calls = [("augmented,1x", "v", 0), ("augmented,1x", "v", 0), ("augmented,2x", "v", 1), ("augmented,2x", "v", 1)]
    for rows, output, said in (*calls, ("augmented,1x", "w", 0), ("real", "x", 0), ("augmented,1x", "x", 0)):
        found = judged(rows, output)
        page = (tmp_path / output / "report.html").read_text()
        assert (found.count(english), found.count(chinese), page.count(english), page.count(chinese)) == (said,) * 4


@pytest.mark.parametrize(
    ("difference", "given", "line"),
    [
        (0.05, (), "train your classifier on real windows and 2 generated ones for each, such as here"),
        (0.0, (), "look at the report; step 6 has larger presets"),
        (0.0, ("--generated", "g"), "adapt a generator to these windows"),
    ],
)
def test_what_comes_next_follows_from_the_verdict(difference: float, given: tuple[str, ...], line: str) -> None:
    judged = {"m": folder_of_windows(Path("here"), Path("l"), Path("s"), images=30)}
    found = {"m": Outcome([results(difference)], [], [("a", "b")], Path("v/report.html"))}
    assert line in next(step7.next_lines(step7.parse(list(given)), judged, found))
    assert list(step7.lines_of("m", found["m"]))[-1] == "wrote report.html, report.json and trials.json to v"


def test_the_next_line_names_the_largest_gain_that_is_sure(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two networks with two numbers of images, one gains 7 points and surely 2.0, the other 5 and surely 2.5."""
    cells = {(0, 30): Path("m/30"), (1, 30): Path("m/30b"), (0, 50): Path("m/50")}
    judged = {
        "m": folder_of_windows(Path("m"), Path("l"), Path("s")),
        "n": folder_of_windows(Path("n"), *[Path("s")] * 2),
    }
    judged = {name: replace(one, images=(30, 50), folders=cells) for name, one in judged.items()}
    judged["n"] = replace(judged["n"], folders={cell: Path(f"n/{cell[1]}") for cell in cells})
    assert judging.verdicts_of(judged.values()) == 4

    def found(difference: float, error: float, images: int) -> Results:
        verdict = conclude(interval(difference, error), verdicts=4)
        return replace(results(difference), images=images, verdict=verdict)

    outcomes = {
        "m": Outcome([found(0.07, 0.02, 30), found(0.0, 0.01, 50)], [], [], Path("m")),  # 2.50 standard errors: +2.0
        "n": Outcome([found(0.02, 0.002, 30), found(0.05, 0.01, 50)], [], [], Path("n")),  # +1.5 and +2.5
    }
    line = next(step7.next_lines(step7.parse([]), judged, outcomes))
    assert "such as n/50 of n, the verdict with the largest gain that is sure" in line
    assert [one.verdict.outcome for one in outcomes["m"].results if one.verdict] == [HELPS, TOO_LITTLE]
    assert "Each of the 4 verdicts of this call has an interval of 98.8 %" in next(step7.level_lines(outcomes))
    one = {"m": Outcome([results(0.05)], [], [], Path("m"))}
    assert list(step7.level_lines(one)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapted", "a", "--generated", "b"), "exclude each other"),
        (("--fold", "1"), "--fold goes with --generated"),
        (("--wanted", "3"), "--wanted takes a share"),
    ],
)
def test_options_that_go_with_others_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step7.parse(list(options))
    assert message in capsys.readouterr().err
