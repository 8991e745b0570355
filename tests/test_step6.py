"""Step 6 from levels to generated windows: three people, two training steps, and every file that step 7 reads."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import step6_adapt_models as step6
from LightningDiT.console import run_main
from LightningDiT.data.shards import LatentShards
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import fingerprint
from LightningDiT.radar.level_images import Windows, listed_windows, load_windows, open_level_files
from LightningDiT.radar.split import load_split, save_restricted
from LightningDiT.verdict import adapting, jobs, time_needed
from LightningDiT.verdict import plan as plan_module
from LightningDiT.verdict import seen as seen_module
from LightningDiT.verdict.adapting import counts_of, write_cells
from LightningDiT.verdict.generated import find_generated
from LightningDiT.verdict.intervals import student_quantile
from LightningDiT.verdict.plan import PRESETS, Model, Plan, load_plan, make_plan, save_plan
from LightningDiT.verdict.rows import Scenario, spread
from LightningDiT.verdict.seen import Seen, labels_text
from LightningDiT.verdict.time_needed import Costs, Estimate, estimate, fitted
from tests.walkers import levels_of, prepared, render

PASSES = {"1": [5, 4, 4], "2": [4, 4, 4], "3": [2, 1, 1]}
IMAGES = 3
OPTIONS = ("--images", str(IMAGES), "--steps", "2", "--tokenizer-steps", "2", "--generated", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("step6"), PASSES)


class InProcess:
    """Runs the commands of jobs here in place of processes of their own.

    Attributes:
        ran: the module of each.
        dies: the module that is killed before it starts.
    """

    def __init__(self, dies: str = "") -> None:
        self.dies, self.ran = dies, list[str]()

    def __call__(self, command: Sequence[str]) -> int:
        self.ran.append(command[0].rpartition(".")[2])
        if self.ran[-1] == self.dies:
            return -9
        return importlib.import_module(command[0]).main(list(command[1:]))


def call(data: Path, output: Path, *options: str) -> int:
    own = ("--levels", str(data / "levels"), "--split-file", str(data / "out" / "split.json"))
    return run_main(lambda: step6.main([*own, "--output", str(output), *options]))


def test_a_run_that_was_killed_goes_on_and_makes_what_step_7_reads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "adapted"
    monkeypatch.setenv("LIGHTNINGDIT_LANG", "zh")
    monkeypatch.setattr(jobs, "exit_code", killed := InProcess(dies="train"))
    assert call(data, output, *OPTIONS) == 1
    assert killed.ran == ["train_tokenizer", "extract_features", "extract_features", "train"]
    assert "failed with exit code -9" in capsys.readouterr().err
    monkeypatch.setattr(jobs, "exit_code", rest := InProcess())
    assert run_main(lambda: step6.main(["--output", str(output)])) == 0  # the folder knows what it is to hold
    assert rest.ran == ["train", "inference"]
    said = capsys.readouterr().out
    assert "3 of 5 parts are there" in said
    assert "下一步：判断生成的数据" in said
    assert said.splitlines()[-2] == f"Next: {said.splitlines()[-1].rpartition(chr(0xFF1A))[2]}"
    assert said.splitlines()[-2].endswith(f"step7_judge_generated.py --adapted {output}")
    monkeypatch.setattr(jobs, "exit_code", again := InProcess())
    assert call(data, output, *OPTIONS) == 0
    assert again.ran == []
    assert "its numbers of steps stay" in capsys.readouterr().out
    assert call(data, output, "--images", "2") == 1
    fix = "give its own too: --images 3 2, or choose another --output"
    assert f"a plan of other settings (images); fix: {fix}" in capsys.readouterr().err

    plan, cell = load_plan(output), output / "fold0-3"
    assert (plan.images, plan.folds, plan.generated, plan.steps) == ((IMAGES,), (0,), 2, 2)
    windows = load_windows(data / "levels", plan.split_file, "training")
    chosen = windows.rows[spread(windows, IMAGES)].tolist()
    whole, own = load_split(plan.split_file), load_split(cell / "split.json")
    assert own.parent == whole.digest == plan.split
    assert [at for at, row in enumerate(own.rows) if row.part == "training"] == chosen
    assert [row for row in own.rows if row.part in ("validation", "test")] == [
        row for row in whole.rows if row.part in ("validation", "test")
    ]
    shards = LatentShards(cell / "latents")
    assert shards.windows is not None
    assert sorted(set(shards.windows.tolist())) == chosen
    run = cell / "transformer"
    assert json.loads((run / "choice.json").read_text())["chosen"] in (1, 2)
    made = find_generated(run / "generated")
    real = Counter(whole.rows[at].person for at in chosen)
    assert real == {"ID_1": 3, "ID_2": 3, "ID_3": 2}
    assert Counter(made.people) == {person: 2 * number for person, number in real.items()}
    manifest = json.loads((run / "generated" / "manifest.json").read_text())
    assert plan.models[0].trainable == "bias"
    assert manifest["weights"]["adapter"] == fingerprint(run / "adapter.safetensors")
    assert manifest["weights"]["transformer"] == fingerprint(plan.models[0].start)
    assert plan.guidance == 1.0 and "cfg_scale" not in manifest["sample"]  # no guidance


def test_folds_and_numbers_of_images_join_a_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    first = make_plan("quick", opened, steps=70, tokenizer_steps=20, folds=[1])
    save_plan(first, tmp_path)

    def plan(**given: object) -> plan_module.Plan:
        return plan_module.asked_plan(tmp_path, data / "levels", data / "out" / "split.json", None, **given)[0]

    assert plan() == plan(folds=[1]) == plan(images=[30]) == first
    assert plan(folds=[0, 1]) == replace(first, folds=(1, 0))  # what was there comes first
    assert plan(folds=[2, 1], images=[None, 30]) == replace(first, folds=(1, 2), images=(30, None))
    for given, fix in (
        ({"folds": [0]}, "--folds 1 0"),
        ({"folds": [2], "images": [None]}, "--folds 1 2 --images 30 all"),
    ):
        with pytest.raises(LightningDiTError, match=f"fix: give its own too: {fix}, or choose another --output"):
            plan(**given)
    with pytest.raises(
        LightningDiTError, match=r"other settings \(folds, seed\); fix: choose another --output, or give"
    ):
        plan(folds=[0], seed=3)
    monkeypatch.setattr(time_needed, "measure", lambda plan, split: Costs(1.0, {"transformer": 1.0}))
    assert call(data, tmp_path, "--folds", "0", "1", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "has begun with this plan, which goes on" in said and "fold 1, 0" in said
    assert re.search(r"time           about .* of which trainings 1 min 30 s", said)  # one more cell of 20 and 70 steps
    assert call(data, tmp_path, "--folds", "1", "--dry-run") == 0
    assert "time  " not in capsys.readouterr().out


def test_levels_that_were_written_again_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows keep their names and sizes; pixels change, or the dB of their draws. The first ones come back at last."""
    monkeypatch.setattr(time_needed, "measure", lambda plan, split: Costs(1.0, {"transformer": 1.0}))
    root, output = prepared(tmp_path / "w", PASSES), tmp_path / "o"
    save_plan(make_plan("quick", open_level_files(root / "levels", root / "out" / "split.json")), output)
    for options in (("--colour-map", "gray"), ("--db-range", "-60", "0")):
        levels_of(root, "16", *options)
        assert call(root, output, "--dry-run") == 1
        said = capsys.readouterr().err
        assert (
            f"the levels in {root / 'levels'} were written again with other settings since {output} began; fix" in said
        )
    levels_of(root, "16", "--db-range", "-45", "0")  # which is what draws assume without it
    assert call(root, output, "--folds", "0", "1", "--dry-run") == 0
    text = (output / "plan.json").read_text()
    (output / "plan.json").write_text(re.sub(r',\s+"levels_digest": "\w+"', "", text))
    assert load_plan(output).levels_digest is None
    capsys.readouterr()
    assert call(root, output, "--dry-run") == 0
    assert f"note: the plan in {output} is of an earlier release and names no levels" in capsys.readouterr().out
    (output / "fold0-30" / "tokenizer").mkdir(parents=True)  # stopped in its training, before there were latents
    assert call(root, output, "--dry-run") == 0


def test_the_power_of_a_plan_is_that_of_all_its_verdicts(data: Path) -> None:
    """Two networks and two numbers of images: each verdict is taken at 98.75 %, with a larger Student's quantile."""
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    one = make_plan("quick", opened)
    four = make_plan("quick", opened, models=["transformer", "unet"], images=(2, None))
    tested = one.seen(opened.split, 0, 1).tested
    passes, people = len(tested.passes.unique()), len(tested.people.unique())
    freedom = passes - 1  # people with one tested pass each are one stratum
    assert passes == people

    def least(level: float) -> float:
        quantiles = student_quantile(freedom, (1 + level) / 2) + student_quantile(freedom, 0.8)
        return quantiles * adapting.PASS_DEVIATION / passes**0.5

    said = [adapting.power_line(plan, opened.split) for plan in (one, four)]
    assert f"of about {least(0.95):.0f} points and more will show, if" in said[0]
    assert f"of about {least(0.9875):.0f} points and more will show in each of 4 verdicts, if" in said[1]


def test_levels_are_those_of_the_whole_split_alone(data: Path, tmp_path: Path) -> None:
    split = load_split(data / "out" / "split.json")
    kept = [at for at, row in enumerate(split.rows) if row.part == "training"][::2]
    save_restricted(tmp_path / "own.json", split, data / "out" / "split.json", kept, 0)
    windows = load_windows(data / "levels", tmp_path / "own.json", "training")
    assert windows.rows.tolist() == kept
    text = (tmp_path / "own.json").read_text()
    (tmp_path / "own.json").write_text(text.replace(split.digest, "of others"))
    with pytest.raises(LightningDiTError, match=f"another split than.*--output {data / 'out'} "):
        open_level_files(data / "levels", tmp_path / "own.json")


def seen(people: list[int], conditions: list[int], held_out: set[tuple[int, int]] = frozenset()) -> Seen:
    """Return training windows of people a, b under conditions x, "y, z"."""
    count = len(people)
    rows = torch.arange(count)
    names = ("x", "y, z") if any(conditions) or held_out else None
    windows = Windows(
        torch.empty(count, 1, 0, 0), torch.tensor(people), torch.tensor(conditions), rows, rows, ("a", "b"), names, None
    )
    return Seen(windows, windows, windows, Scenario("unseen", frozenset(held_out)))


def test_each_round_of_labels_has_every_real_window_once() -> None:
    assert labels_text(seen([0, 1, 1], [0, 0, 0]), 2, set()).split() == ["class", *"abb" * 2]
    assert labels_text(seen([0, 1], [0, 1]), 1, {0, 1}) == 'class,condition\na,x\nb,"y, z"\n'


def test_unseen_pairs_are_asked_for_in_turn_with_the_seen_ones() -> None:
    """b lacks "y, z", which a shows; a lacks nothing. A condition that no network knows is not asked for."""
    lacking = seen([0, 0, 1, 1, 1], [0, 1, 0, 0, 0], {(1, 1)})
    rows = labels_text(lacking, 2, {0, 1}).splitlines()[1:]
    assert rows[:5] == ["a,x", 'a,"y, z"', "b,x", 'b,"y, z"', "b,x"]
    assert rows[7:] == ['b,"y, z"', "b,x", 'b,"y, z"']  # the turn goes on where the first round ended
    assert labels_text(lacking, 2, {0}).splitlines()[3:6] == ["b,x"] * 3


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three people under two conditions, with their levels."""
    root = tmp_path_factory.mktemp("conditions")
    for at, (condition, person) in enumerate(itertools.product(("fast", "slow"), "123")):
        name = f"ID_{person}/ID{person}_case1_1_Doppler{{number}}.jpg"
        render(root / "data" / condition, {str(at): [4, 4, 4]}, name=name)
    return levels_of(root, "16")


@pytest.mark.parametrize(("unseen", "held"), [("pairs", None), ("slow", {(0, 1), (1, 1), (2, 1)})])
def test_no_window_of_an_unseen_pair_trains_or_chooses(
    conditions: Path, tmp_path: Path, unseen: str, held: set[tuple[int, int]] | None
) -> None:
    opened = open_level_files(conditions / "levels", conditions / "out" / "split.json")
    plan = make_plan("quick", opened, tmp_path, images=(3,), folds=(0, 1), unseen=unseen)
    save_plan(plan, tmp_path / "o")
    assert load_plan(tmp_path / "o") == plan
    write_cells(plan, tmp_path / "o", opened.split)
    tested, asked = set(), set()
    for fold in plan.folds:
        lacking = set(plan.seen(opened.split, fold, 3).scenario.held_out)
        assert lacking == held if held else lacking
        own = load_split(tmp_path / "o" / f"fold{fold}-3" / "split.json")
        for part in ("training", "validation"):
            windows = listed_windows(own, part, fold)
            pairs = set(zip(windows.people.tolist(), windows.conditions.tolist(), strict=True))
            assert pairs and not pairs & lacking, part
        assert Counter(row.person for row in own.part("training", fold)) == {"ID_1": 3, "ID_2": 3, "ID_3": 3}
        assert own.part("test", fold) == opened.split.part("test", fold)
        tested |= lacking
        rows = (tmp_path / "o" / f"fold{fold}-3" / "labels.csv").read_text().splitlines()[1:]
        assert len(rows) == 4 * 9
        numbers = {(int(row[3]) - 1, ("fast", "slow").index(row[5:])) for row in rows}
        asked |= numbers & lacking
    assert asked == (tested if unseen == "pairs" else set())  # nobody teaches what slow is


def test_what_is_unseen_is_said_and_kept(
    conditions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_needed, "measure", lambda plan, split: Costs(1.0, {"transformer": 1.0}))
    monkeypatch.setattr(seen_module, "names_of_model", lambda path, key: None)
    assert call(conditions, tmp_path / "o", "--unseen", "slow", "--dry-run") == 0
    said = capsys.readouterr().out
    opened = open_level_files(conditions / "levels", conditions / "out" / "split.json")
    tested = {(row.person, row.pass_number) for row in opened.split.part("test") if row.condition == "slow"}
    assert f"power          {len(tested)} test passes: differences of about" in said
    assert len(tested) < len({(row.person, row.pass_number) for row in opened.split.part("test")})
    assert "unseen         fold 0: ID_1 slow, ID_2 slow, ID_3 slow; neither trained nor validated on" in said
    assert "note: no network learns what 'slow' is, so that no windows of it are generated" in said
    monkeypatch.setattr(seen_module, "names_of_model", lambda path, key: ("slow", "other"))
    assert call(conditions, tmp_path / "o", "--unseen", "slow", "--dry-run") == 0
    assert "note: no network" not in capsys.readouterr().out  # the weights that it starts from know
    assert call(conditions, tmp_path / "o", "--unseen", "Bag", "--dry-run") == 1
    assert "condition 'Bag' is to be unseen; there are fast, slow" in capsys.readouterr().err
    save_plan(make_plan("quick", opened, unseen="pairs"), tmp_path / "o")
    assert call(conditions, tmp_path / "o", "--dry-run") == 0
    assert "unseen         fold 0: ID_1" in capsys.readouterr().out
    assert call(conditions, tmp_path / "o", "--unseen", "slow") == 1
    assert "a plan of other settings (unseen)" in capsys.readouterr().err


def plan_file(data: Path, folder: Path) -> dict[str, object]:
    """Write the plan of one network with random weights; return its values."""
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    save_plan(make_plan("quick", opened, folder / "no models"), folder)
    return json.loads((folder / "plan.json").read_text())


ODD = (None, True, "", "x", [], {}, -1, 0, 1.5, 2**32, math.nan, ["x"], [-1], [math.nan], [0, 0])
OPTIONAL = ("tokenizer_start", "tokenizer_fingerprint", "unseen", "levels_digest", "start", "start_fingerprint")
SENSIBLE = {
    **{name: ["x"] for name in ("split", "split_file", "levels")},
    **{name: [None, "x"] for name in OPTIONAL},
    **{"guidance": [1.5], "seed": [0], "patience": [0]},
}


@pytest.mark.parametrize("name", [*(item.name for item in fields(Plan)), *(f"models.{f.name}" for f in fields(Model))])
def test_a_value_of_a_plan_that_makes_no_sense_is_named(data: Path, tmp_path: Path, name: str) -> None:
    """Of each field: another type, nothing, a negative number, no number, one that is too large."""
    values = plan_file(data, tmp_path)
    (model,), key = values["models"], name.removeprefix("models.")
    for odd in ODD:
        changed = {"models": [{**model, key: odd}]} if key != name else {key: odd}
        (tmp_path / "plan.json").write_text(json.dumps({**values, **changed}))
        if any(odd is one or (odd == one and type(odd) is type(one)) for one in SENSIBLE.get(key, [])):
            assert load_plan(tmp_path)
            continue
        with pytest.raises(LightningDiTError) as caught:
            load_plan(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / 'plan.json'}: ") and key in message and "\n" not in message, odd
        assert "expected; fix: restore that value, or run step6_adapt_models.py again with another" in message, odd


def test_a_plan_names_networks_of_the_table_each_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = plan_file(data, tmp_path)
    (model,) = values["models"]
    for models, message in (
        ([model, model], "models is ['transformer', 'transformer']; one network or several, none twice, is expected"),
        ([model, {**model, "name": "../stranger"}], "name is '../stranger'; transformer or unet is expected"),
        ([{**model, "trainable": "bias"}], "trainable is 'bias' without a start; all is expected"),
        ([{**model, "odd": 1}], "unknown key 'odd'"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps({**values, "models": models}))
        assert call(data, tmp_path, "--dry-run") == 1
        assert f"error: {tmp_path / 'plan.json'}: " in (said := capsys.readouterr().err) and message in said
    del values["images"]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert call(data, tmp_path, "--dry-run") == 1
    assert f"{tmp_path / 'plan.json'}: images is missing; fix: restore that value" in capsys.readouterr().err
    for text in ("[]", "{", '{"format": "another"}', "null"):
        (tmp_path / "plan.json").write_text(text)
        assert call(data, tmp_path, "--dry-run") == 1
        assert "plan.json is no plan of step 6 (" in capsys.readouterr().err


def test_weights_that_were_replaced_start_nothing_further(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_needed, "measure", lambda plan, split: Costs(1.0, {"transformer": 1.0}))
    start, output = tmp_path / "models" / "walkers", tmp_path / "o"
    start.mkdir(parents=True)
    files = [start / name for name in ("transformer.safetensors", "tokenizer.safetensors")]
    for file in files:
        file.write_bytes(b"first")
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    plan = make_plan("quick", opened, tmp_path / "models")
    assert plan.models[0].start_fingerprint == plan.tokenizer_fingerprint == fingerprint(files[0])
    save_plan(plan, output)
    assert call(data, output, "--folds", "0", "1", "--dry-run") == 0
    for file in files:
        file.write_bytes(b"other")
        assert call(data, output, "--folds", "0", "1", "--dry-run") == 1
        said = capsys.readouterr().err
        fix = "restore that file, or choose another --output"
        assert f"{file} has other weights than those with which {output} began; fix: {fix}" in said
        file.write_bytes(b"first")
    text = (output / "plan.json").read_text()
    (output / "plan.json").write_text(re.sub(r',\s+"(start|tokenizer)_fingerprint": "\w+"', "", text))
    assert load_plan(output).tokenizer_fingerprint is None
    asked = (output, data / "levels", data / "out" / "split.json", None)
    again, began = plan_module.asked_plan(*asked)
    assert again == began == plan  # which is saved, so that it is said once
    said = capsys.readouterr().out
    assert "of an earlier release and says nothing of the content of its starting weights; those that are" in said
    assert f"taken: {files[1]}, {files[0]}" in said
    shutil.rmtree(start)
    assert plan_module.asked_plan(*asked)[1].models[0].start_fingerprint is None  # whoever needs them says so


@pytest.mark.parametrize("name", ["split.json", "labels.csv", "tokenizer.yaml", "transformer.yaml"])
def test_files_of_others_in_a_cell_stay(
    data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    plan = make_plan("quick", opened, tmp_path / "no models", images=(IMAGES,))
    write_cells(plan, tmp_path, opened.split)
    adapting.check_files(plan, tmp_path, opened.split)  # its own may be written again
    write_cells(plan, tmp_path, opened.split)
    file = tmp_path / "fold0-3" / name
    own = file.read_bytes()
    for strange in (b"precious: 1\n", b"\xff\n"):
        file.write_bytes(strange)
        with pytest.raises(LightningDiTError, match=f"{name} cannot be written .this program did not write the one"):
            adapting.check_files(plan, tmp_path, opened.split)
        with pytest.raises(LightningDiTError, match=f"{name} cannot be written"):
            write_cells(plan, tmp_path, opened.split)
        assert file.read_bytes() == strange
    assert call(data, tmp_path, "--images", str(IMAGES), "--dry-run") == 1
    assert f"{file} cannot be written" in capsys.readouterr().err
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LightningDiTError, match=f"{name} cannot be written .it is a link"):
        adapting.check_files(plan, tmp_path, opened.split)
    file.unlink()
    write_cells(plan, tmp_path, opened.split)
    assert file.read_bytes() == own


IMPORTING = "from pathlib import Path\nimport signal, time\n{first}\nPath('up').touch()\ntime.sleep(20)\n"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", ["", "signal.signal(signal.SIGINT, signal.SIG_DFL)"])
def test_a_job_that_is_stopped_while_it_imports_is_stopped_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], sent: int, first: str
) -> None:
    """Python's own handler ends it by an exception, the system's by the signal."""
    (tmp_path / "importing.py").write_text(IMPORTING.format(first=first))
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)

    def stop() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    threading.Thread(target=stop, daemon=True).start()
    began = time.monotonic()
    job = jobs.Job("slow", ("importing",), tmp_path / "made")
    assert run_main(lambda: jobs.run_jobs([job]) or 0) == 130
    assert time.monotonic() - began < 15
    assert capfd.readouterr().err.startswith("stopped; finished work is kept")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_job_is_stopped_as_soon_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before Python has a handler; the signal waits until it has one, else it would end the process by itself."""
    (tmp_path / "importing.py").write_text(IMPORTING.format(first=""))
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)

    def started(command: Sequence[str], **more: object) -> subprocess.Popen[bytes]:
        process = popen(command, **more)
        process.send_signal(signal.SIGINT)
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", started)
    assert jobs.exit_code(("importing",)) == 130
    assert capfd.readouterr().err == "" and not (tmp_path / "up").exists()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])  # none is kept back here any longer


def test_a_job_is_run_as_python_m_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its arguments and its code; processes that it spawns find its functions."""
    text = """
import multiprocessing, sys
from pathlib import Path
def double(number):
    return 2 * number
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        Path("made").write_text(f"{pool.map(double, [21])} {sys.argv[1:]} {Path(sys.argv[0]).name}")
    sys.exit(7)
"""
    (tmp_path / "spawning.py").write_text(text)
    monkeypatch.setattr(jobs, "PROJECT", tmp_path)
    assert jobs.exit_code(("spawning", "--config", "c")) == 7
    assert (tmp_path / "made").read_text() == "[42] ['--config', 'c'] spawning.py"


def test_starts_are_the_walkers_then_the_garments(data: Path, tmp_path: Path) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")

    def starts() -> tuple[str | None, ...]:
        plan = make_plan("quick", opened, tmp_path, models=["transformer", "unet"])
        return plan.tokenizer_start, *(model.start for model in plan.models)

    assert starts() == (None, None, None)
    for name in ("fashion-mnist", "walkers"):
        for file in ("tokenizer.safetensors", "transformer.safetensors", "unet/transformer.safetensors"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        unet = str(tmp_path / name / "unet" / "transformer.safetensors") if name == "walkers" else None
        assert starts() == (str(tmp_path / name), str(tmp_path / name / "transformer.safetensors"), unet)


def test_of_walkers_biases_are_trained(data: Path, tmp_path: Path) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    for name in ("fashion-mnist", "walkers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "transformer.safetensors").touch()
    plan = make_plan("quick", opened, tmp_path, models=["transformer", "unet"])
    transformer, unet = plan.models
    assert (transformer.trainable, unet.trainable) == ("bias", "all")
    values = adapting.training_values(plan, transformer, opened.split, 0, 9)
    assert values["ckpt_path"] == values["train"]["weight_init"] == transformer.start
    assert values["adapter_path"] == "transformer/adapter.safetensors"
    assert (values["train"]["trainable"], values["optimizer"]["lr"]) == ("bias", 3e-3)
    whole = adapting.training_values(plan, unet, opened.split, 0, 9)
    assert (whole["ckpt_path"], whole["optimizer"]["lr"]) == ("unet/transformer.safetensors", 2e-3)
    assert "adapter_path" not in whole and whole["train"]["trainable"] == "all"
    made = {job.makes.name for job in adapting.jobs_of(plan, tmp_path, opened.split)}
    assert {"adapter.safetensors", "transformer.safetensors"} <= made
    assert "trains bias" in "\n".join(adapting.describe(plan, opened.split))
    (tmp_path / "walkers" / "transformer.safetensors").unlink()
    garments, _ = make_plan("quick", opened, tmp_path, models=["transformer", "unet"]).models
    assert garments.trainable == "all"
    asked = make_plan("quick", opened, tmp_path, models=["transformer", "unet"], trainable="lora")
    assert [model.trainable for model in asked.models] == ["lora", "all"]  # the U-Net has no start
    plan_module.save_plan(asked, tmp_path / "o")
    with pytest.raises(LightningDiTError, match="trainings of another part than all; fix: choose another --output"):
        plan_module.asked_plan(tmp_path / "o", data / "levels", data / "out" / "split.json", None, trainable="all")


def test_what_does_not_go_is_said_before_the_first_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    with pytest.raises(LightningDiTError, match="lacks training or test windows"):
        make_plan("quick", opened, folds=(4,))
    odd = prepared(tmp_path / "odd", {"1": [2, 2, 2], "2": [2, 2, 2]}, size="24")
    opened = open_level_files(odd / "levels", odd / "out" / "split.json")
    twice = make_plan("quick", opened, folds=(1, 0, 1), images=(30, None, 30), models=["transformer"] * 2)
    assert (twice.size, twice.folds, twice.images, len(twice.models)) == (24, (1, 0), (30, None), 1)
    with pytest.raises(LightningDiTError, match=r"24x24 pixels; unet takes squares whose sides are multiples of 16"):
        make_plan("quick", opened, models=["unet"])
    monkeypatch.setattr(time_needed, "measure", lambda plan, split: Costs(1.0, {"transformer": 1.0}))
    assert call(data, tmp_path / "o", "--dry-run", "--time-budget", "1") == 1
    assert "1 min leave 0% of the trainings' steps" in capsys.readouterr().err
    assert call(data, tmp_path / "o", "--dry-run", "--time-budget", "10") == 0
    assert "--time-budget 10 shortens the trainings" in (said := capsys.readouterr().out)
    assert re.search(r"time           about (9 min 5\d|10 min 0) s on this machine", said)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ({"3": [3, 3]}, r"one person \(ID_3\); a classifier tells two or more apart; fix: give step 5 a folder of two"),
        ({"1": [3], "2": [3]}, "nobody in .* walks in two passes, so no pass can be tested; fix: record a second pass"),
    ],
)
def test_people_who_cannot_be_told_apart_or_tested(passes: dict[str, list[int]], message: str, tmp_path: Path) -> None:
    made = prepared(tmp_path / "few", passes)
    with pytest.raises(LightningDiTError, match=message):
        make_plan("quick", open_level_files(made / "levels", made / "out" / "split.json"))


def test_time_by_hand(data: Path) -> None:
    """One tokenizer and two networks in two cells: every term written out, with numbers that no two share."""
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    plan = make_plan("quick", opened, models=["transformer", "unet"], images=(2, None), steps=700, tokenizer_steps=110)
    split = opened.split
    counts = counts_of(plan, split)
    training, validating = len(split.part("training")), len(split.part("validation"))
    assert counts == {(0, 2): 6, (0, None): training}
    costs = Costs(4.8, {"transformer": 1.92, "unet": 3.84})
    found = estimate(plan, split, costs)
    assert found.trainings == pytest.approx(2 * (110 * 4.8 + 700 * (1.92 + 3.84)))
    coded = 4.8 / 3 / 16  # of a window
    sampled = [26 * seconds / 3 / 64 + coded for seconds in (1.92, 3.84)]
    rest = coded * (8 * (6 + training) + 2 * validating)
    rest += sum(4 * (6 + training) * one + 2 * 4 * (time_needed.LOOK + 8 * 3 * one) for one in sampled)
    rest += 2 * 7 * time_needed.PROCESS  # tokenizer, two of latents, and training and sampling of each network
    assert found.rest == pytest.approx(rest)
    guided = estimate(replace(plan, guidance=1.5), split, costs)  # twice the evaluations, of samples and of looks
    twice = sum((4 * (6 + training) + 2 * 4 * 8 * 3) * (one - coded) for one in sampled)
    assert guided.total - found.total == pytest.approx(twice)
    more = estimate(plan, split, costs, [(0, None), (3, 2)])
    assert more.trainings == found.trainings / 2
    alone = estimate(replace(plan, images=(2,)), split, costs)
    assert more.rest == pytest.approx(alone.rest)
    shorter = fitted(plan, found, (rest + found.trainings / 2) / 60)
    assert (shorter.steps, shorter.tokenizer_steps) == (350, 55)
    assert fitted(plan, found, found.total / 60 + 1) is plan
    with pytest.raises(LightningDiTError, match=r"3 min leave 10% .*fix: give --time-budget 6 or"):
        fitted(plan, Estimate(1000, 80), 3)


def test_timing_gives_a_time_for_each_network(data: Path) -> None:
    opened = open_level_files(data / "levels", data / "out" / "split.json")
    costs = time_needed.measure(make_plan("quick", opened, batch=2), opened.split)
    assert costs.tokenizer > 0
    assert costs.networks.keys() == {"transformer"}


def test_presets_are_those_of_the_command() -> None:
    assert tuple(PRESETS) == step6.PRESETS
    assert step6.images("all") == "all"
    assert plan_module.cell_folder(Path("a"), 1, None) == Path("a/fold1-all")


def test_latents_that_were_begun_are_not_done(tmp_path: Path) -> None:
    job = jobs.Job("latents", ("LightningDiT.extract_features",), tmp_path / "manifest.json")
    for text, is_done in (('{"settings": {}}', False), ("{", False), ('{"settings": {}, "shards": []}', True)):
        job.makes.write_text(text)
        assert job.is_done is is_done
    job.makes.unlink()
    assert not job.is_done


def test_a_step_takes_what_the_fastest_pass_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 19.0, 20.0, 24.0, 30.0, 35.0])  # 1 s at first, then 9, 4 and 5
    monkeypatch.setattr(time_needed.time, "perf_counter", lambda: next(clock))
    network = torch.nn.Linear(2, 2)
    assert time_needed._step_seconds(network, network, torch.ones(1, 2)) == pytest.approx(1.2 * 4)
