"""Markdown tables, and the marks of a page between which a command puts them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_text, write_text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one; every column but the first is aligned to the right."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in rows), ""]


def marks_of(name: str) -> tuple[str, str]:
    """Return the lines of a page between which the tables called `name` stand."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check_marks(page: Path, names: Iterable[str]) -> None:
    """Raise LightningDiTError if the page is missing, or lacks the marks of one of `names`."""
    if not page.is_file():
        raise LightningDiTError(f"{page} is no file; a page with marks is expected", "name a page in docs")
    for name in names:
        _around(page, read_text(page), name)


def put_between_marks(page: Path, lines: Sequence[str], title: str, name: str = "measured") -> None:
    """Replace the text between the marks of a page by `lines`; a page without marks gets them at its end.

    Args:
        title: of the page, if it does not exist yet.
        name: of the marks, see `marks_of`.

    Raises:
        LightningDiTError: one of the two marks is missing.
    """
    begin, end = marks_of(name)
    text = read_text(page) if page.exists() else f"# {title}\n"
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    before, after = _around(page, text, name)
    content = "\n".join(lines)
    write_text(page, f"{before}{begin}\n\n{content}\n{end}{after}")


def _around(page: Path, text: str, name: str) -> tuple[str, str]:
    """Return the text of a page before and after its marks."""
    begin, end = marks_of(name)
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise LightningDiTError(f"{page} lacks the lines {begin} and {end}", f"git restore {page}")
    return before, after
