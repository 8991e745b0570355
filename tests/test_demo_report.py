"""The page of a demonstration: what it says, what a rerun keeps, and which files stay beside it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import step4_demo_inference
from LightningDiT import inference
from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.sampling.demo import RECORD, Demo, Record, Session
from LightningDiT.sampling.demo_report import write_report
from LightningDiT.sampling.resumable_run import RunResult
from setup_steps import project

SESSION = Session("2026-01-02 03:04:05+08:00", 2, 75.2, 12.1, 15, "2 x Tesla T4", "2.14.1", "float16")


class Page(HTMLParser):
    """The elements of a page: tags with attributes, texts by the language around them; refuses unbalanced tags."""

    EMPTY = ("meta", "img", "br", "!doctype")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"en": [], "zh-CN": []}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append((tag, dict(attrs).get("lang") or (self.open[-1][1] if self.open else "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1][0] != "style":
            self.texts[self.open[-1][1]].append(data.strip())

    def images(self) -> list[dict[str, str | None]]:
        return [found for tag, found in self.tags if tag == "img"]


@pytest.fixture
def simple_form(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small pipeline as step 3 left it, and the folder that the simple form of step 4 writes."""
    monkeypatch.setattr(project, "CONFIG", tiny_folder / "config.yaml")
    return tiny_folder / "my output"


def sampled(folder: Path) -> str:
    assert run_main(lambda: step4_demo_inference.main(["--output", str(folder)])) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_says_how_the_images_were_made_and_a_rerun_keeps_it(
    simple_form: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sampled(simple_form)
    page = Page(simple_form / "report.html")
    made = Record.read(next(simple_form.glob("run-*"))).sessions
    assert len(made) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", made[0].date)
    for fact in ("Seed", "0", "euler, 4 points, shift 0", made[0].date, torch.__version__, "float32", made[0].device):
        assert fact in page.texts["en"], fact
    assert {"样本图像", "设置", "随机种子", "引导强度", "日期", "设备", "精度", "重现命令"} <= set(page.texts["zh-CN"])
    assert not re.search("[\u4e00-\u9fff]", "".join(page.texts["en"]))
    command = page.texts["en"][-1]
    assert shlex.split(command)[1:] == ["step4_demo_inference.py", "--output", str(simple_form)]
    assert [image["alt"] for image in page.images()] == ["Sample 0: cat", "Sample 1: dog", "Sample 2: sea lion"]
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.images())
    assert not re.search(r"https?:|<script|<link|url\(", text)
    capsys.readouterr()
    assert sampled(simple_form) == text
    assert f"all of them made before: {made[0].seconds:.0f} s for sampling and decoding until {made[0].date}\n" in (
        capsys.readouterr().out
    )
    (next(simple_form.glob("run-*")) / RECORD).write_text("{")
    assert "No record of it is left." in sampled(simple_form)


def test_each_call_that_made_images_has_its_own_time(tiny_folder: Path) -> None:
    options = ["--config", str(tiny_folder / "config.yaml"), "--output", str(tiny_folder / "out"), "--demo"]
    assert inference.main([*options, "--count", "5", "--time-budget", "1e-9"]) == 0
    assert inference.main([*options, "--count", "5"]) == 0
    folder = next((tiny_folder / "out").glob("run-*"))
    assert [made.images for made in Record.read(folder).sessions] == [2, 3]
    for image in folder.glob("0*.png"):
        image.unlink()
    assert inference.main([*options, "--count", "5"]) == 0  # all anew
    assert [made.images for made in Record.read(folder).sessions] == [5]


def test_pictures_are_shown_at_their_size_and_small_ones_by_a_whole_factor(tiny_folder: Path) -> None:
    config = replace(load_config(tiny_folder / "config.yaml"), source="<b>&")
    files = [tiny_folder / f"{side}.png" for side in (256, 48)]
    for file in files:
        Image.new("RGB", (int(file.stem),) * 2).save(file)
    run = RunResult([*files, None], 2, 15, 75.2)
    demo = Demo(config, ["猫<", 'a "b"', "c"], run, tiny_folder / "g.png", 1.0, 3, tiny_folder, [SESSION, SESSION])
    page = Page(write_report(demo, tiny_folder / "r.html", "x 'a b'"))
    assert [(image["width"], image["height"], image.get("class")) for image in page.images()] == [
        ("256", "256", None),
        ("96", "96", "small"),
    ]
    assert [image["alt"] for image in page.images()] == ["Sample 0: 猫<", 'Sample 1: a "b"']
    assert "2 / 3. The time budget is over; run the same command again to continue." in page.texts["en"]
    assert page.texts["en"].count("1 min 15 s") == 2
    assert "<b>&" in page.texts["en"]


def test_every_rule_of_the_page_holds_within_it_alone(tiny_folder: Path) -> None:
    """A notebook shows the page in its own."""
    config = load_config(tiny_folder / "config.yaml")
    demo = Demo(config, [], RunResult([], 0, 0, 0.0), tiny_folder / "g.png", 1.0, 3, tiny_folder, [])
    write_report(demo, tiny_folder / "r.html", "x")
    style = (tiny_folder / "r.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    selectors = [one for rule in re.findall(r"([^{}]+)\{[^{}]*\}", style) for one in rule.split(",")]
    assert len(selectors) > 8
    assert all(one.strip().startswith(".ldit-report") for one in selectors)


def test_pictures_of_earlier_classes_go_and_others_stay(simple_form: Path) -> None:
    sampled(simple_form)
    old = ["00_cat.png", "01_dog.png", "02_sea_lion.png"]
    assert sorted(path.name for path in simple_form.glob("0*.png")) == old
    (simple_form / "00_mine.png").write_bytes((simple_form / "00_cat.png").read_bytes())
    (simple_form / "01_dog.png").write_bytes(b"changed")
    record = next(simple_form.glob("run-*")) / RECORD
    content = json.loads(record.read_text())
    content["copies"]["../precious.png"] = content["copies"]["00_cat.png"]
    record.write_text(json.dumps(content))
    (simple_form.parent / "precious.png").write_bytes((simple_form / "00_cat.png").read_bytes())
    config = simple_form.parent / "config.yaml"
    config.write_text(config.read_text().replace('"cat, house cat", dog', "猫, " + "狗" * 70))
    sampled(simple_form)
    new = ["00_mine.png", "00_猫.png", "01_dog.png", f"01_{'狗' * 50}.png", "02_sea_lion.png"]
    assert sorted(path.name for path in simple_form.glob("0*.png")) == sorted(new)
    assert (simple_form.parent / "precious.png").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "nan"},
        {"seconds": -1},
        {"load_seconds": "many"},
        {"images": None},
        {"images": 1e999},
        {"other": 1},
    ],
)
def test_a_damaged_record_is_none(change: dict[str, object], tmp_path: Path) -> None:
    Record([SESSION], {"a": "b"}).write(tmp_path)
    assert Record.read(tmp_path) == Record([SESSION], {"a": "b"})
    content = json.loads((tmp_path / RECORD).read_text())
    content["sessions"][0] |= change
    for damaged in (content, {**content, "sessions": 3}, {"sessions": []}, [], None):
        (tmp_path / RECORD).write_text(json.dumps(damaged))
        assert Record.read(tmp_path) == Record()
    (tmp_path / RECORD).unlink()
    assert Record.read(tmp_path) == Record()
