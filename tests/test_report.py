"""Tables, and the marks of a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.tools.report import marks_of, put_between_marks, table


def test_a_table_aligns_its_figures_to_the_right() -> None:
    lines = ["| name | a | b |", "|---|--:|--:|", "| x | 1 | 2 |", "| y | 3 | 4 |", ""]
    assert table(("name", "a", "b"), (["x", "1", "2"], ["y", "3", "4"])) == lines


def test_tables_leave_the_rest_of_a_page_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    put_between_marks(page, ["one"], "Title")
    page.write_text(page.read_text().replace("# Title", "# Title\n\nProse.") + "End.\n")
    put_between_marks(page, ["two", "three"], "Another")
    begin, end = "<!-- measured: begin -->", "<!-- measured: end -->"
    assert page.read_text() == f"# Title\n\nProse.\n\n{begin}\n\ntwo\nthree\n{end}\nEnd.\n"


def test_a_page_with_one_of_two_marks_is_left_as_it_is(tmp_path: Path) -> None:
    page, (begin, end) = tmp_path / "page.md", marks_of("measured")
    for text in (f"a\n{begin}\nb\n", f"a\n{end}\nb\n", f"a\n{end}\nb\n{begin}\nc\n"):
        page.write_text(text)
        with pytest.raises(LightningDiTError, match=f"lacks the lines {begin} and {end}; fix: git restore"):
            put_between_marks(page, ["new"], "Title")
        assert page.read_text() == text
