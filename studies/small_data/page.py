"""The results of the study: a table for docs/radar.md and docs/radar.zh-CN.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from LightningDiT.errors import LightningDiTError
from LightningDiT.tools.report import put_between_marks, table
from studies.small_data.cells import ADAPTER, CELLS, CHOSEN, LOOKS, Cell, Plan

MARK = "few images"
PAGES = {  # name of the page: title of its section, head of the table, first line
    "radar.md": (
        "Spectrograms of people who walk",
        ("training", "step kept", "held-out loss", "seen as asked", "utility", "copies", "held-out copies", "MB"),
        "**{people} people, {size}x{size} pixels, {steps} steps of 32, seeds {seeds}:**",
    ),
    "radar.zh-CN.md": (
        "行走者的时频图",
        ("训练", "保留的步", "留出损失", "认作所要求的人", "效用", "复制", "留出窗口的复制", "MB"),
        "**{people} 人，{size}x{size} 像素，{steps} 步，每步 32 个，随机种子 {seeds}：**",
    ),
}
CHINESE = {
    "reference": "Transformer，从 models/walkers 开始，只训练偏置",
    "lora": "LoRA",
    "all": "全部权重，学习率 2e-3",
    "scratch": "全部权重，从随机权重开始",
    "garments": "全部权重，从 models/fashion-mnist 开始",
    "plain": "不增强，不挑选权重",
    "many": "每人 100 张图像",
    "unet": "U-Net，用同样的行走者预训练，只训练偏置",
}

Row = Mapping[str, Any]


def write_page(plan: Plan, page: Path) -> None:
    """Put the table of all cells between the marks of `page`, in the language of its name."""
    section, head, first = PAGES[page.name]
    rows = [cell_row(cell, plan, is_chinese=page.name != "radar.md") for cell in CELLS]
    line = first.format(
        people=plan.people, size=plan.size, steps=plan.steps, seeds=", ".join(map(str, range(plan.seeds)))
    )
    put_between_marks(page, [line, "", *table(head, rows)], section, MARK)


def cell_row(cell: Cell, plan: Plan, is_chinese: bool = False) -> list[str]:
    """Return the cells of a row: the weights that each seed's training kept."""
    kept = [kept_look(plan.run(cell, seed)) for seed in range(plan.seeds)]
    file = plan.run(cell, 0) / (ADAPTER if cell.is_adapter else CHOSEN)
    return [
        CHINESE[cell.name] if is_chinese else cell.title,
        " / ".join(f"{look['step']:.0f}" for look in kept),
        of_seeds([look["valid_loss"] for look in kept], "{:.3f}"),
        *(of_seeds([look[name] for look in kept], "{:.1%}") for name in ("judge_accuracy", "utility", "copies")),
        f"{fmean(look['copies_real'] for look in kept):.1%}",
        f"{file.stat().st_size / 1e6:.1f}",
    ]


def of_seeds(values: Sequence[float], form: str) -> str:
    """Return the mean of the seeds' values, and each of them where there are several."""
    if len(values) == 1:
        return form.format(values[0])
    each = ", ".join(form.format(value) for value in values)
    return f"{form.format(fmean(values))} ({each})"


def kept_look(folder: Path) -> Row:
    """Return the row of a training's log at the step whose weights it kept.

    Raises:
        LightningDiTError: the log has no look.
    """
    log, choice = folder / "log.jsonl", folder / LOOKS
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    looks = {row["step"]: row for row in rows if "utility" in row and "valid_loss" in row}
    if not looks:
        raise LightningDiTError(f"{log} has no row with utility and valid_loss", "give the command again")
    step = json.loads(choice.read_text(encoding="utf-8"))["chosen"] if choice.exists() else max(looks)
    return looks[step]
