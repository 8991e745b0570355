"""The study of guidance: what its rows, tables and page hold, and a whole one on a small pipeline."""

import dataclasses
import json
import shutil

import pytest

import studies.guidance_study as study
from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.tools.report import put_between_marks
from tests.conftest import BUNDLED, PROJECT
from tests.test_evaluate_bundled import data_root, model_folder  # noqa: F401 - fixtures

CASES = [
    (study.Case(study.AUTOGUIDANCE, "early", scale=2), 0.95, 0.9, 1.0625),
    (study.Case(study.CLASSIFIER_FREE, channels=3, scale=10), 0.94, 0.8, 2.0),
    (study.Case(study.CLASSIFIER_FREE, scale=4.5), 0.93, 0.7, 3.0),
    (study.Case(study.NONE), 0.8, 1.0, 4.0),
    (study.Case(study.CLASSIFIER_FREE, scale=2), 0.92, 0.6, 5.0),
    (study.Case(study.REAL), 0.9312, 1.001, 0.25),
]
DATA = {
    "settings": {
        "count": 20,
        "seed": 0,
        "weights": "0a",
        "solver": {"sampling_method": "ab3", "num_sampling_steps": 26, "time_grid": "graded", "timestep_shift": 0.0},
        "interval": [0.1, 1.0],
    },
    "guides": {"early": "1b"},
    "matches": [{"channels": 3, "scale": 10, "matched": 7.5, "noises": [7.0, 8.0], "times": [6.5, 8.25]}],
    "rows": [
        {"case": dataclasses.asdict(case), "accuracy": accuracy, "diversity": diversity, "frechet": frechet}
        for case, accuracy, diversity, frechet in CASES
    ],
}


def test_tables_are_sorted_and_hold_every_row():
    lines = study.rows_table(DATA)
    assert lines[0] == ("**20 images a row**, seed 0, ab3 with 26 points (graded grid), guidance from t = 0.1 to 1:")
    assert lines[2:10] == [
        "| guidance | guide | channels | scale | seen as asked | pairwise distance over real | Fréchet distance |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| real images |  |  |  | 93.12% | 1.001 | 0.250 |",
        "| none |  |  |  | 80.00% | 1.000 | 4.000 |",
        "| classifier-free |  | 3 | 10 | 94.00% | 0.800 | 2.000 |",
        "| classifier-free |  | all | 2 | 92.00% | 0.600 | 5.000 |",
        "| classifier-free |  | all | 4.5 | 93.00% | 0.700 | 3.000 |",
        "| autoguidance | early | all | 2 | 95.00% | 0.900 | 1.062 |",
    ]
    assert "| first 3 | 10 | 7.5 | 7 to 8 | 6.5 to 8.25 |" in study.matches_table(DATA)


def test_the_page_keeps_its_prose(tmp_path):
    page = tmp_path / "guidance.md"
    page.write_text("# Guidance\n\nProse.\n")
    put_between_marks(page, study.tables(DATA), "Guidance")
    page.write_text(page.read_text() + "\nEnd.\n")
    put_between_marks(page, study.tables({**DATA, "rows": DATA["rows"][:1], "matches": []}), "Guidance")
    text = page.read_text()
    assert text.startswith("# Guidance\n\nProse.\n") and text.endswith("End.\n")
    assert "| autoguidance | early |" in text and "classifier-free" not in text


def test_every_case_is_measured_once():
    matches = [{"channels": 3, "scale": 4, "matched": 2.0}, {"channels": 3, "scale": 10, "matched": 7.5}]
    cases = study.cases_of(["a", "b"], [2, 3], matches)
    assert len(set(cases)) == len(cases) == 2 + 2 + 4 + 2 + 1  # the matched 2 is among the scales
    assert study.Case(study.CLASSIFIER_FREE, channels=3, scale=10) in cases
    sample = load_config(BUNDLED / "config.yaml").sample
    guided = study.sample_of(study.Case(study.AUTOGUIDANCE, "b", scale=3), sample, {"b": PROJECT / "b.pt"})
    assert (guided.guide_ckpt, guided.cfg_scale, guided.guided_channels) == (str(PROJECT / "b.pt"), 3, "all")
    few = study.sample_of(cases[-2], sample, {})
    assert (few.guide_ckpt, few.cfg_scale, few.guided_channels) == (None, 10, 3)


@pytest.fixture
def model(model_folder, tmp_path):  # noqa: F811
    """A small pipeline with a judge and two guides, all of seeded weights."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_weights(folder / "transformer.safetensors")
    for name, factor in (("early", 0.5), ("late", 0.8)):
        changed = {key: value * (factor if key.startswith("blocks.") else 1.0) for key, value in weights.items()}
        save_weights(changed, folder / f"{name}.safetensors")
    return folder


def test_a_study_of_a_small_pipeline(model, data_root, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(study, "SOLVER", {**study.SOLVER, "sampling_method": "euler", "num_sampling_steps": 3})
    monkeypatch.setattr(study, "MATCH_NOISES", 2)
    monkeypatch.setattr(study, "MATCH_POINTS", 3)
    options = ["--data-root", data_root, "--model", model, "--count", "20", "--output", tmp_path / "docs"]
    argv = [*map(str, options), "--scales", "2", "--channels", "1", "--channel-scales", "3"]
    early, late = (["--guide", str(model / f"{name}.safetensors")] for name in ("early", "late"))
    file = tmp_path / "docs" / "guidance" / "study.json"

    def three_rows(self, case, figures, kept=study.Study.keep):
        kept(self, case, figures)
        if len(self.data["rows"]) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "keep", three_rows)
        assert run_main(lambda: study.main([*argv, *early])) == 130
    before = json.loads(file.read_text())
    assert len(before["rows"]) == 3
    capsys.readouterr()
    assert study.main([*argv, *early]) == 0
    assert "3 of 6 rows are there" in capsys.readouterr().out
    first = json.loads(file.read_text())
    assert first["rows"][:3] == before["rows"] and len(first["rows"]) == 6
    assert study.main([*argv, *late]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[:6] == first["rows"] and rows[6]["case"]["guide"] == "late" and len(rows) == 7
    figures = {(row["case"]["kind"], row["case"]["guide"]): row["frechet"] for row in rows}
    assert len(set(figures.values())) == 5  # real, none, classifier-free, two guides: other images each
    assert (tmp_path / "docs" / "guidance" / "scales.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "docs" / "guidance.md").read_text()
    for line in study.rows_table(json.loads(file.read_text())):
        assert line in page
    whole = file.read_bytes()
    assert run_main(lambda: study.main([*argv, "--count", "30"])) == 1
    assert "study of other settings (count: 20 there, 30 now)" in capsys.readouterr().err
    weights = load_weights(model / "late.safetensors")
    save_weights({name: 2 * value for name, value in weights.items()}, model / "late.safetensors")
    assert run_main(lambda: study.main([*argv, *late])) == 1
    assert "study of other guides (late: " in capsys.readouterr().err
    assert file.read_bytes() == whole
    for damaged in ("[]", "{"):
        file.write_text(damaged)
        assert run_main(lambda: study.main([*argv, *early])) == 1
        error = capsys.readouterr().err
        assert "study.json cannot be read" in error and error.count("\n") == 1


def test_guides_that_cannot_be_are_named_before_anything_is_measured(model, tmp_path, capsys):
    argv = ["--model", str(model), "--output", str(tmp_path / "docs"), "--guide"]
    other = tmp_path / "early.safetensors"
    for guides, message in (
        ([model / "early.safetensors", other], "have one name"),
        ([other], "the guide weights file"),
        ([model / "tokenizer.safetensors"], "no LightningDiT"),
    ):
        assert run_main(lambda guides=guides: study.main([*argv, *map(str, guides)])) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    "option", [["--channel-scales", "1e5"], ["--scales", "1"], ["--scales", "-2"], ["--channels", "0"]]
)
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(option)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_the_page_shows_what_the_last_study_measured():
    data = json.loads((PROJECT / "docs" / "guidance" / "study.json").read_text())
    page = (PROJECT / "docs" / "guidance.md").read_text(encoding="utf-8")
    for line in [*study.rows_table(data), *study.matches_table(data)]:
        assert line in page
