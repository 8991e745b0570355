"""The verdict as a page and as JSON: `report.html` needs nothing from elsewhere, `report.json` has every number."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from LightningDiT.config import as_mapping
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target, holding, read_json, write_text
from LightningDiT.metrics.scores import Score
from LightningDiT.sampling.demo_report import STYLE, both_languages, escaped, html_row, html_table
from LightningDiT.verdict import pictures
from LightningDiT.verdict.fidelity import QUANTITIES, Fidelity, averaged
from LightningDiT.verdict.gait import Axes
from LightningDiT.verdict.intervals import HELPS, HURTS, Interval
from LightningDiT.verdict.results import Results, RowResult
from LightningDiT.verdict.rows import ROWS
from LightningDiT.verdict.sentences import (
    Text,
    advice,
    certainty,
    copied,
    earlier_calls,
    ends,
    headline,
    percent,
    points,
    shared_level,
)

HTML, JSON = "report.html", "report.json"
FORMAT = "verdict on generated windows, 1"
TITLE = "<title>Does generated data help?</title>"
OURS = {HTML: holding(TITLE), JSON: holding(FORMAT)}  # also of earlier releases
COLOURS = {HELPS: "#2e9e5b", HURTS: "#d0453a"}  # of the line beside the verdict; others are grey
PAGE_STYLE = f"""
.ldit-report .verdict {{ border-left: .4rem solid #8a8a8a; padding: .1rem 0 .1rem 1rem; margin: 1rem 0 }}
.ldit-report .verdict p {{ margin: .4rem 0 }}
.ldit-report .verdict .first {{ font-size: 1.2rem; font-weight: 600 }}
.ldit-report p > [lang], .ldit-report li > [lang] {{ display: block; margin-left: 0 }}
.ldit-report .chart {{ display: grid; grid-template-columns: minmax(9rem, 18rem) 1fr; gap: .35rem 1rem;
  margin: .8rem 0 }}
.ldit-report .bar {{ position: relative; min-height: 1.5rem; border-left: 1px solid rgba(128, 128, 128, .5);
  border-right: 1px solid rgba(128, 128, 128, .5); background: rgba(128, 128, 128, .08) }}
.ldit-report .bar span {{ position: absolute }}
.ldit-report .whisker {{ top: calc(50% - 2px); height: 4px; background: #3d7fd0; opacity: .55 }}
.ldit-report .dot {{ top: calc(50% - 6px); width: 12px; height: 12px; border-radius: 50%; background: #3d7fd0;
  transform: translateX(-50%) }}
.ldit-report .chart .label {{ font-size: .9rem }}
.ldit-report .ends {{ display: flex; justify-content: space-between; font-size: .8rem }}
.ldit-report .narrow th {{ font-weight: normal; white-space: normal }}
.ldit-report .narrow th:first-child {{ min-width: 8rem; position: sticky; left: 0; background: Canvas }}
.ldit-report .narrow td {{ white-space: nowrap }}
.ldit-report .narrow th > [lang] {{ display: block; margin-left: 0 }}
.ldit-report .notes {{ font-size: .85rem; opacity: .8 }}
@media (max-width: 40rem) {{ .ldit-report .chart {{ grid-template-columns: 1fr; gap: .1rem }}
  .ldit-report .chart .label {{ margin-top: .5rem }} }}
{pictures.STYLE}
""".strip()


@dataclass(frozen=True)
class FilterReport:
    """What the filter did, reported apart.

    Attributes:
        kept: share of the generated windows that passed.
        people: the same of each person, by number.
        real_kept: share of the real training windows that pass it.
        confidence, margin: its thresholds.
    """

    kept: float
    people: Mapping[int, float]
    real_kept: float
    confidence: float
    margin: float


@dataclass(frozen=True)
class Report:
    """All that is said.

    Attributes:
        results: the first one has the verdict of the page.
        class_names, condition_names: by number; condition_names is None if there is one condition.
        fidelity, triples: of folds, by number; the page has the means, and the pictures of each.
        filter: means over folds.
        facts: how it was made: English, Chinese and value.
        command: makes the same, as a person types it.
        wider: folds of step 6 with those that it leaves out; nothing if it has all.
        call: when the call began, which all its reports share.
        earlier: whether the folder held verdicts of other calls.
    """

    results: Sequence[Results]
    class_names: Sequence[str]
    condition_names: Sequence[str] | None
    axes: Axes
    colour_map: str
    fidelity: Mapping[int, Fidelity]
    filter: FilterReport | None
    triples: Mapping[int, Sequence[pictures.Triple]]
    facts: Sequence[tuple[str, str, str]]
    command: str
    wider: tuple[int, ...] = ()
    call: str = ""
    earlier: bool = False

    @functools.cached_property
    def mean_fidelity(self) -> Fidelity | None:
        """The means over folds; None without any."""
        return averaged(list(self.fidelity.values())) if self.fidelity else None

    @property
    def said(self) -> list[Text]:
        """The sentences of the verdict, the most important one first."""
        main = self.results[0]
        verdicts = main.verdict.verdicts if main.verdict else 0
        shared = (shared_level(verdicts), earlier_calls(verdicts, self.earlier))
        return [text for text in (headline(main), certainty(main), *shared, copied(self.mean_fidelity)) if text[0]]

    @property
    def tried(self) -> list[Text]:
        """What to try next."""
        return advice(self.results[0], self.mean_fidelity, filter_gain(self.results[0]), self.wider)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write the page and the JSON file into a folder; return both.

    Raises:
        LightningDiTError: a file that no step 7 wrote has the name.
    """
    check_report(folder)  # both before either
    text = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / HTML, page(report), OURS[HTML])
    write_text(folder / JSON, text, OURS[JSON])
    return folder / HTML, folder / JSON


def check_report(folder: Path) -> None:
    """Raise LightningDiTError if `write_report` would replace a file that no step 7 wrote."""
    for name, ours in OURS.items():
        check_target(folder / name, ours)


def report_files(output: Path) -> list[Path]:
    """Return the report.json files of a folder of step 7: its own, and those of networks in folders of their own."""
    return [path for path in (output / JSON, *sorted(output.glob(f"*/{JSON}"))) if path.is_file()]


def has_earlier(output: Path, command: str) -> bool:
    """Return whether a folder holds, or held, verdicts of other calls than those that `command` repeats."""
    for path in filter(OURS[JSON], report_files(output)):
        with contextlib.suppress(OSError, ValueError, LightningDiTError):  # one that was damaged
            found = as_mapping(read_json(path), str(path))
            if found.get("outcome") and (found.get("command") != command or found.get("earlier_calls")):
                return True
    return False


# ---- JSON


def as_json(report: Report) -> dict[str, Any]:
    """Return every number of the report by names; what is infinite or no number is null."""
    main = report.results[0]
    said = report.said
    return {
        "format": FORMAT,
        "verdict": {"en": " ".join(text[0] for text in said), "zh": "".join(text[1] for text in said)},
        "outcome": main.verdict.outcome if main.verdict else None,
        "what_to_try": [{"en": text[0], "zh": text[1]} for text in report.tried],
        "results": [_results_json(results, report) for results in report.results],
        "fidelity": _plain(report.mean_fidelity),
        "fidelity_of_folds": _plain(report.fidelity),
        "filter": _plain(report.filter),
        "axes": _plain(report.axes),
        "facts": {fact[0]: fact[2] for fact in report.facts},
        "command": report.command,
        "call": report.call,
        "earlier_calls": report.earlier,
    }


def _results_json(results: Results, report: Report) -> dict[str, Any]:
    found = _plain(results)
    for row, result in zip(found["rows"], results.rows, strict=True):
        row["title"] = ROWS[result.row].title
        row["people"] = {report.class_names[at]: _plain(part) for at, part in result.people.items()}
        names = report.condition_names or ("all",)
        row["conditions"] = {names[at]: _plain(part) for at, part in result.conditions.items()}
    verdict = results.verdict
    if verdict:
        smallest = _plain(verdict.difference.smallest)
        found["verdict"] |= {"smallest_difference": smallest, "is_enough": verdict.is_enough}
    return found


def _plain(value: Any) -> Any:
    """Return a value of JSON; numbers that JSON lacks become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- the page


def page(report: Report) -> str:
    """Return the HTML page: English and Chinese, light and dark, without scripts."""
    title = both_languages("Does generated data help?", "生成数据有帮助吗？")
    parts = [f"<h1>{title}</h1>", _verdict(report)]
    for results in report.results:
        parts.append(_section(results, report))
    parts += [_filter(report), _fidelity(report), _pictures(report), _made(report)]
    return (
        '<!doctype html>\n<html lang="en" style="color-scheme: light dark">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{TITLE}\n<style>\n{STYLE}\n{PAGE_STYLE}\n</style>\n</head>\n"
        '<body style="margin: 0">\n<div class="ldit-report">\n' + "\n".join(filter(None, parts)) + "\n</div>\n</body>\n"
        "</html>\n"
    )


def _paragraph(text: tuple[str, str], kind: str = "") -> str:
    english, chinese = map(escaped, text)
    return f"<p{kind}>{both_languages(english, chinese)}</p>" if english else ""


def _heading(english: str, chinese: str) -> str:
    return f"<h2>{both_languages(escaped(english), escaped(chinese))}</h2>"


def _verdict(report: Report) -> str:
    main = report.results[0]
    colour = COLOURS.get(main.verdict.outcome, "") if main.verdict else ""
    style = f' style="border-color: {colour}"' if colour else ""
    first, *others = report.said
    said = _paragraph(first, ' class="first"') + "".join(map(_paragraph, others))
    items = "".join(f"<li>{both_languages(escaped(text[0]), escaped(text[1]))}</li>" for text in report.tried)
    below = f"<p>{both_languages('What to try:', '可尝试：')}</p>\n<ul>{items}</ul>" if items else ""
    return f'<div class="verdict"{style}>{said}</div>\n{below}'


def of_images(results: Results) -> tuple[str, str]:
    if results.images is None:
        english, chinese = "all images of a person", "每人全部图像"
    else:
        english, chinese = f"{results.images} images a person", f"每人 {results.images} 张图像"
    if results.scenario == "usual":
        return english, chinese
    return f"{english}, {results.scenario}", f"{chinese}，{results.scenario}"


def _section(results: Results, report: Report) -> str:
    """Return chart, table of rows, and tables of people and conditions of one scenario and number of images."""
    english, chinese = of_images(results)
    parts = [_heading(f"Accuracy on passes that nobody has seen: {english}", f"在未见行走段上的准确率：{chinese}")]
    parts += [_chart(results.rows), _rows_table(results.rows)]
    if results.joined:
        parts.append(
            _paragraph(
                (
                    f"People with a single tested pass, resampled together: {results.joined}.",
                    f"仅有一段被测行走、合并重采样的人数：{results.joined}。",
                )
            )
        )
    shown = (
        [row for row in results.rows if row.row in (results.judged, results[results.judged].base)]
        if (results.judged)
        else results.rows
    )
    parts.append(_groups("Person", "人员", shown, "people", report.class_names))
    if report.condition_names:
        parts.append(_groups("Condition", "条件", shown, "conditions", report.condition_names))
    return "\n".join(parts)


def _chart(rows: Sequence[RowResult]) -> str:
    """Return a line with dot and interval for each row, on one scale."""
    known = [end for row in rows for end in (row.accuracy.low, row.accuracy.high) if math.isfinite(end)]
    known += [row.accuracy.value for row in rows]
    low, high = math.floor(20 * min(known)) / 20, math.ceil(20 * max(known)) / 20
    width = max(high - low, 0.05)

    def at(value: float) -> float:
        return 100 * min(max((value - low) / width, 0), 1)

    lines = []
    for row in rows:
        place, accuracy = ROWS[row.row], row.accuracy
        label = both_languages(escaped(place.title), escaped(place.chinese))
        left, right = at(accuracy.low), at(accuracy.high)
        lines.append(
            f'<div class="label">{label}</div><div class="bar" title="{percent(accuracy.value)}"><span class="whisker"'
            f' style="left:{left:.1f}%;width:{right - left:.1f}%"></span><span class="dot"'
            f' style="left:{at(accuracy.value):.1f}%"></span></div>'
        )
    scale = f'<div class="label"></div><div class="ends"><span>{percent(low)}</span><span>{percent(high)}</span></div>'
    return f'<div class="chart">{"".join(lines)}{scale}</div>'


def _head(*titles: tuple[str, str]) -> str:
    return (
        "<tr>" + "".join(f'<th scope="col">{both_languages(*map(escaped, title))}</th>' for title in titles) + "</tr>"
    )


def _table(rows: Sequence[str]) -> str:
    return f'<div class="narrow">{html_table(rows)}</div>'


def _rows_table(rows: Sequence[RowResult]) -> str:
    head = _head(
        ("Training data", "训练数据"),
        ("Accuracy, 95 % interval", "准确率，95 % 区间"),
        ("Difference in points, interval", "差异（百分点），区间"),
        ("to", "相对于"),
        ("Seeds", "各种子"),
        ("Real", "真实"),
        ("Generated", "生成"),
        ("Validation", "验证"),
    )
    lines = [head]
    for row in rows:
        place, difference = ROWS[row.row], row.difference
        lines.append(
            html_row(
                both_languages(escaped(place.title), escaped(place.chinese)),
                f"{percent(row.accuracy.value)} ({ends(row.accuracy)})",
                f"{points(difference.value)} ({ends(difference, points)})" if difference else "",
                ROWS[row.base].title if difference else "",
                ", ".join(percent(seed) for seed in row.seeds),
                *(f"{count:.0f}" for count in (row.real, row.generated, row.validation)),
            )
        )
    return _table(lines)


def _groups(english: str, chinese: str, rows: Sequence[RowResult], key: str, names: Sequence[str]) -> str:
    """Return the accuracies of people or conditions, a column for each row."""
    titles = [(ROWS[row.row].title, ROWS[row.row].chinese) for row in rows]
    lines = [_head((english, chinese), *titles, ("Passes", "行走段"), ("Windows", "窗口"))]
    parts: Sequence[Mapping[int, Interval]] = [getattr(row, key) for row in rows]
    for number, first in parts[0].items():
        cells = [percent(part[number].value) for part in parts]
        lines.append(html_row(escaped(names[number]), *cells, str(first.passes), str(first.windows)))
    title = both_languages(f"By {english.lower()}", f"按{chinese}")
    return f"<details><summary>{title}</summary>{_table(lines)}</details>"


def filter_gain(results: Results) -> float | None:
    """Return how much better filtered windows are than the same amount unfiltered; None without both rows.

    Of several amounts the smallest counts.
    """
    there = {row.row: row.accuracy.value for row in results.rows}
    pairs = [(there[name], there[f"filtered-{name}"]) for name in there if f"filtered-{name}" in there]
    return pairs[0][1] - pairs[0][0] if pairs else None


def mean_filter(found: Sequence[FilterReport]) -> FilterReport:
    """Return the mean filter report over folds; for each person, over the folds that have windows of that person."""
    people = {person for one in found for person in one.people}
    shares = {
        person: float(np.mean([one.people[person] for one in found if person in one.people]))
        for person in sorted(people)
    }
    kept, *others = np.mean([(one.kept, one.real_kept, one.confidence, one.margin) for one in found], 0).tolist()
    return FilterReport(kept, shares, *others)


def _filter(report: Report) -> str:
    found = report.filter
    if found is None:
        return ""
    facts = [
        ("Generated windows that pass", "通过的生成窗口", percent(found.kept)),
        (
            "Real training windows that pass, by a judge that did not see their pass",
            "通过的真实训练窗口（判别器未见过其行走段）",
            percent(found.real_kept),
        ),
        ("Least probability of the person", "身份概率下限", f"{found.confidence:.3f}"),
        ("Least margin in logits", "logit 差值下限", f"{found.margin:.2f}"),
    ]
    rows = [html_row(both_languages(escaped(one), escaped(two)), value) for one, two, value in facts]
    gain = filter_gain(report.results[0])
    if gain is not None:
        title = both_languages("Accuracy, filtered minus unfiltered, points", "准确率：筛选减未筛选（百分点）")
        rows.append(html_row(title, points(gain)))
    lowest = sorted(found.people.items(), key=lambda pair: pair[1])[:3]
    least = ", ".join(f"{report.class_names[person]} {percent(share)}" for person, share in lowest)
    rows.append(html_row(both_languages("People with the fewest", "通过最少的人"), least))
    return _heading("The filter, learnt on training passes alone", "仅由训练行走段学得的筛选") + "\n" + _table(rows)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _fidelity(report: Report) -> str:
    found = report.mean_fidelity
    if found is None:
        return ""
    head = _head(
        ("Distance to real training windows", "与真实训练窗口的距离"),
        ("Unit", "单位"),
        ("Generated", "生成"),
        ("Real, other passes", "真实（其他行走段）"),
        ("Ratio", "比值"),
        ("Mean: generated, real held out, training", "均值：生成、真实留出、训练"),
        ("Without a value: generated, real", "无数值：生成、真实"),
    )
    rows = [head]
    for one in found.distances:
        quantity = QUANTITIES[one.quantity]
        title = both_languages(escaped(quantity.title), escaped(quantity.chinese))
        numbers = [_number(value) for value in (one.generated, one.real, one.ratio)]
        lacking = ", ".join(percent(share) for share in one.lacking)
        rows.append(html_row(title, one.unit, *numbers, ", ".join(map(_number, one.means)), lacking))
    scores, copies = found.features, found.copies
    titles = {
        "frechet": ("Frechet distance in a classifier's features", "分类器特征的 Fréchet 距离"),
        "precision": ("Precision in these features", "特征空间的精确率"),
        "recall": ("Recall in these features", "特征空间的召回率"),
        "copies": ("As near to a training window as a copy, under any shift", "任意平移下近似到可视为复制的比例"),
    }
    values: list[tuple[str, tuple[str, str]]] = [("frechet", (_number(scores.frechet[0]), _number(scores.frechet[1])))]
    for name, pair in (("precision", scores.precision), ("recall", scores.recall)):
        values += [(name, (_share(pair[0]), _share(pair[1])))] if pair else []
    values.append(("copies", (percent(copies.samples), percent(copies.held_out))))
    lines = [_head(("Measure", "指标"), ("Generated", "生成"), ("Real, other passes", "真实（其他行走段）"))]
    lines += [html_row(both_languages(*map(escaped, titles[name])), *pair) for name, pair in values]
    notes = "".join(_paragraph(note, ' class="notes"') for note in (_allowed(found), *found.notes))
    explained = _paragraph(
        (
            "Wasserstein-1 distances, person by person, then averaged. Equally many generated and real windows of other"
            " passes are compared with the training windows: a ratio near 1 is what a real pass has.",
            "逐人计算 Wasserstein-1 距离后取平均。将相同数量的生成窗口与其他行走段的真实窗口分别与训练窗口比较："
            "比值接近 1 即与真实行走段相当。",
        )
    )
    heading = _heading("How like real windows they are", "与真实窗口的相似程度")
    if len(report.fidelity) > 1:
        heading += _paragraph((f"Means of {len(report.fidelity)} folds.", f"{len(report.fidelity)} 折的均值。"))
    return "\n".join([heading, explained, _table(rows), _table(lines), notes])


def _allowed(found: Fidelity) -> tuple[str, str]:
    """Return whether copies are rare enough."""
    most, passes = percent(found.copies.allowed), found.copies.passes
    return (
        f"Copies: at most {most} are allowed, twice the share of real held-out windows (which counts as 5 % at least):"
        f" {'passed' if passes else 'not passed'}.",
        f"复制：允许上限为 {most}，即真实留出窗口比例（至少按 5 % 计）的两倍：{'通过' if passes else '未通过'}。",
    )


def _share(score: Score) -> str:
    if score.low is None or score.high is None:
        return percent(score.value)
    return f"{percent(score.value)} ({percent(score.low)} to {percent(score.high)})"


def _pictures(report: Report) -> str:
    folds = {fold: shown for fold, shown in report.triples.items() if shown}
    if not folds:
        return ""
    parts = [_heading("Real, generated, nearest", "真实、生成、最近")]
    for at, (fold, shown) in enumerate(folds.items()):
        figures = _fold_pictures(shown, report)
        title = both_languages(f"Fold {fold}", f"第 {fold} 折")
        parts.append(f"<details><summary>{title}</summary>\n{figures}\n</details>" if at else figures)
    return "\n".join(parts)


def _fold_pictures(triples: Sequence[pictures.Triple], report: Report) -> str:
    """Return the pictures of one fold: of people, and of the window nearest to a training window."""
    shown = [pictures.triple_html(one, report.class_names, report.axes, report.colour_map) for one in triples]
    first = _paragraph(
        (
            "The first generated window of each person, which nobody chose.",
            "每人的第一个生成窗口，未经挑选。",
        )
    )
    last = _paragraph(
        (
            "Of all generated windows the one nearest to a training window:",
            "所有生成窗口中与训练窗口最接近的一个：",
        )
    )
    return "\n".join([first, *shown[:-1], last, shown[-1]])


def _made(report: Report) -> str:
    rows = [html_row(both_languages(escaped(one), escaped(two)), value) for one, two, value in report.facts]
    table = _heading("How it was made", "如何得出") + "\n" + html_table(rows) if rows else ""
    return f"{table}\n{_heading('Command that repeats it', '重现命令')}\n<pre>{escaped(report.command)}</pre>"
