"""What the studies share: figures kept part by part as JSON, and tables between the marks of a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import atomic_path

MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")


def keep_part(path: Path, part: str, figures: Any) -> dict[str, Any]:
    """Put the figures of one part into the JSON file at `path` and return all that it then holds."""
    study = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    study[part] = figures
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    return study


def put_between_marks(page: Path, lines: Sequence[str], title: str) -> None:
    """Replace what lies between the marks of a page by `lines`; a page without marks gets them at its end.

    Args:
        title: of a page that does not exist yet.
    """
    begin, end = MARKS
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    before, after = text.split(begin)[0], text.split(end)[1]
    content = "\n".join(lines)
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{content}\n{end}{after}", encoding="utf-8")
