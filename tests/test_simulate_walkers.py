"""The command that writes folders of simulated walkers."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar import pictures
from LightningDiT.radar.recording import Cutting, recording, windows_of
from LightningDiT.radar.sensor import Sensor
from LightningDiT.tools import simulate_walkers

SMALL = ("--people", "2", "--windows", "6", "--workers", "1")


def run(folder: Path, *options: str) -> int:
    return simulate_walkers.main(["--output", str(folder), *SMALL, *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".jpg", ".npy")
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walkers") / "new"
    assert run(folder) == 0
    return folder


def test_names_are_those_of_recordings(plain: Path) -> None:
    names = sorted(contents(plain))
    assert len(names) == 12
    for name in names:
        assert re.fullmatch(r"ID_([12])/ID\1_case1_1_Doppler\d+\.jpg", name)
    numbers = [int(re.search(r"Doppler(\d+)", name)[1]) for name in names if name.startswith("ID_2")]
    assert sorted(numbers) == [window.number for window in windows_of(0, 2, 0, 6, Cutting())]
    assert json.loads((plain / "walkers.json").read_text())["settings"]["windows"] == 6


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("people", "ID_7/ID7_case4_1_Doppler102.jpg"),
        ("conditions", "Backpack_free/ID_7/ID7_case4_1_Doppler102.jpg"),
        ("people-conditions", "07/Backpack_free/ID7_case4_1_Doppler102.jpg"),
    ],
)
def test_layouts(layout: str, name: str) -> None:
    assert pictures.path_of(layout, 7, 3, 102, "jpg") == name


def test_a_picture_is_the_window_in_the_colour_map(plain: Path, tmp_path: Path) -> None:
    window, decibels = next(recording(0, 1, 0, 6, Sensor(), Cutting()))
    with Image.open(plain / pictures.path_of("people", 1, 0, window.number, "jpg")) as image:
        assert (image.size, image.mode, image.format) == ((256, 256), "RGB", "JPEG")
        pixels = np.asarray(image).astype(float)
    exact = np.asarray(pictures.picture(decibels, "bilinear", "jet")).astype(float)
    assert np.sqrt(((pixels - exact) ** 2).mean()) < 25  # what JPEG loses of speckle in 8 bits
    blocks = np.asarray(pictures.picture(decibels, "nearest", "gray"))[:, :, 0]
    levels = np.rint(255 * np.clip(1 + (decibels - decibels.max()) / 45, 0, 1))
    np.testing.assert_array_equal(
        blocks, levels[:, (2 * np.arange(256) + 1) * 57 // 512]
    )  # each native column is there, unmixed


def test_arrays_are_the_windows_in_db(tmp_path: Path) -> None:
    assert (
        run(tmp_path, "--format", "npy", "--people", "1", "--layout", "people-conditions", "--conditions", "Bag_free")
        == 0
    )
    expected = {
        pictures.path_of("people-conditions", 1, 5, window.number, "npy"): decibels
        for window, decibels in recording(0, 1, 5, 6, Sensor(), Cutting())
    }
    assert contents(tmp_path).keys() == expected.keys()
    for name, decibels in expected.items():
        found = np.load(tmp_path / name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, decibels)


def test_two_processes_and_a_stopped_run_write_the_same_bytes(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--workers", "2") == 0
    whole = contents(tmp_path)
    assert whole == contents(plain)
    (tmp_path / min(whole)).unlink()
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert contents(tmp_path) == whole
    assert "wrote 6 files, 6 were there" in capsys.readouterr().out


def end_process(*_: object) -> None:
    os._exit(9)


@pytest.mark.skipif(sys.platform != "linux", reason="processes that share this test's change")
def test_a_process_that_is_killed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_walkers, "contents", end_process)
    with pytest.raises(LightningDiTError, match="a process of the simulation was ended.*; fix: add --workers 1"):
        run(tmp_path, "--workers", "2")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "new", "--dry-run", "--layout", "conditions") == 0
    assert "people 2, conditions 8, windows 96" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_conditions_are_a_set_and_options_without_effect_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    args = simulate_walkers.parse(["--output", "o", "--conditions", "Bag_line", "Normal_free", "Bag_line"])
    assert args.conditions == ["Normal_free", "Bag_line"]
    assert capsys.readouterr().out == ""
    simulate_walkers.parse(["--output", "o", "--format", "npy", "--colour-map", "gray"])
    assert capsys.readouterr().out == "note: --colour-map has no effect with --format npy\n"
    simulate_walkers.parse(["--check", "--dry-run"])
    assert capsys.readouterr().out == "note: --dry-run has no effect with --check\n"


@pytest.mark.parametrize(("option", "value"), [("--people", "100001"), ("--windows", "2001"), ("--windows", "0")])
def test_numbers_have_limits(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulate_walkers.parse(["--output", "o", option, value])
    assert stopped.value.code == 2
    assert f"argument {option}: '{value}' given, " in capsys.readouterr().err


def test_other_folders_stay_as_they_are(plain: Path, tmp_path: Path) -> None:
    before = contents(plain)
    with pytest.raises(LightningDiTError, match="holds walkers of other settings .seed: 0 there, 1 now.*; fix: choose"):
        run(plain, "--seed", "1")
    assert contents(plain) == before
    (tmp_path / "mine.txt").touch()
    with pytest.raises(LightningDiTError, match=r"holds mine\.txt, which no run of this command has written; fix:"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "walkers.json").write_text("[1")
    with pytest.raises(LightningDiTError, match=r"walkers\.json is damaged; fix: choose"):
        run(tmp_path)


def test_a_check_writes_nothing_and_states_both_splits(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate_walkers.main(["--check", "--people", "2", "--windows", "12"]) == 0
    found = re.findall(r"(at random|by pass) +([\d.]+) % right", capsys.readouterr().out)
    assert [name for name, _ in found] == ["at random", "by pass"]
    assert all(40 < float(value) <= 100 for _, value in found)
    with pytest.raises(LightningDiTError, match="needs two people and eight windows"):
        simulate_walkers.main(["--check", "--people", "1"])
