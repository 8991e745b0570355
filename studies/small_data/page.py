"""The results of the study: a table for docs/radar.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import inspect
from LightningDiT.errors import LightningDiTError
from LightningDiT.tools.report import put_between_marks, table
from studies.small_data.cells import CELLS, CHOSEN, LOOKS, Cell, Plan

MARK = "few images"
HEAD = (
    "training",
    "step kept",
    "of steps",
    "held-out loss",
    "at the end",
    "copies",
    "at the end",
    "held-out copies",
    "utility",
    "seen as asked",
    "MB",
)

Row = Mapping[str, Any]


def write_page(plan: Plan, page: Path) -> None:
    """Put the table of all cells that were looked at between the marks of `page`."""
    rows = [cell_row(cell, plan) for cell in CELLS if not cell.others]
    head = (
        f"**{plan.people} people, {plan.windows} windows of each, {plan.size}x{plan.size} pixels, at most {plan.steps}"
        f" steps, seed {plan.seed}:**"
    )
    put_between_marks(page, [head, "", *table(HEAD, rows)], "Spectrograms of people who walk", MARK)


def cell_row(cell: Cell, plan: Plan) -> list[str]:
    """Return the cells of a training's row in the table."""
    folder = plan.folder / cell.name
    looks = looks_of(folder / "log.jsonl")
    last = looks[-1]
    kept = next(look for look in looks if look["step"] == kept_step(folder, last))
    return [
        cell.title,
        f"{kept['step']:.0f}",
        f"{last['step']:.0f}",
        f"{kept['valid_loss']:.3f}",
        f"{last['valid_loss']:.3f}",
        f"{kept['copies']:.1%}",
        f"{last['copies']:.1%}",
        f"{kept['copies_real']:.1%}",
        f"{kept['utility']:.1%}",
        f"{kept['judge_accuracy']:.1%}",
        f"{inspect(folder / CHOSEN).parameters * 4 / 1e6:.1f}",
    ]


def looks_of(log: Path) -> list[Row]:
    """Return the rows of a log in which samples were judged.

    Raises:
        LightningDiTError: there are none.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    looks = [row for row in rows if "utility" in row and "valid_loss" in row]
    if not looks:
        raise LightningDiTError(f"{log} has no row with utility and valid_loss", "give the command again")
    return looks


def kept_step(folder: Path, last: Row) -> float:
    """Return the step of the weights that a training kept."""
    choice = folder / LOOKS
    return json.loads(choice.read_text(encoding="utf-8"))["chosen"] if choice.exists() else last["step"]
