"""What the studies share: figures kept part by part as JSON, and tables between the marks of a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path


def kept_parts(path: Path) -> dict[str, Any]:
    """Return the figures that the JSON file at `path` holds by part, none where there is no file.

    A study calls it before it measures, so that minutes of measuring do not end at a damaged file.

    Raises:
        LightningDiTError: the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(study, dict):
            raise ValueError("a mapping is expected")
    except (OSError, ValueError) as error:
        raise LightningDiTError(f"{path} cannot be read ({error})", f"git restore {path}, or remove it") from error
    return study


def keep_part(path: Path, part: str, figures: Any) -> dict[str, Any]:
    """Put the figures of one part into the JSON file at `path` and return all that it then holds.

    Raises:
        LightningDiTError: see `kept_parts`.
    """
    study = {**kept_parts(path), part: figures}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    return study


def marks_of(name: str) -> tuple[str, str]:
    """Return the lines of a page between which the tables of that name stand."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def check_marks(page: Path, names: Iterable[str]) -> None:
    """Raise LightningDiTError where there is no such page, or it has no marks of a name."""
    if not page.is_file():
        raise LightningDiTError(f"{page} is no file; a page with marks is expected", "name a page in docs")
    for name in names:
        _around(page, page.read_text(encoding="utf-8"), name)


def put_between_marks(page: Path, lines: Sequence[str], title: str, name: str = "measured") -> None:
    """Replace what lies between the marks of a page by `lines`; a page without marks gets them at its end.

    Args:
        title: of a page that does not exist yet.
        name: of the marks, see `marks_of`.

    Raises:
        LightningDiTError: one of the two marks is missing.
    """
    begin, end = marks_of(name)
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n"
    if begin not in text and end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    before, after = _around(page, text, name)
    content = "\n".join(lines)
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{content}\n{end}{after}", encoding="utf-8")


def _around(page: Path, text: str, name: str) -> tuple[str, str]:
    """Return what stands before and after the marks in the text of a page."""
    begin, end = marks_of(name)
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise LightningDiTError(f"{page} lacks the lines {begin} and {end}", f"git restore {page}")
    return before, after
