"""kaggle_micro_doppler.ipynb as Kaggle runs it: simulated walkers from a read-only project to the verdict, own data."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quickstart
from LightningDiT.radar.colour_maps import coloured
from LightningDiT.radar.level_images import load_windows
from tests.conftest import PROJECT
from tests.kaggle import (
    NOWHERE,
    RADAR_NOTEBOOK,
    Kaggle,
    cell,
    everything,
    kaggle_folders,
    nbformat,
    place_project,
    said,
)
from tests.walkers import render

TINY = {
    "PEOPLE": 3,
    "WINDOWS": 24,
    "SIZE": 16,
    "STEP6": "--images 3 --steps 1 --tokenizer-steps 1 --generated 1",
    "STEP7": "--steps 2 --seeds 1 --rows real,augmented,1x",
}


@pytest.fixture
def kaggle(tmp_path: Path) -> Kaggle:
    return kaggle_folders(tmp_path, RADAR_NOTEBOOK)


def until(ident: str) -> int:
    """Return the number of cells up to this one."""
    return 1 + [cell.id for cell in nbformat.read(RADAR_NOTEBOOK, as_version=4).cells].index(ident)


def shown(book: nbformat.NotebookNode, ident: str) -> str:
    """Return the HTML that a cell shows."""
    return cell(book, ident).outputs[-1].data["text/html"]


def pictures(html: str) -> list[np.ndarray]:
    """Return the pixels (H, W, 3) of the pictures in a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def seen_by(cell: Path, levels: Path) -> np.ndarray:
    """Return the pixels (N, H, W, 3) of the windows that a cell trained on, under every shift in time."""
    windows = load_windows(levels, cell / "split.json", "training").pixels[:, 0].numpy()
    turned = [np.roll(one, shift, -1) for one in windows for shift in range(one.shape[-1])]
    return coloured((np.stack(turned) + 1) / 2, "jet").astype(int)


def test_simulated_walkers_from_a_read_only_project_to_the_verdict(kaggle: Kaggle) -> None:
    """Offline; cells that run again find what they made."""
    place_project(kaggle.inputs / "datasets" / "someone" / "my project 图像")
    before = kaggle.close_inputs()
    lines = {**TINY, "RESULTS": str(kaggle.working / "my results")}
    book = kaggle.run(NOWHERE, lines=lines, again=("data", "step6", "step7"))
    assert "stopped" not in book.metadata, everything(book)
    assert kaggle.state_of_inputs() == before
    folder = kaggle.working / "my results" / "walkers-3x24-16px-quick"
    assert f"Preset 'quick', data {folder.parent / 'walkers-3x24'}, results in {folder}" in said(book, "choice")
    for ident, first, again in (
        ("data", "wrote 72 files, 0 were there", "wrote 0 files, 72 were there"),
        ("step6", "0 of 5 parts are there", "5 of 5 parts are there"),
        ("step7", "3 trainings of 2 steps", "wrote report.html"),
    ):
        assert first in said(book, ident)
        assert again in said(book, f"{ident}-again")
    assert "trainings of" not in said(book, "step7-again")

    levels, split = folder / "spectrograms" / "levels", folder / "spectrograms" / "split.json"
    windows = load_windows(levels, split, "training")
    real = [windows.pixels[int(torch.nonzero(windows.people == person)[0])] for person in range(3)]
    expected = [coloured((one[0].numpy() + 1) / 2, "jet") for one in real]
    for picture, wanted in zip(pictures(shown(book, "windows")), expected, strict=True):
        assert np.abs(picture.astype(int) - wanted).max() <= 1  # levels are rounded to 16 bits
    assert 'm/s <span lang="zh-CN">速度</span>' in shown(book, "windows")
    triples = pictures(shown(book, "generated"))
    assert len(triples) == 3 * (3 + 1)  # of each person, and the nearest
    made = folder / "adapted" / "fold0-3" / "transformer" / "generated" / "ID_1" / "000000.png"
    grey = np.asarray(Image.open(made)).astype(float) / 65535
    assert np.abs(triples[1].astype(int) - coloured(grey, "jet")).max() <= 1
    assert np.abs(triples[2].astype(int) - seen_by(folder / "adapted" / "fold0-3", levels)).max((1, 2, 3)).min() <= 1
    report = json.loads((folder / "verdict" / "report.json").read_text())
    page = shown(book, "verdict")
    assert report["verdict"]["zh"] in page
    assert page.count('<th scope="row">') == 3
    link = re.search(r'download="verdict-report.html" href="data:text/html;base64,([^"]+)"', page)
    assert link is not None
    assert base64.b64decode(link[1]) == (folder / "verdict" / "report.html").read_bytes()


def test_an_attached_folder_by_one_line(kaggle: Kaggle) -> None:
    place_project(kaggle.inputs / "project")
    data = kaggle.inputs / "datasets" / "me" / "my 录制" / "1"
    render(data, {"1": [4, 4, 4], "2": [4, 4, 4]})
    before = kaggle.close_inputs()
    book = kaggle.run(NOWHERE, cells=until("windows"), lines={"DATA": str(data)})
    assert "stopped" not in book.metadata, everything(book)
    assert said(book, "data") == ""
    folder = kaggle.working / "lightningdit" / "micro_doppler" / "datasets-me-my-录制-1-32px-quick" / "spectrograms"
    assert {row["person"] for row in json.loads((folder / "split.json").read_text())["windows"]} == {"ID_1", "ID_2"}
    assert "dB range unknown" in said(book, "step5")  # -45 to 0 is that of the simulated pictures
    assert len(pictures(shown(book, "windows"))) == 2
    assert kaggle.state_of_inputs() == before


def chosen(namespace: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Run the cell that chooses preset and folders with the functions of the cells before, and return all names."""
    book = nbformat.read(RADAR_NOTEBOOK, as_version=4)
    functions = cell(book, "project").source.partition("\nPROJECT = ")[0]
    names: dict[str, Any] = {}
    exec(cell(book, "settings").source + "\n" + functions, names)
    names.update(namespace, **settings)
    exec(cell(book, "choice").source, names)
    return names


def test_the_preset_follows_the_gpu_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = {"PROJECT": tmp_path, "WORKING": tmp_path / "none", "ATTACHED": tmp_path / "input"}
    monkeypatch.setattr(quickstart, "gpu_memory", lambda: 15 * 2**30)
    names = chosen(here)
    assert (names["PRESET"], names["NETWORKS"]) == ("standard", "")
    assert names["FOLDER"] == tmp_path / "micro_doppler" / "walkers-10x80-32px-standard"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen(here)["NETWORKS"] == "--models transformer"
    assert "diffusers is missing, so no U-Net is trained" in capsys.readouterr().out
    assert chosen(here, PRESET="quick")["NETWORKS"] == ""
    (tmp_path / "working").mkdir()
    monkeypatch.setattr(quickstart, "gpu_memory", lambda: 0)
    names = chosen(here, WORKING=tmp_path / "working")
    assert names["FOLDER"] == tmp_path / "working" / "micro_doppler" / "walkers-10x80-32px-quick"
    (tmp_path / "input" / "some-data").mkdir(parents=True)
    with pytest.raises(Exception, match=r"/input/other, which is not there; .*/input holds .*/input/some-data"):
        chosen(here, DATA=str(tmp_path / "input" / "other"))


def test_the_times_that_it_states_are_those_that_its_page_has_as_measured() -> None:
    words = " ".join(cell.source for cell in nbformat.read(RADAR_NOTEBOOK, as_version=4).cells).replace("\n", " ")
    times = re.findall(r"took ([0-9][0-9 mins]*s) on two CPU cores", words)
    assert len(times) == 3  # of the simulation, step 6 and step 7
    page = (PROJECT / "docs" / "radar.md").read_text(encoding="utf-8")
    assert [time for time in times if time not in page] == []
