"""The verdict in words, English and Chinese: by how much it helps and how sure that is, or what is left open."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from LightningDiT.verdict.fidelity import Fidelity
from LightningDiT.verdict.intervals import FEWEST_SEEDS, HELPS, HURTS, TOO_LITTLE, Interval, Verdict, level_of
from LightningDiT.verdict.results import Results
from LightningDiT.verdict.rows import ROWS

Text = tuple[str, str]  # English and Chinese
SMOOTH = 0.9  # of the real texture: below it generated windows are smoother than real ones
FAR = 1.5  # ratio of distances above which a quantity is named


def points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign: `+3.1`."""
    return f"{100 * share:+.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def ends(interval: Interval, write: Callable[[float], str] = percent, joint: str = "to") -> str:
    """Return the interval's ends; a dash if there are none."""
    if math.isinf(interval.low):
        return "–"
    return f"{write(interval.low)} {joint} {write(interval.high)}"


def headline(results: Results) -> Text:
    """Return the sentence at the top of a report."""
    verdict = results.verdict
    if verdict is None:
        return "No row with real and generated windows was tried.", "没有测试真实与生成数据混合的方案。"
    row = results[results.judged or ""]
    this, base = ROWS[row.row], ROWS[row.base]
    difference, wanted = verdict.difference, 100 * verdict.wanted
    size, is_above = f"{abs(100 * difference.value):.1f}", difference.value >= 0
    level = _level(difference.level)
    english = f"{this.title} is {size} points {'above' if is_above else 'below'} {base.title}"
    english += f" ({level} interval {ends(difference, points)})"
    chinese = f"“{this.chinese}”比“{base.chinese}”{'高' if is_above else '低'} {size} 个百分点"
    chinese += f"（{level} 区间 {ends(difference, points, '至')}）"
    if verdict.outcome == HELPS:
        less = (
            ("", "") if verdict.is_enough else (f", less than the {wanted:g} asked for", f"，低于要求的 {wanted:g} 个")
        )
        return f"Generated windows help: {english}{less[0]}.", f"生成数据有帮助：{chinese}{less[1]}。"
    if verdict.outcome == HURTS:
        return f"Generated windows hurt: {english}.", f"生成数据有害：{chinese}。"
    if verdict.outcome == TOO_LITTLE:
        return (
            f"Generated windows do not help enough: {english}, and the interval ends below the {wanted:g} points asked"
            " for.",
            f"生成数据的帮助不够：{chinese}，区间上限低于要求的 {wanted:g} 个百分点。",
        )
    left_open = _left_open(verdict)
    return f"No verdict: {english}, {left_open[0]}.", f"无法判定：{chinese}，{left_open[1]}。"


def _level(level: float) -> str:
    return f"{100 * level:.3g} %"


def _left_open(verdict: Verdict) -> Text:
    """Return what may be true where there is no verdict."""
    difference, wanted = verdict.difference, 100 * verdict.wanted
    if difference.seeds < FEWEST_SEEDS or math.isinf(difference.low):
        return "too unsure to tell", "不确定性过大"
    if difference.low > 0:
        return "less than what this data can show", "小于这些数据能显示的差异"
    return (
        f"so a gain of the {wanted:g} points asked for is possible, and so is none",
        f"有可能达到要求的 {wanted:g} 个百分点，也有可能没有增益",
    )


def shared_level(verdicts: int) -> Text:
    """Return how sure each of several verdicts is; empty for one or none."""
    if verdicts < 2:
        return "", ""
    level, together = _level(level_of(verdicts)), _level(level_of(1))
    return (
        f"Each of the {verdicts} verdicts of this call has an interval of {level}, so that all of them hold together"
        f" at {together} (Bonferroni); tables have intervals of {together}.",
        f"本次命令的 {verdicts} 个结论各用 {level} 的区间，使全部结论同时成立的把握为 {together}（Bonferroni）；"
        f"表格中为 {together} 的区间。",
    )


def earlier_calls(verdicts: int, earlier: bool) -> Text:
    """Return which verdicts hold together if a folder has those of several calls; empty without a verdict or others."""
    if not earlier or not verdicts:
        return "", ""
    level, whose, chinese = _level(level_of(1)), "the verdict", "结论"
    if verdicts > 1:
        whose, chinese = f"the {verdicts} verdicts", f" {verdicts} 个结论"
    return (
        f"The folder has had verdicts of other calls too: {level} holds for {whose} of this call, not for those of all"
        " calls together.",
        f"该文件夹中还有过其他命令的结论：{level} 的把握只针对本次命令的{chinese}，而非所有命令的结论。",
    )


def certainty(results: Results) -> Text:
    """Return how small a difference the data can show, and from how many passes, people and seeds that is."""
    verdict = results.verdict
    if verdict is None:
        return "", ""
    tested, wanted = verdict.difference, 100 * verdict.wanted
    people, seeds = len(results.rows[0].people), len(results.rows[0].seeds)
    if math.isinf(tested.smallest):
        return (
            f"One pass alone was tested, so that no difference can be shown; {wanted:g} points are asked for.",
            f"仅测试了一段行走，无法显示任何差异；要求为 {wanted:g} 个百分点。",
        )
    size = f"{100 * tested.smallest:.1f}"
    if tested.seeds < FEWEST_SEEDS:
        return (
            "One training of each row was tested, and nothing tells how much another one differs: give --seeds 3;"
            f" {wanted:g} points are asked for.",
            f"每个方案仅训练了一次，无法得知另一次训练会相差多少：请使用 --seeds 3；要求为 {wanted:g} 个百分点。",
        )
    return (
        f"The smallest difference that this data can show is {size} points (80 % power); {wanted:g} are asked for."
        f" Tested: {tested.windows} windows from {tested.passes} passes of {people} people; seeds averaged: {seeds}."
        " The interval comes from passes and trainings of the classifier, not from windows. The generator was trained"
        " once for each fold: what another training of it would change is not in the interval.",
        f"这些数据能显示的最小差异为 {size} 个百分点（检验功效 80 %）；要求为 {wanted:g}。测试：{people} 人的"
        f" {tested.passes} 段行走，共 {tested.windows} 个窗口；平均的随机种子数：{seeds}。"
        "区间按行走段和分类器的训练次数计算，而非按窗口计算。生成模型在每一折只训练了一次：换一次训练带来的变化不在区间之内。",
    )


def copied(found: Fidelity | None) -> Text:
    """Return a sentence if more windows look like copies than may; empty otherwise."""
    if found is None or found.copies.passes:
        return "", ""
    share, held, most = (
        percent(value) for value in (found.copies.samples, found.copies.held_out, found.copies.allowed)
    )
    return (
        f"Warning: {share} of the generated windows look like copies of training windows; {held} of real held-out"
        f" windows do, and {most} are allowed. What they gain or lose may be that of copies.",
        f"警告：{share} 的生成窗口近似训练窗口的复制；真实留出窗口为 {held}，允许上限为 {most}。"
        "其得失可能只是复制的效果。",
    )


def advice(results: Results, found: Fidelity | None, filtered: float | None, wider: Sequence[int] = ()) -> list[Text]:
    """Return what to try next, by what was measured; nothing if it helps as much as was asked for.

    Args:
        filtered: difference in accuracy of a filtered row to the same row unfiltered; None without one.
        wider: --folds of step 6 that adds those that are left; nothing if none is.
    """
    verdict = results.verdict
    if verdict is None or verdict.is_enough:
        return []
    texts = list(_more_passes(results, wider))
    texts += _by_fidelity(found) if found else []
    if filtered is not None and filtered >= verdict.difference.smallest:  # less is what trainings vary by
        texts.append(
            (
                f"Use the filter: filtered windows are {points(filtered)} points better than unfiltered ones here.",
                f"使用筛选：筛选后的窗口在此比未筛选的好 {points(filtered)} 个百分点。",
            )
        )
    rows = {row.row: row.accuracy.value for row in results.rows}
    if "alone" in rows and rows["alone"] < 0.8 * rows[results[results.judged or ""].base]:
        texts.append(
            (
                "Generated windows alone teach little about who walks: start from a pretrained model, train longer, or"
                " raise the guidance scale.",
                "仅用生成数据几乎学不到行走者身份：可从预训练模型开始、延长训练或提高引导强度。",
            )
        )
    if not texts:
        texts.append(
            (
                "Try more and fewer generated windows, another guidance scale, and a generator that starts from a"
                " pretrained model.",
                "可尝试更多或更少的生成窗口、其他引导强度，以及从预训练模型开始的生成器。",
            )
        )
    return texts


def _more_passes(results: Results, wider: Sequence[int]) -> Sequence[Text]:
    """Return how many trainings or passes would be enough, by what the error mostly comes from.

    The error falls with the root of either number.
    """
    verdict = results.verdict
    if verdict is None or verdict.difference.seeds < FEWEST_SEEDS or math.isinf(verdict.difference.smallest):
        return ()
    tested, times = verdict.difference, _times_more(verdict)
    if times <= 1:
        return ()
    show = f"show {100 * verdict.wanted:g} points", f"显示 {100 * verdict.wanted:g} 个百分点"
    if tested.smallest <= verdict.wanted:
        show = "give a verdict if the difference stays", "得出结论（若差异不变）"
    if tested.seed_error**2 > tested.standard_error**2 / 2:
        needed = math.ceil(tested.seeds * times)
        return (
            (
                f"Most of the uncertainty is what trainings of one classifier vary by: about {needed} seeds {show[0]}"
                f" (--seeds); {tested.seeds} were trained.",
                f"不确定性主要来自同一分类器多次训练之间的差异：约需 {needed} 个随机种子（--seeds）才能{show[1]}；"
                f"目前训练了 {tested.seeds} 个。",
            ),
        )
    needed = math.ceil(tested.passes * times)
    folds = " ".join(map(str, wider))
    english, chinese = "Record more", "采集更多数据"
    if wider:
        english = f"Test all folds (step6_adapt_models.py --folds {folds} adds them), or record more"
        chinese = f"测试所有折（用 step6_adapt_models.py --folds {folds} 增加），或采集更多数据"
    return (
        (
            f"{english}: about {needed} passes {show[0]}; {tested.passes} were tested.",
            f"{chinese}：约需 {needed} 段行走才能{show[1]}；目前测试了 {tested.passes} 段。",
        ),
    )


def _times_more(verdict: Verdict) -> float:
    """Return how many times as much data would show what is asked for, or leave 0 or that outside of the interval.

    It is 0 where no gain of that size is possible.
    """
    tested, wanted = verdict.difference, verdict.wanted
    if verdict.outcome in (HURTS, TOO_LITTLE):
        return 0.0
    if tested.smallest > wanted or verdict.outcome == HELPS:
        return (tested.smallest / wanted) ** 2
    reach = max(tested.value, wanted - tested.value)
    return ((tested.high - tested.low) / 2 / reach) ** 2


def _by_fidelity(found: Fidelity) -> list[Text]:
    texts: list[Text] = []
    by_name = {distance.quantity: distance for distance in found.distances}
    texture = by_name.get("texture")
    if texture and texture.means[0] < SMOOTH * texture.means[2]:
        share = f"{100 * texture.means[0] / texture.means[2]:.0f} %"
        texts.append(
            (
                f"Generated windows have {share} of the texture of real ones: put speckle back (a row such as"
                " speckle-1x), or use a tokenizer that keeps it (adversarial or spectral loss).",
                f"生成窗口的纹理只有真实窗口的 {share}：请补回散斑（如方案 speckle-1x），"
                "或使用能保留散斑的 tokenizer（对抗或谱损失）。",
            )
        )
    if not found.copies.passes:
        texts.append(
            (
                "Against copies of training windows take earlier weights, or augment more.",
                "为减少对训练窗口的复制，请使用更早的权重或加强数据增强。",
            )
        )
    if any(name in by_name and by_name[name].ratio > FAR for name in ("ridge", "upper", "lower", "cadence")):
        texts.append(
            (
                "The gait of generated windows is farther from training windows than that of other real passes: train"
                " longer, or condition on the pass.",
                "生成窗口的步态与训练窗口的距离大于其他真实行走段：请延长训练，或以行走段为条件。",
            )
        )
    return texts
