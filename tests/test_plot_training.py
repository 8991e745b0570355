"""Reading and drawing training logs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.tools import plot_training
from LightningDiT.training import curves
from LightningDiT.training.run_dir import RunDir


def write_run(folder: Path) -> Path:
    run = RunDir(folder)
    for step, loss in ((50, 0.9), (100, 0.5), (150, 0.4), (100, 0.6)):  # stopped, then resumed from step 50
        run.log({"step": step, "loss": loss, "seconds_left": 9.0})
    return folder / "log.jsonl"


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    rows = curves.read_log(write_run(tmp_path))
    assert [(row["step"], row["loss"]) for row in rows] == [(50, 0.9), (100, 0.6), (150, 0.4)]
    assert curves.quantities({"run": rows, "other": [{"step": 1, "loss": 1, "kl": 2}]}) == ["loss", "kl"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    log = write_run(tmp_path)
    with log.open("a") as stream:
        stream.write('{"step": 200, "lo')
    assert curves.read_log(log)[-1]["step"] == 150


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "is empty"), ("hello\n", "line 1: a JSON object"), ("[3]\n", "line 1")],
)
def test_other_files_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    with pytest.raises(LightningDiTError, match=message):
        curves.read_log(log)


def test_a_figure_has_a_panel_a_quantity(tmp_path: Path) -> None:
    rows = curves.read_log(write_run(tmp_path))
    figure = curves.draw({"a": rows, "b": [{"step": 50, "loss": 0.8, "kl": 3.0}]})
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "kl"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[50, 0.9], [100, 0.6], [150, 0.4]]
    assert len(figure.axes[1].lines) == 1  # run a has no kl


def test_a_run_has_one_colour_in_every_panel() -> None:
    runs = {"first": [{"step": 1.0, "loss": 2.0}], "second": [{"step": 1.0, "loss": 3.0, "cos_loss": 0.5}]}
    colours = [[line.get_color() for line in panel.lines] for panel in curves.draw(runs).axes]
    assert colours == [["C0", "C1"], ["C1"]]


def test_main_writes_a_png(tmp_path: Path) -> None:
    output = tmp_path / "curves.png"
    assert plot_training.main([str(write_run(tmp_path / "run")), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LightningDiTError, match=r"matplotlib is missing; fix: pip install -r requirements-dev\.txt"):
        curves.draw({"a": [{"step": 1, "loss": 2}]})
