"""What a command shows: numbers in words, exit codes, one-line errors, progress, and Ctrl-C as a request."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from LightningDiT import console
from LightningDiT.console import (
    Progress,
    StopRequest,
    describe_os_error,
    duration,
    format_bytes,
    importing,
    printable,
    run_main,
)
from LightningDiT.errors import LightningDiTError, in_chinese
from setup_steps.project import PROJECT

#: A program as the library's commands and as the steps end; both have one set of rules.
ENDS = {
    "command": "from LightningDiT.console import run_main\ndef end(main): sys.exit(run_main(main))\n",
    "step": "from setup_steps.project import run as end\n",
}


def run_program(kind: str, body: str) -> subprocess.CompletedProcess[str]:
    """Run a `main` of these lines in a process of its own."""
    head = f"import sys\nfrom LightningDiT.errors import LightningDiTError\n{ENDS[kind]}"
    program = f"{head}def main():\n    {body}\nend(main)\n"
    return subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)


#: Variables that say in which language a person reads: each set, and whether fixes are shown in Chinese.
LANGUAGES = [
    ({"LIGHTNINGDIT_LANG": "zh"}, True),
    ({"LIGHTNINGDIT_LANG": "zh_CN", "LC_ALL": "C"}, True),
    ({"LIGHTNINGDIT_LANG": '"ZH"'}, True),
    ({"LIGHTNINGDIT_LANG": "en", "LC_ALL": "zh_CN.UTF-8"}, False),
    ({"LIGHTNINGDIT_LANG": "fr", "LANG": "zh_CN.UTF-8"}, True),
    ({"LIGHTNINGDIT_LANG": "", "LANG": "zh_CN.UTF-8"}, True),
    ({"LANG": "zh_TW"}, True),
    ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE.UTF-8"}, False),
    ({"LANG": "de_DE.UTF-8", "LC_ALL": "zh_CN.UTF-8"}, True),
    ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, True),
    ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh_CN"}, False),
    ({"LANG": "C", "LANGUAGE": "zh_CN"}, False),
    ({"LANG": "C"}, False),
]


@pytest.fixture
def languages(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment without a word about languages."""
    for name in ("LIGHTNINGDIT_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("variables", "chinese"), LANGUAGES)
def test_chinese_is_shown_where_gettext_would_show_it(
    variables: dict[str, str], chinese: bool, languages: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        languages.setenv(name, value)
    assert console.reads_chinese() == chinese


@pytest.mark.parametrize(
    ("system", "chinese"), [("zh_CN", True), ("Chinese (Simplified)_China", True), ("de_DE", False)]
)
def test_without_variables_the_systems_locale_counts(system: str, chinese: bool, languages: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    languages.setattr(console.locale, "getlocale", lambda: (system, "936"))
    assert console.reads_chinese() == chinese


@pytest.mark.parametrize(
    ("body", "code", "chinese"),
    [
        ("raise LightningDiTError('m', 'name another file')", 1, "解决办法：指定其他文件\n"),
        ("raise LightningDiTError('m', 'what only others say')", 1, ""),
        ("raise LightningDiTError('m')", 1, ""),
        (
            "raise FileNotFoundError(2, 'No such file', '/路 a')",
            1,
            "解决办法：用 ls -ld '/路 a' 查看该处的内容；改正后重新运行同一条命令\n",
        ),
        ("raise FileNotFoundError(2, 'No file', 'a\\udc80')", 1, "解决办法：用 ls -ld 'a\\udc80' 查看"),
        ("raise MemoryError", 1, "解决办法：关闭其他程序，减小批大小，或换用较小的模型\n"),
        ("import no_such_package", 1, "解决办法：运行 "),
        ("raise KeyboardInterrupt", 130, "已停止：完成的部分已保留，重新运行同一条命令即可继续\n"),
        ("import argparse; argparse.ArgumentParser().parse_args(['x'])", 2, "解决办法：加上 --help 运行"),
        ("sys.exit(1)", 1, ""),
    ],
)
def test_a_second_line_says_the_fix_in_chinese(
    body: str, code: int, chinese: str, languages: pytest.MonkeyPatch
) -> None:
    languages.setenv("PYTHONIOENCODING", "utf-8")
    languages.setenv("LIGHTNINGDIT_LANG", "en")
    english = run_program("step", body)
    languages.setenv("LIGHTNINGDIT_LANG", "zh")
    both = run_program("step", body)
    assert (both.returncode, english.returncode) == (code, code)
    assert both.stderr.startswith(english.stderr)
    assert both.stderr[len(english.stderr) :].startswith(chinese)
    assert both.stderr.count("\n") == english.stderr.count("\n") + bool(chinese)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", True), ("gbk", True), ("ascii", False), ("cp1252", False)])
def test_a_stream_without_chinese_gets_english_alone(encoding: str, shown: bool, languages: pytest.MonkeyPatch) -> None:
    """No escapes of characters that it lacks."""
    program = f"import sys\n{ENDS['command']}def main(): open('/no/such')\nend(main)\n"
    languages.setenv("PYTHONIOENCODING", encoding)
    languages.setenv("LIGHTNINGDIT_LANG", "zh")
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, check=False)
    lines = done.stderr.decode(encoding).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["error:", "解决办法：用"][: 1 + shown]


def test_an_unknown_language_is_said(languages: pytest.MonkeyPatch) -> None:
    languages.setenv("LIGHTNINGDIT_LANG", "fr")
    said = run_program("command", "return 0").stderr
    assert said == "warning: LIGHTNINGDIT_LANG is 'fr' and has no effect; zh and en are the languages\n"


def test_the_catalogue_is_read_for_a_chinese_line_alone(languages: pytest.MonkeyPatch) -> None:
    """Neither at import nor by a run without an error."""
    languages.setenv("LIGHTNINGDIT_LANG", "zh")
    body = "from LightningDiT import errors; print(errors._catalogue.cache_info().currsize); return 0"
    assert run_program("command", body).stdout == "0\n"


def test_a_step_says_its_fix_in_both_languages(languages: pytest.MonkeyPatch) -> None:
    languages.setenv("PYTHONIOENCODING", "utf-8")
    languages.setenv("LC_ALL", "zh_CN.UTF-8")
    command = [sys.executable, "step1_install_environment.py", "--wheels", "nowhere"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, encoding="utf-8", check=False)
    english, chinese = done.stderr.splitlines()
    assert done.returncode == 1
    assert english.startswith("error: ")
    assert chinese == f"解决办法：{in_chinese(english.partition('; fix: ')[2])}"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (6_000_000_000, "6.0 GB"), (1e13, "10.0 TB")],
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0 s"), (3.4, "3 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (7260, "2 h 1 min")],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 0", 0, ""),
        ("return 7", 7, ""),
        ("raise LightningDiTError('x is 3, 4 was expected', 'python y.py')", 1, "error: x is 3, 4 was expected; fix: "),
        ("raise PermissionError(13, 'Permission denied', '/a/b')", 1, "error: /a/b: Permission"),
        (
            "raise FileNotFoundError(2, 'No such file', '/a b')",
            1,
            "error: /a b: No such file; fix: ls -ld '/a b' shows what is there; put it right and run the same command",
        ),
        ("raise ConnectionResetError(104, 'reset')", 1, "error: reset; fix: run the same command again"),
        ("raise OSError('no number')", 1, "error: no number; fix: run the same command again"),
        ("raise KeyboardInterrupt", 130, "stopped; finished work is kept, and the same command goes on from there"),
        (
            "import no_such_package",
            1,
            f"error: package 'no_such_package' is not installed for this Python ({sys.exec_prefix}",
        ),
        ("raise MemoryError", 1, "error: memory ran out (MemoryError); fix: close other programs, or choose a smaller"),
        ("raise RuntimeError('DefaultCPUAllocator: not enough memory: you tried to')", 1, "error: memory ran out (Def"),
        ("return main()", 1, "error: a file is nested without end; fix: name another file"),
        ("'\\udc80'.encode('utf-8')", 1, "error: a text has characters that its encoding lacks ('utf-8' codec"),
        ("raise LightningDiTError('name \\x1b[31mred\\x9b5m')", 1, "error: name ?[31mred?5m\n"),
        ("import warnings\n    warnings.warn('careful')\n    return 0", 0, "warning: careful\n"),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(kind: str, body: str, code: int, words: str) -> None:
    done = run_program(kind, body)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == (1 if words else 0)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped; finished work is kept, and the same command goes on from there\n"),
        (ModuleNotFoundError("no", name="no_such_package"), 1, "error: package 'no_such_package' is not installed"),
    ],
)
def test_imports_of_a_program_end_as_its_main(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that another one imports leaves both to that one."""
    with pytest.raises(SystemExit) as end, importing("__main__"):
        raise error
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith(words) and said.count("\n") == 1
    with pytest.raises(type(error)), importing("LightningDiT.train"):
        raise error
    assert not capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), importing("__main__"):
        raise ZeroDivisionError  # a bug keeps its traceback


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize(
    "body",
    [
        "return 1 / 0",
        "import LightningDiT.no_such_module",
        "import setup_steps.no_such_module",
        "import lzma.no_such_module",
    ],
)
def test_a_bug_keeps_its_traceback(kind: str, body: str) -> None:
    """A missing module of the project or of Python is one too."""
    assert "Traceback" in run_program(kind, body).stderr


def test_a_stream_that_is_no_file_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under %run, where stdout is the notebook's own."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert run_main(lambda: print("said") or 0) == 0
    assert stream.getvalue() == "said\n"


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream as a POSIX shell does")
@pytest.mark.parametrize("kind", ENDS)
def test_a_closed_stdout_is_no_fault(kind: str) -> None:
    program = f"import sys\n{ENDS[kind]}def main():\n    print('x')\n    return 0\nend(main)\n"
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
    assert describe_os_error(there).fix == f"chmod u+r {tmp_path / 'there'}, then run the same command again"
    assert describe_os_error(absent).fix == "choose a folder that you may write to, or copy the project to one"


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 5.0, 20.0, 30.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = Progress(100, "image")
    progress.reach(2.5)  # too early for a line
    progress.reach(40, "49 evaluations each")
    progress.update(2)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "  40 of 100 images, 40 %, 2.0 images/s, 49 evaluations each, about 30 s left",
        "  42 of 100 images, 42 %, 1.4 images/s, about 41 s left",
    ]


def test_bytes_that_were_there_do_not_count_for_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 10.0, 20.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Progress(4_000_000, "byte", label="weights.pt", start=1_000_000) as progress:
        progress.reach(1_000_000)  # nothing yet
        progress.reach(2_000_000)
    assert capsys.readouterr().out == "  weights.pt: 2.0 MB of 4.0 MB, 50 %, 50.0 kB/s, about 40 s left\n"


def test_slow_work_is_said_in_seconds_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    Progress(10, "image").update(2)
    assert capsys.readouterr().out == "  2 of 10 images, 20 %, 15.0 s/image, about 2 min 0 s left\n"


def test_a_terminal_gets_a_moving_line_with_parts_of_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 0.5, 0.6, 1.0, 2.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    with Progress(8, "image") as progress:
        progress.reach(0.25, "9 evaluations each")
        progress.reach(0.5)  # too early for the eye
        progress.reach(4.0)
        progress.reach(8.0)
    said = capsys.readouterr()
    assert said.out == ""
    start, first, second, third, blank, end = said.err.split("\r")
    assert first == "  0 of 8 images, 3 %, 2.0 s/image, 9 evaluations each, about 16 s left"
    assert second == "  4 of 8 images, 50 %, 4.0 images/s, about 1 s left".ljust(len(first))
    assert third.rstrip() == "  8 of 8 images, 100 %, 4.0 images/s, about 0 s left"
    assert (start, blank.strip(), end) == ("", "", "")
    assert len(blank) >= len(third.rstrip())


def test_a_command_of_a_notebooks_cell_moves_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved notebook would keep each state of it, though `!` commands have a terminal."""
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    with Progress(2, "image") as progress:
        progress.update()
    said = capsys.readouterr()
    assert "1 of 2 images" in said.out
    assert said.err == ""


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    Progress(2, "image", quiet=True).update(2)
    assert capsys.readouterr() == ("", "")


def test_progress_needs_no_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal and in a log, as in step 1 on a bare machine."""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # Python's own mark of a module that cannot be imported
    for name, moving in (("PLAIN_INTERVAL", False), ("MOVING_INTERVAL", True)):
        monkeypatch.setattr(console, name, 0.0)
        monkeypatch.setattr(console.sys.stderr, "isatty", lambda moving=moving: moving)
        with Progress(2, "image") as progress:
            progress.update()
        assert "1 of 2 images" in capsys.readouterr()[moving]


def test_an_installed_package_names_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clone has steps, and a package in their place pip."""

    def fail(error: Exception) -> str:
        def main() -> int:
            raise error

        assert run_main(main) == 1
        return capsys.readouterr().err

    absent = ModuleNotFoundError(name="no_such_package")
    steps = LightningDiTError("no weights", "name a file, or python step2_download_models.py")
    others = LightningDiTError("3 is wrong", "give 4")
    assert not console.is_installed()
    assert fail(absent).endswith("; fix: python step1_install_environment.py\n")
    assert fail(steps) == f"error: {steps}\n"
    monkeypatch.setattr(console, "is_installed", lambda: True)
    assert fail(absent).endswith("; fix: python -m pip install 'lightningdit-runnable[all]'\n")
    note = "note: step2_download_models.py belongs to a clone of the project; this is an installed package\n"
    assert fail(steps) == f"error: {steps}\n{note}"
    assert fail(others) == f"error: {others}\n"


class Shell:
    """What IPython says of itself; only in the kernel of a notebook has it a `kernel`."""

    def __init__(self, **parts: object) -> None:
        vars(self).update(parts)


@pytest.fixture
def in_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", Shell(get_ipython=lambda: Shell(kernel=object())))
    monkeypatch.setattr(console, "MOVING_INTERVAL", 0.0)


def test_a_notebook_is_told_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, expected in ((None, False), (Shell(), False), (Shell(kernel=object()), True)):
        monkeypatch.setitem(sys.modules, "IPython", Shell(get_ipython=lambda answer=answer: answer))
        assert console.in_notebook() == expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert not console.in_notebook()


@pytest.mark.parametrize(
    ("total", "unit", "start", "words"),
    [(4, "image", 0, "  75%"), (4, "image", 2, "3/4"), (4_000_000, "byte", 0, "3.00M/4.00M")],
)
def test_in_a_notebook_one_line_moves(
    total: int, unit: str, start: int, words: str, in_kernel: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(total, unit, label="work", start=start) as progress:
        progress.reach(0.75 * total, "a note")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "\n" not in shown.err
    line = shown.err.split("\r")[-3]  # the next one is blank
    assert line.startswith("work: ")
    assert words in line
    assert line.rstrip().endswith(", a note]")
    assert ("B/s" if unit == "byte" else " images/s") in line or f"/ {unit}s" in line


@pytest.mark.parametrize("quiet", [True, False])
def test_a_notebook_without_tqdm_gets_plain_lines(
    quiet: bool, in_kernel: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    with Progress(2, "image", quiet=quiet) as progress:
        progress.update()
    shown = capsys.readouterr()
    assert shown.out.startswith("" if quiet else "  1 of 2 images, 50 %")
    assert bool(shown.out) != quiet
    assert shown.err == ""


def test_lines_of_a_pipe_keep_their_distance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred images in 25 s make a line at 10 s and one at 20 s."""
    clock = iter([0.0, *(0.25 * number for number in range(1, 101))])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with Progress(100, "image") as progress:
        for _ in range(100):
            progress.update()
    shown = capsys.readouterr()
    assert [line[:14] for line in shown.out.splitlines()] == ["  40 of 100 im", "  80 of 100 im"]
    assert shown.err == ""


def test_a_kernel_shows_a_bar_in_one_output() -> None:
    """A real kernel; the program runs in it, and its messages come back as those of a cell."""
    manager = pytest.importorskip("jupyter_client.manager", reason="requirements-dev.txt brings it by ipykernel")
    code = (
        "import time\nfrom LightningDiT.console import Progress\nwith Progress(3, 'image', label='work') as progress:\n"
        "    for _ in range(3):\n        time.sleep(0.25)\n        progress.update()\nprint('behind')"
    )
    outputs: list[dict[str, object]] = []
    with manager.run_kernel(cwd=str(PROJECT)) as client:
        client.execute_interactive(code, timeout=120, output_hook=lambda message: outputs.append(message["content"]))
    text = {
        name: "".join(str(one["text"]) for one in outputs if one.get("name") == name) for name in ("stdout", "stderr")
    }
    assert text["stdout"] == "behind\n"
    widgets = [one for one in outputs if "application/vnd.jupyter.widget-view+json" in str(one)]
    assert widgets or ("work: " in text["stderr"] and "\n" not in text["stderr"])
    assert "Warning" not in text["stderr"]


def test_the_first_ctrl_c_is_a_request_and_the_second_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after the current batch") == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_other_handlers_of_ctrl_c_are_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
    assert not stop.asked


def test_a_thread_takes_no_signals() -> None:
    ended: list[bool] = []

    def work() -> None:
        with StopRequest() as stop:
            ended.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


#: Streams that do not take every text: what is done to the command by a shell, its exit code, and its stderr.
STREAMS = [
    ("| head -1", "", 1, ""),
    ("> /dev/full", "", 1, "error: No space left on device; fix: free space on that disk"),
    (">&-", "", 0, ""),
    ("2>&-", "", 0, ""),
    ("", "ascii", 0, ""),
    ("", "cp1252", 0, ""),
]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize(("shell", "encoding", "code", "words"), STREAMS)
def test_streams_that_take_no_text_or_not_every_one(
    kind: str, shell: str, encoding: str, code: int, words: str, tmp_path: Path
) -> None:
    lines = r"for _ in range(9999): print('\u8d70\u8def \udc80 \x1b]0;title\x07')"
    body = f"    {lines}\n    print('warned', file=sys.stderr)\n    return 0"
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n{ENDS[kind]}def main():\n{body}\nend(main)\n", "utf-8"
    )
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {shell}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": encoding or "utf-8"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=False)
    assert done.returncode == code
    assert done.stderr.decode().removesuffix("warned\n").startswith(words)
    assert done.stderr.count(b"\n") <= 1
    assert b"\x1b" not in done.stdout and b"\x07" not in done.stdout
    if encoding:
        assert done.stdout.startswith(b"\\u8d70\\u8def \\udc80 ?]0;title?")


def test_lines_and_tabs_stay_and_controls_go() -> None:
    assert printable("a\tb\nc\rd \u8d70\u00e9") == "a\tb\nc\rd \u8d70\u00e9"
    assert printable("\x00\x07\x1b[2J\x7f\x9b") == "???[2J??"


def test_streams_are_prepared_once_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run_main(lambda: print("\x1b[1mbold") or 0) for _ in range(3)] == [0, 0, 0]
    assert capsys.readouterr().out == "?[1mbold\n" * 3
