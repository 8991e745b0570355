"""The study of solvers: measured errors of a small pipeline, and tables in closed form."""

import json

import pytest

import studies.solver_study as study
from tests.conftest import PROJECT

ROWS = [
    {"solver": "euler", "grid": "shift 0", "evaluations": 15, "error": 0.1, "seconds": 1.0},
    {"solver": "euler", "grid": "shift 0", "evaluations": 249, "error": 0.0073, "seconds": 9.0},
    {"solver": "calibrated", "grid": "fitted", "evaluations": 15, "error": 0.0087, "seconds": 1.0},
]
SETTING = {"start": 0.125, "noises": 8, "reference_error": 1e-5, "rows": ROWS}
CLOCK = {
    "images": 8,
    "machine": "a machine",
    "rows": [
        {"name": "published procedure", "evaluations": 249, "seconds": 60.0},
        {"name": "fast", "evaluations": 15, "seconds": 2.5},
    ],
}
IMAGES = {
    "count": 20,
    "rows": [{"solver": "fast", "evaluations": 15, "seconds": 3.2, "frechet": 1.0625, "accuracy": 0.9612}],
}


def test_tables_hold_a_row_for_every_solver_and_grid():
    lines = study.error_table(SETTING)
    assert "0.001%" in lines[0] and "t = 0.125" in lines[0]
    assert lines[2:6] == [
        "| solver | grid | 15 | 249 |",
        "|---|--:|--:|--:|",
        "| euler | shift 0 | 10.00 | 0.73 |",
        "| calibrated | fitted | 0.87 |  |",
    ]
    assert "| fast | 15 | 2.50 | 24.0 |" in study.clock_table(CLOCK)
    assert "| fast | 15 | 1.062 | 96.12% | 3 |" in study.image_table(IMAGES)
    row = {"solver": "ucgm", "guidance": "2 on all channels", "evaluations": 50, "error": 0.0229}
    judged = {**row, "solver": "fast", "frechet": 3.661, "accuracy": 0.92}
    lines = study.ucgm_table({"count": 100, "noises": 12, "rows": [row, judged]})
    assert lines[-3:-1] == [
        "| ucgm | 2 on all channels | 50 | 2.29 |  |  |",
        "| fast | 2 on all channels | 50 | 2.29 | 3.66 | 92% |",
    ]


def test_a_study_of_a_small_pipeline(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "STARTS", (0.125,))
    monkeypatch.setattr(study, "REFERENCE", ("ab3", 32))
    monkeypatch.setattr(study, "METHODS", ["euler", "heun", "ab2"])
    monkeypatch.setattr(study, "GRADED", ("ab2",))
    monkeypatch.setattr(study, "BUDGETS", (4, 8))
    monkeypatch.setattr(study, "EULER_BUDGETS", (4, 16))
    argv = ["--model", str(tiny_folder), "--noises", "3", "--output", str(tmp_path)]
    assert study.main([*argv, "--part", "errors"]) == 0
    settings = json.loads((tmp_path / "sampling" / "study.json").read_text())["errors"]["settings"]
    assert [setting["start"] for setting in settings] == [0.0, 0.125]  # the model's own, and the table's
    for setting in settings:
        errors = {(row["solver"], row["grid"], row["evaluations"]): row["error"] for row in setting["rows"]}
        assert {key[0] for key in errors} == {"euler", "heun", "ab2"}  # no solver file, so none is calibrated
        for solver, grid in {key[:2] for key in errors}:
            few, many = (errors[solver, grid, n] for n in ((4, 16) if solver == "euler" else (4, 8)))
            assert setting["reference_error"] < many < few
    assert (tmp_path / "sampling" / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert "| ab2 | graded |" in capsys.readouterr().out


def test_the_clock_times_each_solver_with_its_evaluations(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CLOCK_SOLVERS", [{"sampling_method": "euler"}, {"sampling_method": "fast"}])
    monkeypatch.setattr(study, "ROUNDS", 1)
    monkeypatch.setattr("LightningDiT.tools.benchmark.sampling.PUBLISHED_EVALUATIONS", 60)
    argv = ["--model", str(tiny_folder), "--noises", "2", "--output", str(tmp_path), "--part", "clock"]
    assert study.main(argv) == 0
    rows = json.loads((tmp_path / "sampling" / "study.json").read_text())["clock"]["rows"]
    found = [(row["name"], row["evaluations"]) for row in rows]
    assert found == [("published procedure, both halves always", 249), ("fast", 25), ("euler", 3)]  # the slowest first
    assert rows[0]["seconds"] > rows[1]["seconds"] > rows[2]["seconds"] > 0


@pytest.mark.parametrize("option", [["--noises", "0"], ["--part", "all"]])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(option)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_the_page_shows_what_the_last_study_measured():
    figures = json.loads((PROJECT / "docs" / "sampling" / "study.json").read_text())
    page = (PROJECT / "docs" / "sampling.md").read_text(encoding="utf-8")
    for part, (_, table) in study.PARTS.items():
        for line in table(figures[part]):
            assert line in page
