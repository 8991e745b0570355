"""What a notebook shows of step 7; test_radar_notebook.py has the pictures and a report of one model."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.verdict.inline import real_windows, verdict
from LightningDiT.verdict.report import Report, write_report
from tests.test_demo_report import Page
from tests.test_verdict_report import AXES, results
from tests.walkers import prepared


def test_windows_of_people_evenly_from_all_with_axes_in_rows(tmp_path: Path) -> None:
    passes = {"1": [2, 2, 2], "2": [2, 2, 2], "10": [2, 2, 2]}
    folder = prepared(tmp_path, passes, name="Bag_line/ID_{person}/{number}.jpg")
    page = real_windows(folder / "levels", folder / "out" / "split.json", 2, known_sensor=False)
    assert re.findall(r'alt="([^"]+)"', page) == ["ID_1, Bag_line", "ID_10, Bag_line"]
    assert "speed, rows" in page
    assert "传感器未知" in page


def reported(folder: Path, *difference: float, call: str = "") -> Path:
    """Write a report of step 7 with one result for each difference."""
    found = [results(one) for one in difference]
    write_report(Report(found, ("a", "b"), None, AXES, "jet", {}, None, {}, (), "python", call=call), folder)
    return folder


def test_each_model_has_its_sentence_its_tables_and_its_report(tmp_path: Path) -> None:
    reported(tmp_path / "transformer", 0.05, 0.02)
    reported(tmp_path / "unet", 0.004)
    page = verdict(tmp_path)
    (tmp_path / "page.html").write_text(page)
    assert "生成数据的帮助不够" in "".join(Page(tmp_path / "page.html").texts["zh-CN"])
    assert re.findall(r"Generated windows (help|do not help enough):", page) == ["help", "do not help enough"]
    assert page.count("<table>") == page.count("30 images a person <span") == 3
    assert "<td>90.0 % (88.0 % to 92.0 %)</td><td>+5.0 (+3.0 to +7.0)</td>" in page  # 0.9 and 0.05, each +- 1.96 %
    links = re.findall(r'download="(\S+)" href="data:text/html;base64,([^"]+)"', page)
    assert [name for name, _ in links] == ["transformer-report.html", "unet-report.html"]
    assert base64.b64decode(links[1][1]) == (tmp_path / "unet" / "report.html").read_bytes()


def test_reports_of_earlier_calls_are_named_and_not_shown(tmp_path: Path) -> None:
    """Of one network in the folder itself, then of two, then of one of these; first all without a time, as before."""
    for name in ("", "transformer", "unet"):
        reported(tmp_path / name, 0.05)
    assert verdict(tmp_path).count("Generated windows help:") == 3
    for call, names, older in (
        ("2026-11-26T10:00:00", ("",), ["transformer/report.json", "unet/report.json"]),
        ("2026-11-26T11:00:00", ("transformer", "unet"), ["report.json"]),
        ("2026-11-26T12:00:00", ("unet",), ["report.json", "transformer/report.json"]),
    ):
        for name in names:
            reported(tmp_path / name, 0.05, call=call)
        page = verdict(tmp_path)
        assert page.count("Generated windows help:") == page.count("download=") == len(names)
        listed = ", ".join(str(tmp_path / name) for name in older)
        assert f"Not shown, since earlier calls wrote them: {listed} <" in page
        assert f"未显示（由更早的命令写入）：{listed}<" in page


def test_one_pass_has_no_interval_and_what_to_try_is_listed(tmp_path: Path) -> None:
    page = reported(tmp_path, 0.004) / "report.json"
    content = json.loads(page.read_text())
    row = content["results"][0]["rows"][0]
    row["accuracy"] |= {"value": 0.5, "low": None, "high": None}
    content["results"][0] |= {"images": None, "scenario": "unseen pairs"}
    page.write_text(json.dumps(content))
    shown = verdict(tmp_path)
    assert "<td>50.0 %</td><td></td>" in shown
    assert "all images a person, unseen pairs" in shown
    assert shown.count("<li>") == len(content["what_to_try"]) > 0


def test_what_is_no_report_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"report\.json, which step 7 writes"):
        verdict(tmp_path)
    (tmp_path / "report.json").write_text('{"format": "another"}')
    with pytest.raises(LightningDiTError, match=r"is no report of step 7 \(its format is not"):
        verdict(tmp_path)
