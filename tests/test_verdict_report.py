"""The verdict in words, as a page and as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.metrics.copies import CopyRates
from LightningDiT.metrics.scores import Score
from LightningDiT.radar.sensor import Sensor
from LightningDiT.verdict.fidelity import Distance, FeatureScores, Fidelity, averaged
from LightningDiT.verdict.gait import axes_of
from LightningDiT.verdict.intervals import HELPS, HURTS, NO_VERDICT, TOO_LITTLE, Interval, conclude
from LightningDiT.verdict.pictures import encoded, ticks, triples
from LightningDiT.verdict.report import FilterReport, Report, as_json, filter_gain, mean_filter, page, write_report
from LightningDiT.verdict.results import Results, RowResult
from LightningDiT.verdict.rows import Generated
from LightningDiT.verdict.sentences import advice, certainty, copied, headline, shared_level
from tests.test_demo_report import Page
from tests.test_verdict_trials import walkers

AXES = axes_of({"native_columns": 16}, (16, 16), Sensor())


def interval(value: float, error: float = 0.01) -> Interval:
    return Interval(value, value - 1.96 * error, value + 1.96 * error, error, 400, 40, 3)


def results(difference: float, error: float = 0.01, alone: float = 0.8) -> Results:
    """Return results whose row 2x differs from real + classical augmentation by `difference`."""
    values = {"augmented": 0.85, "2x": 0.85 + difference, "filtered-2x": 0.85 + difference + 0.01, "alone": alone}
    groups = {0: interval(0.9), 1: interval(0.8)}
    rows = tuple(
        RowResult(
            row,
            interval(value),
            (value - 0.01, value + 0.01),
            groups,
            {0: interval(value)},
            "augmented",
            interval(value - 0.85, error) if row != "augmented" else None,
            60,
            120 if row != "augmented" else 0,
            24,
            0.7,
        )
        for row, value in values.items()
    )
    return Results("usual", 30, rows, "2x", conclude(interval(difference, error)), 0)


def found(texture: float = 0.05, copies: float = 0.05, ratio: float = 1.0) -> Fidelity:
    distances = [
        Distance("ridge", "m/s", 0.1 * ratio, 0.1, {0: (0.1, 0.1)}, (1.2, 1.3, 1.3), (0.0, 0.0)),
        Distance("texture", "levels", 0.01, 0.0, {0: (0.01, 0.0)}, (texture, 0.05, 0.05), (0.0, 0.0)),
    ]
    score = Score(0.5, 0.4, 0.6)
    scores = FeatureScores((9.0, 7.0), (score, score), None, 24)
    return Fidelity(distances, scores, CopyRates(copies, 0.05, 0.3), [("a note & more", "说明")])


@pytest.mark.parametrize(
    ("difference", "error", "outcome", "english", "chinese"),
    [
        (
            0.05,
            0.01,
            HELPS,
            "help: real + generated 2x is 5.0 points above real + classical augmentation (95 % inter",
            "有帮助",
        ),
        (0.02, 0.005, HELPS, "interval +1.0 to +3.0), less than the 3 asked for.", "低于要求的 3 个"),
        (
            -0.04,
            0.01,
            HURTS,
            "Generated windows hurt: real + generated 2x is 4.0 points below real +",
            "低 4.0 个百分点",
        ),
        (
            0.004,
            0.01,
            TOO_LITTLE,
            "+2.4), and the interval ends below the 3 points asked for.",
            "低于要求的 3 个百分点。",
        ),
        (
            0.04,
            0.03,
            NO_VERDICT,
            "(95 % interval -1.9 to +9.9), so a gain of the 3 points asked for is possible, and so is none.",
            "有可能达到要求的 3 个百分点，也有可能没有增益。",
        ),
        (
            0.1,
            0.04,
            NO_VERDICT,
            "(95 % interval +2.2 to +17.8), less than what this data can show.",
            "小于这些数据能显示",
        ),
    ],
)
def test_the_first_sentence_says_by_how_much_and_how_sure(
    difference: float, error: float, outcome: str, english: str, chinese: str
) -> None:
    one = results(difference, error)
    assert one.verdict is not None
    assert one.verdict.outcome == outcome
    said = headline(one)
    assert english in said[0]
    assert chinese in said[1]
    starts = {HELPS: "Generated windows help: ", HURTS: "Generated windows hurt: ", NO_VERDICT: "No verdict: "}
    assert said[0].startswith(starts.get(outcome, "Generated windows do not help enough: "))


def test_the_second_sentence_says_what_could_be_shown() -> None:
    said = certainty(results(0.0, 0.03))
    assert said[0].startswith(
        "The smallest difference that this data can show is 8.4 points (80 % power); 3 are asked for."
    )
    assert "400 windows from 40 passes of 2 people; seeds averaged: 2." in said[0]
    assert (
        "comes from passes and trainings of the classifier, not from windows. The generator was trained once" in said[0]
    )
    assert "生成模型在每一折只训练了一次" in said[1]
    assert "8.4" in said[1] and "40 段行走" in said[1]
    endless = Interval(0.1, -math.inf, math.inf, math.inf, 9, 1, 3)
    alone = replace(results(0.0), verdict=conclude(endless))
    assert certainty(alone)[0].startswith("One pass alone was tested")
    assert "(95 % interval –)" in headline(alone)[0]
    assert advice(alone, None, None)[0][0].startswith("Try more and fewer")
    once = replace(results(0.0), verdict=conclude(replace(interval(0.1), seeds=1)))
    assert certainty(once)[0].startswith("One training of each row was tested") and "--seeds 3" in certainty(once)[1]
    assert headline(once)[0].startswith("No verdict") and headline(once)[0].endswith("too unsure to tell.")
    assert advice(once, None, None)[0][0].startswith("Try more and fewer")
    nothing = replace(results(0.0), judged=None, verdict=None)
    assert headline(nothing)[0] == "No row with real and generated windows was tried."
    assert advice(nothing, found(), None) == []


def test_several_verdicts_say_the_level_of_each() -> None:
    """Six verdicts: 1 - 0.05 / 6 is 99.17 %, and 2.64 standard errors."""
    six = replace(results(0.05), verdict=conclude(interval(0.05), verdicts=6))
    assert "5.0 points above real + classical augmentation (99.2 % interval +2.4 to +7.6)" in headline(six)[0]
    assert "（99.2 % 区间 +2.4 至 +7.6）" in headline(six)[1]
    assert "this data can show is 3.5 points" in certainty(six)[0]  # 2.64 + 0.84
    line = "Each of the 6 verdicts of this call has an interval of 99.2 %, so that all of them hold together at 95 %"
    assert shared_level(6)[0].startswith(line) and "6 个结论各用 99.2 %" in shared_level(6)[1]
    assert shared_level(1) == ("", "")
    several = replace(report(), results=[six])
    content, text = as_json(several), page(several)
    assert line in content["verdict"]["en"] and shared_level(6)[1] in content["verdict"]["zh"] and line in text
    assert content["results"][0]["verdict"]["difference"]["level"] == pytest.approx(1 - 0.05 / 6)
    assert content["results"][0]["rows"][1]["difference"]["level"] == 0.95
    assert "verdicts of this call" not in page(report())


def test_what_to_try_follows_from_what_was_measured() -> None:
    def tried(one: Results, *args: object) -> str:
        return "\n".join(text[0] for text in advice(one, *args))

    assert tried(results(0.05), found(0.01, 0.9, 9.0), 0.1) == ""  # it helps enough
    more = "about 314 passes show 3 points; 40 were tested"  # 40 (8.4 / 3)^2
    assert tried(results(0.0, 0.03), None, None).startswith(f"Record more: {more}")
    others = "Test all folds (step6_adapt_models.py --folds 0 1 4 adds them), or record more: "
    assert others + more in tried(results(0.0, 0.03), None, None, (0, 1, 4))
    assert "about" not in tried(results(0.0), None, None)
    assert "about" not in tried(results(-0.04, 0.03), None, None)  # 3 points are ruled out
    settled = "Record more: about 43 passes give a verdict if the difference stays; 40 were tested."
    assert tried(results(0.02, 0.0105), None, None) == settled  # 40 (1.96 * 1.05 / 2)^2
    luck = replace(interval(0.0, 0.03), seed_error=0.022)  # more than half of the variance
    by_seeds = replace(results(0.0), verdict=conclude(luck))
    assert "about 24 seeds show 3 points (--seeds); 3 were trained" in tried(by_seeds, None, None)  # 3 (8.4 / 3)^2
    by_passes = replace(results(0.0), verdict=conclude(replace(luck, seed_error=0.021)))
    assert "about 314 passes" in tried(by_passes, None, None)
    assert "Generated windows have 80 % of the texture" in tried(results(0.0), found(texture=0.04), None)
    assert "Against copies of training windows take earlier weights" in tried(results(0.0), found(copies=0.2), None)
    assert "gait of generated windows is farther" in tried(results(0.0), found(ratio=1.6), None)
    assert "filtered windows are +3.0 points better" in tried(results(0.0), found(), 0.03)
    assert "filter" not in tried(results(0.0), found(), 0.027)  # 2.8 standard errors of 0.01 can be shown
    assert "teach little about who walks" in tried(results(0.0, alone=0.6), found(), None)
    assert tried(results(0.0), found(), -0.01).startswith("Try more and fewer generated windows")
    assert all(re.search("[\u4e00-\u9fff]", text[1]) for text in advice(results(0.0, 0.03), found(0.01, 0.9, 9), 0.1))


def test_more_copies_than_twice_the_held_out_rate_are_said_whatever_the_verdict_is() -> None:
    assert copied(None) == copied(found(copies=0.1)) == ("", "")
    said = copied(found(copies=0.11))
    assert said[0].startswith("Warning: 11.0 % of the generated windows look like copies of training windows; 5.0 % of")
    assert "10.0 % are allowed" in said[0]
    assert "11.0 %" in said[1] and "10.0 %" in said[1]
    one = replace(report(), fidelity={0: found(copies=0.08), 1: found(copies=0.14)})  # it helps, and is too like
    assert copied(found(copies=0.11))[0] in as_json(one)["verdict"]["en"]
    assert copied(found(copies=0.11))[1] in as_json(one)["verdict"]["zh"]
    text = page(one)
    assert text.index("Warning: 11.0 %") < text.index("</div>", text.index('<div class="verdict"'))
    assert "counts as 5 % at least): not passed" in text
    assert "not passed" not in page(report()) and "): passed." in page(report())


def test_folds_are_averaged_and_each_shows_its_pictures() -> None:
    first, other = found(0.02, 0.04), found(0.04, 0.08, 3.0)
    lacking = replace(other, distances=[replace(other.distances[0], people={0: (0.3, 0.5), 1: (0.4, 0.2)})])
    mean = averaged([first, lacking])
    ridge, texture = mean.distances
    assert (ridge.generated, ridge.real) == pytest.approx((0.2, 0.1))
    assert ridge.people == {0: (0.2, 0.3), 1: (0.4, 0.2)}
    assert (texture.means[0], texture.people) == (0.02, first.distances[1].people)
    assert (mean.copies.samples, mean.copies.held_out) == pytest.approx((0.06, 0.05))
    assert (mean.features.frechet, mean.features.windows, mean.features.recall) == ((9.0, 7.0), 48, None)
    assert mean.features.precision is not None and mean.features.precision[0] == Score(0.5)
    assert mean.notes == (("a note & more", "说明"),)
    assert averaged([first]) is first
    kept = mean_filter([FilterReport(0.5, {0: 0.2, 1: 0.4}, 0.9, 0.3, 1.0), FilterReport(0.7, {1: 0.8}, 0.8, 0.5, 2.0)])
    assert (kept.kept, kept.real_kept, kept.confidence, kept.margin) == pytest.approx((0.6, 0.85, 0.4, 1.5))
    assert kept.people == pytest.approx({0: 0.2, 1: 0.6})
    content, text = as_json(report()), page(report())
    assert [content["fidelity_of_folds"][fold]["distances"][0]["generated"] for fold in "02"] == [0.1, 0.2]
    assert content["fidelity"]["distances"][0]["generated"] == pytest.approx(0.15)
    assert "Means of 2 folds." in text
    assert text.index("Fold 2") > text.index("Real, generated, nearest")


def report() -> Report:
    real, held = walkers(3, 2, 4), walkers(2, 1, 4, 10, seed=1)
    made = Generated(real.pixels[:16].roll(3, -1) * 0.5, real.people[:16], real.conditions[:16])
    kept = FilterReport(0.75, {0: 0.5, 1: 1.0}, 0.88, 0.3, -0.2)
    shown = triples(made, held, real, 2)
    facts = [("Classifier", "分类器", "small <b>")]
    names = ("ID_1<", "ID_2", "ID_3")
    by_fold = {0: found(), 2: found(0.03, ratio=2.0)}, kept, {0: shown, 2: shown[:2]}
    return Report([results(0.05)], names, ("line", "free"), AXES, "jet", *by_fold, facts, "step7 'a b'")


def test_the_page_holds_everything_in_both_languages(tmp_path: Path) -> None:
    html, _ = write_report(report(), tmp_path)
    read, text = Page(html), html.read_text(encoding="utf-8")
    english, chinese = " ".join(read.texts["en"]), " ".join(read.texts["zh-CN"])
    assert not re.search("[\u4e00-\u9fff]", english)
    assert not re.search(r"https?:|<script|<link|url\(", text)
    for said in ("Generated windows help: ", "90.0 % (", "+5.0 (+3.0 to +7.0)", "75.0 %", "a note & more", "small <b>"):
        assert said in english, said
    for said in ("生成数据有帮助", "按人员", "按条件", "真实 + 传统增强", "最近的训练窗口", "重现命令"):
        assert said in chinese, said
    assert {"speed, m/s", "time, s", "ID_1<"} <= set(read.texts["en"])
    images = read.images()
    assert len(images) == 3 * 3 + 2 * 3  # two people and the nearest, and of the other fold one person fewer
    assert [image["alt"] for image in images][:2] == ["ID_1<: real, held out", "ID_1<: generated"]
    assert read.texts["en"][-1] == "step7 'a b'"
    dots = [tag for tag in read.tags if tag[1].get("class") == "dot"]
    assert len(dots) == 4


def test_every_rule_of_the_page_holds_within_it_alone(tmp_path: Path) -> None:
    style = (
        write_report(report(), tmp_path)[0].read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    )
    selectors = [one for rule in re.findall(r"([^{}]+)\{[^{}]*\}", style) for one in rule.split(",")]
    assert len(selectors) > 30
    assert all(one.strip().startswith(".ldit-report") for one in selectors)


def test_the_json_has_every_number_by_name_and_no_infinity(tmp_path: Path) -> None:
    _, path = write_report(report(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["outcome"] == HELPS
    (one,) = content["results"]
    assert one["verdict"]["smallest_difference"] == pytest.approx(0.028, rel=1e-3)
    assert one["verdict"]["is_enough"] is True
    assert [row["row"] for row in one["rows"]] == ["augmented", "2x", "filtered-2x", "alone"]
    assert one["rows"][1]["people"]["ID_1<"]["value"] == 0.9
    assert one["rows"][1]["conditions"]["line"]["value"] == pytest.approx(0.9)
    assert content["filter"]["kept"] == 0.75
    assert content["fidelity"]["copies"] == {"samples": 0.05, "held_out": 0.05, "threshold": 0.3}
    endless = Interval(0.1, -math.inf, math.inf, math.inf, 9, 1, 3)
    unsure = replace(report(), results=[replace(results(0.05), verdict=conclude(endless))], fidelity={}, filter=None)
    verdict = as_json(unsure)["results"][0]["verdict"]
    assert verdict["difference"]["low"] is verdict["smallest_difference"] is None
    write_report(unsure, tmp_path)


def test_the_gain_of_the_filter_is_that_of_the_same_amount() -> None:
    assert filter_gain(results(0.05)) == pytest.approx(0.01)
    without = replace(results(0.05), rows=results(0.05).rows[:2])
    assert filter_gain(without) is None


def test_nearest_windows_are_shown_where_they_are_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    known = replace(walkers(2, 1, 4), pixels=torch.rand(8, 1, 16, 16, generator=generator) * 2 - 1)
    made = Generated(known.pixels[[2, 6]].roll(5, -1), known.people[[2, 6]], known.conditions[[2, 6]])
    shown = triples(made, known, known, 6)
    assert [one.person for one in shown[:2]] == [0, 1]
    assert len(shown) == 3
    for one in shown:
        assert one.distance == pytest.approx(0, abs=1e-6)
        assert one.shift == 5
        assert torch.allclose(one.nearest, one.generated)
    assert torch.equal(shown[0].real, (known.pixels[0, 0] + 1) / 2)
    alone = triples(made, replace(known, people=known.people + 5), known, 1)
    assert alone[0].real is None
    assert [triples(made, known, known, 1, turn)[0].person for turn in (0, 1, 2)] == [0, 1, 0]


def test_pictures_have_the_colours_of_the_map_and_axes_round_numbers() -> None:
    content = base64.b64decode(encoded(torch.tensor([[0.0, 1.0]]), "gray"))
    assert np.asarray(Image.open(io.BytesIO(content))).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert ticks(0, 1.42, 4) == [0, 0.5, 1]
    assert ticks(-5.09, 5.09, 6) == [-4, -2, 0, 2, 4]
    assert ticks(0, 57, 4) == [0, 20, 40]
    assert ticks(-500, 500, 4) == pytest.approx([-500, -250, 0, 250, 500])
