"""The study of solvers: measured errors of a small pipeline, and tables in closed form."""

import dataclasses
import json

import pytest
import torch

import studies.solver_study as study
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.transport import integrate_ode, time_grid
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
        "|---|---|---|---|",
        "| euler | shift 0 | 10.00 | 0.73 |",
        "| calibrated | fitted | 0.87 |  |",
    ]
    assert "| fast | 15 | 2.50 | 24.0 |" in study.clock_table(CLOCK)
    assert "| fast | 15 | 1.062 | 96.12% | 3 |" in study.image_table(IMAGES)


def test_tables_go_between_the_marks_and_leave_the_rest(tmp_path):
    page = tmp_path / "sampling.md"
    study.write_tables({"clock": CLOCK}, page)
    page.write_text(page.read_text().replace("# Sampling", "# Sampling\n\nProse.") + "\nEnd.\n")
    study.write_tables({"images": IMAGES, "errors": {"settings": [SETTING]}}, page)
    text = page.read_text()
    assert text.startswith("# Sampling\n\nProse.") and text.endswith("End.\n")
    assert "| fast | 15 | 1.062" in text and "24.0" not in text
    assert text.index("euler") < text.index("1.062")
    page.write_text("# Another page\n")
    study.write_tables({"clock": CLOCK}, page)
    assert page.read_text().startswith("# Another page\n") and "24.0" in page.read_text()


def test_a_study_of_a_small_pipeline(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "STARTS", (0.125,))
    monkeypatch.setattr(study, "REFERENCE", ("ab3", 32))
    monkeypatch.setattr(study, "METHODS", {"euler": 1, "heun": 2, "ab2": 1})
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


@pytest.mark.parametrize("channels", ["all", 3])
def test_the_published_procedure_gives_the_same_latents(tiny_folder, channels):
    pipe = LightningDiTPipeline.from_pretrained(tiny_folder)
    sample = dataclasses.replace(pipe.config.sample, cfg_interval_start=0.3, guided_channels=channels)
    labels, calls = [0, 2], []
    noise = torch.randn(2, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    handle = pipe.transformer.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    ours = study.published_procedure(pipe, sample, noise, labels)
    handle.remove()
    assert calls == [4] * 249  # both halves of two images at every step
    guided = pipe.guided(labels, sample)
    with torch.inference_mode():
        expected = integrate_ode(guided, noise, time_grid(250), "euler")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("option", [["--count", "25"], ["--count", "10"], ["--noises", "0"], ["--part", "all"]])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit) as caught:
        study.main(option)
    assert caught.value.code == 2 and capsys.readouterr().err


def test_the_page_shows_what_the_last_study_measured():
    figures = json.loads((PROJECT / "docs" / "sampling" / "study.json").read_text())
    page = (PROJECT / "docs" / "sampling.md").read_text(encoding="utf-8")
    for part in study.PARTS:
        for line in study.TABLES[part](figures[part]):
            assert line in page
