"""Where pip looks, and what its real complaints become."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from setup_steps import pip_calls
from setup_steps.pip_calls import InstallError, Source
from tests.project_copy import PYTHON
from tests.wheels import make_index, make_wheel, running_files

CLOSED = "http://127.0.0.1:9/simple"
ALONE = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": CLOSED}
OTHER = f"{PYTHON} step1_install_environment.py --index-url https://MIRROR/simple"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip knows no index but a closed port."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_DEFAULT_TIMEOUT", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)


def complaint(source: Source, requirement: str, target: Path) -> str:
    """The one line for what pip really says."""
    with pytest.raises(InstallError) as error:
        pip_calls.pip_install([requirement], source, "--target", str(target))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_connection_is_said_soon(offline: None, tmp_path: Path) -> None:
    began = time.monotonic()
    said = complaint(Source(), "tinyprobe==1.0", tmp_path)
    assert f"while it installed tinyprobe==1.0: no connection to the package index {CLOSED}; fix: switch the" in said
    assert f"or {PYTHON} step1_install_environment.py --wheels FOLDER with the wheels in it, or unset PIP_I" in said
    assert said.endswith(f"unset PIP_INDEX_URL, or {OTHER} with the address of another index")
    assert time.monotonic() - began < 60


def test_a_wheel_that_is_not_there_is_named_with_the_python(offline: None, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "tinyprobe", "1.0", "")
    said = complaint(Source((tmp_path / "wheels",), index=False), "tinyprobe==2.0", tmp_path / "target")
    assert f"tinyprobe==2.0 is not available for this Python {sys.version_info[0]}.{sys.version_info[1]}; fix:" in said


def test_a_damaged_wheel_is_called_that(offline: None, tmp_path: Path) -> None:
    (tmp_path / "tinyprobe-1.0-py3-none-any.whl").write_bytes(b"no archive")
    said = complaint(Source((tmp_path,), index=False), "tinyprobe==1.0", tmp_path / "target")
    assert "a downloaded file is damaged; fix: python -m pip cache purge" in said


def test_a_setting_that_forbids_the_index_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InstallError, match=r"tinyprobe==1.0 is not here, .*forbids.*; fix: PIP_NO_INDEX=0 \S*python"):
        pip_calls.pip_install(["tinyprobe==1.0"], Source())


def test_a_dependency_on_another_torch_is_refused_and_not_obeyed(offline: None, tmp_path: Path) -> None:
    make_wheel(tmp_path, "torch", "2.7.1", "")
    make_wheel(tmp_path, "torch", "2.14.1", "")
    make_wheel(tmp_path, "greedy", "1.0", "", "torch>=2.8")
    (tmp_path / "held.txt").write_text("torch==2.7.1\n")
    source = Source((tmp_path,), index=False)
    with pytest.raises(InstallError, match="the wanted packages exclude one another"):
        pip_calls.pip_install(
            ["greedy==1.0"], source, "--target", str(tmp_path / "t"), "-c", str(tmp_path / "held.txt")
        )
    assert not (tmp_path / "t" / "torch.py").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            "the disk is full",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/usr/lib/x'\n",
            "-m venv",
        ),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n", "cache purge"),
        (
            "× Download failed after 6 attempts because not enough bytes were received\n",
            "a download broke off; fix: ch",
        ),
        ("ERROR: Could not find an activated virtualenv (required).\n", "(PIP_REQUIRE_VIRTUALENV) forbids"),
        ("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 31\n", "cannot read the metadata of"),
        ("something new\n", "pip says why above"),
    ],
)
def test_complaints_that_cannot_be_caused_here(said: str, words: str) -> None:
    assert words in str(pip_calls.explain(said, ["a==1"], 1))


def test_a_first_source_fails_quietly(offline: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path, "other", "1.0", "")
    assert not pip_calls.pip_install(["tinyprobe==1.0"], Source((tmp_path,), index=False, last=False))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("refusal", "host", "words"),
    [
        (403, "", "where its files are, refuses one with HTTP 403"),
        (0, "127.0.0.1:9", "where its files are, cannot be reached"),
    ],
)
def test_the_host_of_the_files_is_named(offline: None, tmp_path: Path, refusal: int, host: str, words: str) -> None:
    """A mirror that has the pages and sends on to another host for the files, which firewalls often block."""
    make_wheel(tmp_path / "wheels", "tinyprobe", "1.0", "")
    with running_files(tmp_path / "wheels", refusal) as files, running_files(tmp_path / "index") as index:
        make_index(tmp_path / "index", tmp_path / "wheels", host or files)
        url = f"http://{index}/simple"
        said = complaint(Source(url=url), "tinyprobe==1.0", tmp_path / "target")
    assert f"the package index {url} answers, but {host or files}, {words}; fix: {OTHER} with" in said


def test_an_index_that_lags_or_is_none_is_named(offline: None, tmp_path: Path) -> None:
    for version in ("1.0", "1.10"):
        make_wheel(tmp_path / "wheels", "tinyprobe", version, "")
    python = ".".join(map(str, sys.version_info[:2]))
    with running_files(tmp_path / "wheels") as files, running_files(tmp_path / "index") as index:
        make_index(tmp_path / "index", tmp_path / "wheels", files)
        url = f"http://{index}/simple"
        lags = complaint(Source(url=url), "tinyprobe==2.0", tmp_path / "target")
        assert f"tinyprobe==2.0 is not available for this Python {python} in the package index {url}, the n" in lags
        assert f"the newest there is 1.10; fix: {OTHER} with" in lags
        none = complaint(Source(url=f"http://{index}/sample"), "tinyprobe==1.0", tmp_path / "target")
        assert f"the package index http://{index}/sample lists no tinyprobe==1.0 for this Python {python}" in none
        assert pip_calls.pip_install(["tinyprobe==1.0"], Source(url=url), "--target", str(tmp_path / "target"))
    assert (tmp_path / "target" / "tinyprobe.py").is_file()


def test_an_index_that_pip_does_not_trust_is_named(offline: None, tmp_path: Path) -> None:
    said = complaint(Source(url="http://index.invalid/simple"), "tinyprobe==1.0", tmp_path)
    assert "pip takes nothing from index.invalid over http://" in said
    assert "or PIP_TRUSTED_HOST=index.invalid if you trust the way there" in said


@pytest.mark.parametrize(
    ("asked", "variables", "configuration", "line"),
    [
        ("https://a.example/simple", {}, "", "Index: https://a.example/simple (by --index-url)"),
        (
            *("https://me:secret@a.example/simple", {"PIP_INDEX_URL": CLOSED}, ""),
            "Index: https://****@a.example/simple (by --index-url, which goes before PIP_INDEX_URL)",
        ),
        ("", {"PIP_INDEX_URL": CLOSED}, "[global]\nindex-url = x", f"Index: {CLOSED} (by the variable PIP_INDEX_URL)"),
        ("", {"PIP_INDEX_URL": "http://s3cret@h"}, "", "Index: http://****@h (by the variable PIP_INDEX_URL)"),
        (
            *("", {"PIP_INDEX_URL": ""}, "[install]\nindex-url = https://i.example/\n[global]\nindex-url = x"),
            "Index: https://i.example/ (by install.index-url of pip's configuration)",
        ),
        (
            *("", {}, "[global]\nextra-index-url = https://u:p@b.example/s\n  file:///c"),
            "Index: that of pip by default (neither --index-url nor PIP_INDEX_URL nor pip's configuration names one; "
            "pip's extra-index-url adds https://****@b.example/s file:///c)",
        ),
        ("", {"PIP_NO_INDEX": "1"}, "", "Index: none, pip's setting no-index (PIP_NO_INDEX) forbids it"),
        (
            *("https://a.example/", {}, "[global]\nno-index = true"),
            "Index: none, pip's setting no-index (PIP_NO_INDEX) forbids it; --index-url has no effect",
        ),
    ],
)
def test_the_index_and_its_reason_in_one_line(
    *, asked: str, variables: dict, configuration: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the real pip reads its variables and files."""
    (tmp_path / "pip.conf").write_text(configuration)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}.items():
        monkeypatch.setenv(name, value)
    assert pip_calls.describe_index(asked) == line


def test_no_message_holds_the_credentials_of_an_index(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url = "http://me:s3cr@et@127.0.0.1:9/simple"
    monkeypatch.setattr(sys, "argv", ["step1_install_environment.py", f"--index-url={url}", "--dev"])
    said = complaint(Source(url=url), "tinyprobe==1.0", tmp_path)
    assert "no connection to the package index http://****@127.0.0.1:9/simple" in said
    assert pip_calls.again().endswith(" '--index-url=http://****@127.0.0.1:9/simple' --dev")
    shown = capfd.readouterr()
    assert "127.0.0.1:9" in shown.out
    for secret in ("s3cr", "et@"):
        assert secret not in said + shown.out + shown.err


def test_an_option_is_the_address_of_an_index_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "my index"
    folder.mkdir()
    for good in ("https://h/simple", "http://u:p@[::1]:8080/simple/", folder.as_uri()):
        assert pip_calls.index_url(good) == good
    for bad in (
        *("", "h/simple", "//h/simple", "ftp://h/simple", "https://", "https:///simple", "C:\\simple", "/simple"),
        *("https://h:port/", "https://h:99999/", "https://[::1/", "https://h/a b", "https://h/\n", "file:simple"),
        *("https：//h/simple", "file://simple", (tmp_path / "gone").as_uri()),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=r"given, https://HOST/\.\.\., http"):
            pip_calls.index_url(bad)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^'ftp://\*{4}@h' given"):
        pip_calls.index_url("ftp://me:secret@h")


def test_sources_by_what_is_given_and_attached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delenv("LIGHTNINGDIT_ATTACHED", raising=False)
    assert pip_calls.find_sources(None) == (Source(),)
    deep = tmp_path / "input" / "my-wheels" / "linux"
    make_wheel(deep, "tinyprobe", "1.0", "")
    make_wheel(tmp_path / "input" / "more", "tinyprobe", "1.0", "")
    monkeypatch.setenv("LIGHTNINGDIT_ATTACHED", str(tmp_path / "input"))
    folders = tuple(sorted((deep, tmp_path / "input" / "more")))
    assert pip_calls.find_sources(None) == (Source(folders, index=False, last=False), Source(folders))
    assert pip_calls.find_sources(None, "https://a.example")[-1] == Source(folders, url="https://a.example")
    assert pip_calls.find_sources(deep) == (Source((deep,), index=False),)
    for wrong, words in ((tmp_path / "input", "holds no .whl file"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(LightningDiTError, match=words):
            pip_calls.find_sources(wrong)


def test_attached_wheels_are_found_behind_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A data set may be a link, and one that leads back up is not followed for ever."""
    make_wheel(tmp_path / "elsewhere" / "deep", "tinyprobe", "1.0", "")
    attached = tmp_path / "input"
    attached.mkdir()
    (attached / "set").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(attached)
    monkeypatch.setenv("LIGHTNINGDIT_ATTACHED", str(attached))
    folders = (attached / "set" / "deep",)
    assert pip_calls.find_sources(None) == (Source(folders, index=False, last=False), Source(folders))


def test_the_command_of_an_own_environment_on_both_systems() -> None:
    for system, python in (("posix", ".venv/bin/python"), ("nt", ".venv/Scripts/python.exe")):
        made, _, rest = pip_calls.in_own_venv(system).partition(" && ")
        assert shlex.split(made) == [sys.executable, "-m", "venv", ".venv"]
        assert rest == f"{python} step1_install_environment.py"
