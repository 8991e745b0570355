"""Where pip looks, and what its real complaints become."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from setup_steps import pip_calls
from setup_steps.pip_calls import InstallError, Source
from tests.project_copy import PYTHON
from tests.wheels import make_wheel

ALONE = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}


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
    assert "while it installed tinyprobe==1.0: no connection to a package index; fix: switch the internet on" in said
    assert said.endswith(
        f"(Kaggle: Settings, Internet), or {PYTHON} step1_install_environment.py --wheels FOLDER with the wheels in it"
    )
    assert time.monotonic() - began < 60


def test_a_wheel_that_is_not_there_is_named_with_the_python(offline: None, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "tinyprobe", "1.0", "")
    said = complaint(Source((tmp_path / "wheels",), index=False), "tinyprobe==2.0", tmp_path / "target")
    assert f"tinyprobe==2.0 is not available for this Python {sys.version_info[0]}.{sys.version_info[1]}; fix:" in said


def test_a_damaged_wheel_is_called_that(offline: None, tmp_path: Path) -> None:
    (tmp_path / "tinyprobe-1.0-py3-none-any.whl").write_bytes(b"no archive")
    said = complaint(Source((tmp_path,), index=False), "tinyprobe==1.0", tmp_path / "target")
    assert "a downloaded file is damaged; fix: python -m pip cache purge" in said


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
        ("something new\n", "pip says why above"),
    ],
)
def test_complaints_that_cannot_be_caused_here(said: str, words: str) -> None:
    assert words in str(pip_calls.explain(said, ["a==1"], 1))


def test_a_first_source_fails_quietly(offline: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path, "other", "1.0", "")
    assert not pip_calls.pip_install(["tinyprobe==1.0"], Source((tmp_path,), index=False, last=False))
    assert capfd.readouterr().err == ""


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


def test_a_folder_without_wheels_is_quoted_in_the_fix(tmp_path: Path) -> None:
    folder = tmp_path / "Li's wheels"
    with pytest.raises(LightningDiTError) as refusal:
        pip_calls.find_sources(folder)
    assert str(folder) in shlex.split(refusal.value.fix)
