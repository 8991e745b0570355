"""What the library's long work shows: rate, time left, and Ctrl-C as a request."""

from __future__ import annotations

import re
import signal
import threading

import pytest

from LightningDiT import console
from LightningDiT.console import Progress, StopRequest


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 5.0, 20.0, 30.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = Progress(100, "image")
    progress.reach(2.5)  # too early for a line
    progress.reach(40, "49 evaluations each")
    progress.update(2)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "  40 of 100 images, 2.0 images/s, 49 evaluations each, about 30 s left",
        "  42 of 100 images, 1.4 images/s, about 41 s left",
    ]


def test_slow_work_is_said_in_seconds_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    Progress(10, "image").update(2)
    assert capsys.readouterr().out == "  2 of 10 images, 15.0 s/image, about 2 min 0 s left\n"


def test_a_terminal_gets_a_bar_with_parts_of_an_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    progress = Progress(8, "image")
    for done in (0.25, 4.0, 8.0):
        progress.reach(done, "9 evaluations each")
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"100% .*8/8 \[00:00<00:00, .*image/s, 9 evaluations each\]", last)


def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    Progress(2, "image", quiet=True).update(2)
    assert capsys.readouterr() == ("", "")


def test_the_first_ctrl_c_is_a_request_and_the_second_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("stopping after the batch under way") == 1
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
