"""How the steps speak: numbers in words, progress, exit codes and one-line errors."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from setup_steps import console
from setup_steps.console import PROJECT
from tests.project_copy import copy_project, run_script


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (6_000_000_000, "6.0 GB"), (1e13, "10.0 TB")],
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert console.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert console.format_seconds(seconds) == text


def test_progress_on_a_pipe_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = console.Progress("file", 4000, start=1000, stream=stream, period=0.0)
    progress.began -= 1.0  # one second ago, so that 1000 new bytes are 1 kB/s
    progress.update(2000)
    progress.close()
    assert re.fullmatch(r"  file: 50 %, 2\.0 kB of 4\.0 kB, (1\.0 k|99\d )B/s, 2\.\d s left\n", stream.getvalue())


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 0", 0, ""),
        ("raise console.StepError('x is 3, 4 was expected', 'python y.py')", 1, "error: x is 3, 4"),
        ("raise PermissionError(13, 'Permission denied', '/a/b')", 1, "error: /a/b: Permission"),
        (
            "raise FileNotFoundError(2, 'No such file', '/a b')",
            1,
            "error: /a b: No such file; fix: ls -ld '/a b' shows what is there; put it right and run the same command",
        ),
        ("raise ConnectionResetError(104, 'reset')", 1, "error: reset; fix: run the same command again"),
        ("raise OSError('no number')", 1, "error: no number; fix: run the same command again"),
        ("raise KeyboardInterrupt", 130, ""),
        (
            "from LightningDiT import errors\n    raise errors.LightningDiTError('bad', 'fix')",
            1,
            "error: bad; fix: fix",
        ),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(body: str, code: int, words: str) -> None:
    program = f"from setup_steps import console\ndef main():\n    {body}\nconsole.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == (1 if words else 0)


def test_a_bug_keeps_its_traceback() -> None:
    program = "from setup_steps import console\nconsole.run(lambda: 1 / 0)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "package", ["LightningDiT.no_such_module", "setup_steps.no_such_module", "lzma.no_such_module"]
)
def test_a_missing_module_of_the_project_or_of_python_is_a_bug(package: str) -> None:
    program = f"from setup_steps import console\ndef main():\n    import {package}\nconsole.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="mv of a POSIX shell")
def test_a_command_that_renames_holds_for_any_name(tmp_path: Path) -> None:
    """The command is run by a shell as a person pastes it."""
    place = tmp_path / "Li's models $HOME 图像"
    place.write_text("mine")
    with pytest.raises(console.StepError, match="is a file, a folder was expected; fix: mv ") as refusal:
        console.require_writable(place)
    subprocess.run(refusal.value.fix, shell=True, check=True)
    assert (place.exists(), place.with_name(place.name + ".old").read_text()) == (False, "mine")


def test_a_stream_that_is_no_file_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under %run, where stdout is the notebook's own."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        console.run(lambda: print("said") or 0)
    assert (ended.value.code, stream.getvalue()) == (0, "said\n")


def test_an_absent_package_is_one_line_with_the_interpreter_that_has_it(tmp_path: Path) -> None:
    """Step 4 by a bare Python: without .venv, with one beside it, and by the one in it."""
    folder = copy_project(tmp_path / "copy", "LightningDiT")
    bare = tmp_path / "bare"
    for made in (bare, folder / ".venv"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    own = folder / ".venv"
    own.rename(tmp_path / "aside")

    def complaint(environment: Path, *options: str) -> str:
        python = console.venv_python(environment)
        done = run_script(folder / "step4_run_inference.py", *options, python=str(python), cwd=tmp_path, PYTHONPATH="")
        assert done.returncode == 1
        head, _, fix = done.stderr.partition("; fix: ")
        assert re.fullmatch(
            rf"error: package '\w+' is not installed for this Python \({re.escape(str(python))}\)", head
        )
        return fix

    assert complaint(bare) == "python step1_install_environment.py\n"
    (tmp_path / "aside").rename(own)
    python = console.venv_python(Path(".venv"))
    assert complaint(bare, "--seed", "3") == f"{python} step4_run_inference.py --seed 3\n"
    assert complaint(own) == f"{python} step1_install_environment.py\n"
    program = "from setup_steps import machine\nmachine.require_torch('this')\n"
    done = run_script(Path("-c"), program, python=str(console.venv_python(bare)), cwd=folder, PYTHONPATH="")
    assert done.stderr.endswith(f"; fix: {python} step1_install_environment.py\n")


def test_the_interpreter_of_an_environment_on_both_systems() -> None:
    assert str(console.venv_python(PureWindowsPath(".venv"), "nt")) == r".venv\Scripts\python.exe"
    assert str(console.venv_python(PurePosixPath(".venv"), "posix")) == ".venv/bin/python"


def test_steps_1_and_2_load_without_torch_and_the_library() -> None:
    program = (
        "import sys, quickstart, step1_install_environment, step2_download_models\n"
        "from setup_steps import configs, downloads, checks, install, machine, stats_repair\n"
        "found = {name.split('.')[0] for name in sys.modules}\n"
        "print(found & {'torch', 'LightningDiT', 'huggingface_hub', 'numpy', 'yaml'})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_is_given_back_with_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["step2_download_models.py", "--model", "64ep", "--source=attached", "--attached", "a b", "--verify"]
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{given[0]}", *given[1:]])
    monkeypatch.setattr(console, "interpreter", lambda: "python")
    assert console.again("step1.py") == "python " + shlex.join(given)
    without = console.again("step1.py", "--source", "hub", without=("--source", "--attached", "--verify"))
    assert without == "python step2_download_models.py --model 64ep --source hub"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    assert console.again("step1_install_environment.py", "--dev") == "python step1_install_environment.py --dev"


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream as a POSIX shell does")
def test_a_closed_stdout_is_no_fault() -> None:
    program = "from setup_steps import console\ndef main():\n    print('x')\n    return 0\nconsole.run(main)\n"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} >&-"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_may_not_be_read_is_told_from_one_that_may_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a person who is not root, whom nothing keeps from reading."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    (tmp_path / "there").touch()
    there, absent = (PermissionError(13, "Permission denied", str(tmp_path / name)) for name in ("there", "absent"))
    assert f"; fix: chmod u+r {tmp_path / 'there'}, then run" in console.describe_os_error(there)
    assert "; fix: copy the project to a folder that you may write to" in console.describe_os_error(absent)
