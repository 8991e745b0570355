"""The gallery: each image is the one that its command makes, and the bundled model's is as it would be made now."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT import inference
from LightningDiT.command import gallery
from LightningDiT.config import load_config
from LightningDiT.console import called_as
from LightningDiT.demo.choices import Model
from LightningDiT.demo.gallery import entries_of, numbers_of_all, page_html, page_markdown
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from tests.conftest import BUNDLED, PROJECT
from tests.test_views import levels_folder as levels_folder

OF_BUNDLED = PROJECT / "docs" / "gallery"
MOST_BYTES = 300_000


def made(folder: Path, *options: str) -> int:
    return gallery.main([str(folder / "config.yaml"), "--output", str(folder / "gallery"), *options])


def images(folder: Path) -> list[Path]:
    return sorted((folder / "gallery" / "images").glob("0*"))


def commands(page: str) -> list[str]:
    found = re.findall(r"<code>(.*?)</code>", page)
    return [command.replace("&#x27;", "'").replace("&quot;", '"') for command in found]


def test_the_command_below_an_image_makes_it(tiny_folder: Path) -> None:
    assert made(tiny_folder, "--seed", "3", "--guidance-scale", "1.5", "--solver", "ab2", "--steps", "6") == 0
    page = (tiny_folder / "gallery" / "index.html").read_text("utf-8")
    assert len(commands(page)) == len(images(tiny_folder)) == 3
    for command, file in list(zip(commands(page), images(tiny_folder), strict=True))[1:]:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "LightningDiT.inference"]
        target = tiny_folder / words[-1]
        assert inference.main([*words[3:-1], str(target)]) == 0
        [sample] = [np.asarray(Image.open(path)) for path in target.glob("0*.png")]
        shown = np.asarray(Image.open(file))
        assert shown.shape == (128, 128, 3)  # 16 pixels a side, eight times as large
        np.testing.assert_array_equal(shown, sample.repeat(8, 0).repeat(8, 1))


def test_the_same_command_goes_on_and_another_one_is_refused(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made(tiny_folder, "--time-budget", "0.000001") == 0
    assert "1 of 3 images" in capsys.readouterr().out
    assert len(commands((tiny_folder / "gallery" / "index.html").read_text("utf-8"))) == 1
    assert made(tiny_folder) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images(tiny_folder)}
    images(tiny_folder)[1].unlink()
    assert made(tiny_folder) == 0
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images(tiny_folder)}
    assert [old[0] for old in before.values()] == [new[0] for new in after.values()]
    assert [before[path][1] == after[path][1] for path in before] == [True, False, True]
    with pytest.raises(LightningDiTError, match="seed: 0 there, 1 now"):
        made(tiny_folder, "--seed", "1")
    assert made(tiny_folder, "--dry-run", "--seed", "1") == 0


def test_levels_under_every_condition_with_axes(levels_folder: Path) -> None:
    (levels_folder / "spectrograms.json").write_text('{"native_columns": 57}')
    model = Model("levels", load_config(levels_folder / "config.yaml"), "config.yaml")
    page = page_html(model, model.config, entries_of(model, None, []), 0)
    assert (page.count('class="plot"'), page.count("speed, m/s")) == (3, 3)
    assert made(levels_folder) == 0
    colour = np.asarray(Image.open(images(levels_folder)[0])).astype(int)
    assert np.ptp(colour, axis=-1).max() > 100
    file = levels_folder / "config.yaml"
    file.write_text(file.read_text().replace("num_classes: 3,", "num_classes: 3, num_conditions: 2,"))
    model = Model("levels", load_config(file), "config.yaml")
    entries = entries_of(model, numbers_of_all(model, None), [])
    assert [(entry.label, entry.condition) for entry in entries] == [(a, b) for b in range(2) for a in range(3)]
    assert "--classes dog --conditions 1 --count 1" in entries[4].command
    assert [entry.condition for entry in entries_of(model, numbers_of_all(model, ["none"]), [])] == [None] * 3


def test_a_thousand_classes_are_loaded_as_they_come_into_sight(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("ckpt_path: dit.pt\n")
    model = Model("imagenet", load_config(tmp_path / "config.yaml"), "config.yaml")
    entries = entries_of(model, numbers_of_all(model, None), ["--seed", "0"])
    assert len({entry.file for entry in entries}) == len({entry.caption for entry in entries}) == 1000
    assert entries[7].file == "images/0007.webp"  # 256 pixels
    numbers = [shlex.split(entry.command)[6] for entry in entries]
    assert model.labels.numbers(numbers) == list(range(1000))
    page = page_html(model, model.config, entries, 0)
    assert page.count('loading="lazy"') == page.count("<img ") == 1000
    assert len(page) < 600_000
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page)
    assert "<script src" not in page


def test_names_end_no_table_and_start_no_tag(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text('ckpt_path: a\ndata: {num_classes: 1, class_names: ["<b>|`x`"]}\n')
    model = Model("odd", load_config(tmp_path / "config.yaml"), "config.yaml")
    entries = entries_of(model, None, [])
    rows = [row for row in page_markdown(model, entries, 0).splitlines() if row.startswith("|")]
    assert len(re.findall(r"(?<!\\)\|", rows[2])) == 4
    assert "<b>" not in rows[2].partition("`")[0]
    assert "<b>|" not in page_html(model, model.config, entries, 0)


def test_the_gallery_in_docs_is_that_of_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    file = "models/fashion-mnist/config.yaml"
    model = Model("fashion-mnist", load_config(file), file)
    with called_as("lightningdit gallery"):
        entries = entries_of(model, None, ["--seed", "0"])
    assert (OF_BUNDLED / "index.html").read_text("utf-8") == page_html(model, model.config, entries, 0)
    assert (OF_BUNDLED / "README.md").read_text("utf-8") == page_markdown(model, entries, 0)
    files = [path for path in OF_BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {entry.file for entry in entries} <= {path.relative_to(OF_BUNDLED).as_posix() for path in files}
    assert json.loads((OF_BUNDLED / "images" / "manifest.json").read_text())["labels"] == list(range(10))
    for name in ("README.md", "README.zh-CN.md"):
        assert "docs/gallery/README.md" in (PROJECT / name).read_text("utf-8")
    pipe = LightningDiTPipeline.from_config(BUNDLED / "config.yaml", "cpu")
    [boot] = pipe(9, seed=0, indices=[0], output_type="np").images
    shown = np.asarray(Image.open(OF_BUNDLED / entries[9].file))[::4, ::4].astype(int)
    assert np.abs(shown - boot).max() <= 1  # other machines differ in the last bits
