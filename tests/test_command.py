"""The console command `lightningdit`: each name runs one entry point with the options of its module call."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import LightningDiT
from LightningDiT.command import main as command
from LightningDiT.command.main import COMMANDS
from LightningDiT.console import called_as, program
from LightningDiT.errors import LightningDiTError
from tests.conftest import PROJECT
from tests.test_commands import DOCUMENTS

NAMED = re.compile(r"(?<![\w/.-])lightningdit ([a-z-]+)")


def test_every_module_with_a_main_runs_as_a_module() -> None:
    """Without its last lines `python -m` would do nothing and exit with 0."""
    files = [*PROJECT.glob("*.py"), *(PROJECT / "LightningDiT").rglob("*.py"), *(PROJECT / "studies").rglob("*.py")]
    texts = {str(file.relative_to(PROJECT)): file.read_text(encoding="utf-8") for file in files}
    programs = {name: text for name, text in texts.items() if re.search(r"^def main\(", text, re.MULTILINE)}
    assert len(programs) > len(COMMANDS)
    assert [name for name, text in programs.items() if 'if __name__ == "__main__":' not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_module_call(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    module = importlib.import_module(f"LightningDiT.{COMMANDS[name][0]}")
    for main, options in ((command.main, [name, "--help"]), (module.main, ["--help"])):
        with pytest.raises(SystemExit) as stopped:
            main(options)
        assert stopped.value.code == 0
        said.append(capsys.readouterr().out)
    usage = [re.match(r"usage: (.*?)\s+\[", text) for text in said]
    assert [found[1] for found in usage if found] == [
        f"lightningdit {name}",
        f"python -m LightningDiT.{COMMANDS[name][0]}",
    ]
    options = [set(re.findall(r"^  (--?[\w-]+)", text, re.MULTILINE)) for text in said]
    assert options[0] == options[1] >= {"-h"}


def test_the_rest_of_the_command_line_and_the_exit_code_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def imported(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda argv: taken.append((name, argv, program("x"))) or 7)

    monkeypatch.setattr(command.importlib, "import_module", imported)
    assert command.main(["sample", "--seed", "3", "--help"]) == 7
    monkeypatch.setattr(sys, "argv", ["lightningdit", "doctor", "--quick"])
    assert command.main() == 7
    assert taken == [
        ("LightningDiT.inference", ["--seed", "3", "--help"], "lightningdit sample"),
        ("LightningDiT.command.doctor", ["--quick"], "lightningdit doctor"),
    ]
    assert program("x") == "python -m LightningDiT.x"  # behind the command


def test_words_end_with_their_block_whatever_happens() -> None:
    with pytest.raises(ValueError, match="inside"), called_as("lightningdit x"):
        raise ValueError(program("y") + " inside")
    assert program("y") == "python -m LightningDiT.y"


def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        raise LightningDiTError("3 is wrong", "give 4")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(main=fail))
    assert command.main(["train"]) == 1
    assert capsys.readouterr().err == "error: 3 is wrong; fix: give 4\n"


@pytest.mark.parametrize("options", [[], ["paint"], ["--seed", "3"]])
def test_no_or_an_unknown_command_is_a_question_of_usage(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    assert stopped.value.code == 2
    assert "usage: lightningdit COMMAND ..." in capsys.readouterr().err


def test_help_lists_the_commands_and_version_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in (("--help", COMMANDS), ("--version", [f"lightningdit {LightningDiT.__version__}"])):
        with pytest.raises(SystemExit) as stopped:
            command.main([option])
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert all(re.search(rf"^ *{re.escape(word)}\b", said, re.MULTILINE) for word in words)


def test_help_imports_no_command() -> None:
    code = "import sys; from LightningDiT.command.main import parse; parse(['doctor']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_documents_name_commands_that_exist() -> None:
    found = {name for path in DOCUMENTS for name in NAMED.findall(path.read_text(encoding="utf-8"))}
    assert {"sample", "doctor"} <= found <= {*COMMANDS}
