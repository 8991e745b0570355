"""Every command that documents, docstrings and messages name exists and explains itself."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

COMMAND = re.compile(r"python -m ((?:LightningDiT|studies)(?:\.[a-z_]+)+)")
DOCUMENTS = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "models").glob("*/*.md")]
SOURCES = [
    path for folder in ("LightningDiT", "setup_steps", "studies") for path in (PROJECT / folder).rglob("*.py")
] + list(PROJECT.glob("*.py"))


def named_in(files: list[Path]) -> set[str]:
    return {name for path in files for name in COMMAND.findall(path.read_text(encoding="utf-8"))}


def test_documents_name_commands() -> None:
    found = named_in(DOCUMENTS)
    assert len(found) >= 20
    assert {"LightningDiT.inference", "LightningDiT.tools.benchmark", "studies.solver_study"} <= found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(named_in(DOCUMENTS + SOURCES)))
def test_a_named_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert stopped.value.code in (0, None)
    assert f"usage: python -m {name}" in capsys.readouterr().out
