"""The command for wheels, run by the real pip, and its words against the packages that are installed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import step1_install_environment as step1
from LightningDiT.errors import LightningDiTError
from setup_steps import wheel_command
from setup_steps.install import read_pins
from setup_steps.machine import installed_version
from setup_steps.project import PROJECT
from setup_steps.releases import public
from tests.wheels import make_wheel

#: The forms of tags that the wheels of the pins carry.
TAGS = ("cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64", "cp38-abi3-manylinux2014_x86_64", "py3-none-any")
TAGS += ("cp36-abi3-manylinux2010_x86_64.manylinux_2_12_x86_64", "cp312-cp312-manylinux_2_17_x86_64")
ON_KAGGLE = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}


def needs_of(name: str) -> list[Requirement]:
    """What an installed package needs on Kaggle, apart from torch."""
    needs = [Requirement(text) for text in metadata.requires(name) or []]
    wanted = [need for need in needs if not need.marker or need.marker.evaluate(ON_KAGGLE)]
    return [need for need in wanted if need.name not in wheel_command.TORCH]


def test_the_companions_are_all_that_the_pins_need() -> None:
    """Also none too new: a bound from above is one of the command."""
    for pin in read_pins(PROJECT / "requirements.txt"):
        if public(installed_version(pin.name) or "") != pin.version:
            pytest.skip(f"{pin.name} {pin.version}, whose needs are asked, is not installed")
    pins = {canonicalize_name(pin.name) for pin in read_pins(PROJECT / "requirements.txt")}
    bounds = {canonicalize_name(need.name): need.specifier for need in map(Requirement, wheel_command.COMPANIONS)}
    left, seen = [name for name in sorted(pins) if name not in wheel_command.TORCH], set()
    while left:
        for need in needs_of(left.pop()):
            name = canonicalize_name(need.name)
            if name in pins:
                continue
            left += [name] if name not in seen else []
            seen.add(name)
            for below in (bound for bound in need.specifier if bound.operator == "<"):
                kept = re.fullmatch(r"~=(\d+)\.\d+", str(bounds[name]))
                assert kept, f"{need} bounds {name}"
                assert int(kept[1]) < int(below.version.split(".")[0])
    only_before_3_11 = {"exceptiongroup", "tomli"}
    assert seen | only_before_3_11 == set(bounds)


@pytest.mark.parametrize("python", [(3, 10), (3, 12), (3, 14)])
def test_every_shell_reads_the_command_alike(python: tuple[int, int]) -> None:
    """cmd.exe, PowerShell and sh all part it at the spaces; characters with a meaning are absent."""
    command = wheel_command.wheel_command(python, index_url="https://mirror.example.org:8080/pypi/simple")
    assert shlex.split(command) == command.split(" ")
    assert not set(command) & set("\"'`$&|<>^%!*?()[]{};#@,\\\n")
    assert f"--python-version {python[0]}.{python[1]} --implementation cp --abi cp{python[0]}{python[1]} " in command


def test_pip_fetches_every_wheel_for_another_platform_and_no_torch(tmp_path: Path) -> None:
    command = wheel_command.wheel_command((3, 12)).split(" ")
    named = command[command.index("none") + 1 :]
    for number, word in enumerate(named):
        name, version = re.split("==|~=", f"{word}==1.0" if "=" not in word else word)
        needs = ("torch", "torchvision") if name == "timm" else ()
        make_wheel(tmp_path / "index", name.replace("-", "_"), version, "", *needs, tag=TAGS[number % len(TAGS)])
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = {path.name for path in (tmp_path / "wheels").iterdir()}
    assert fetched == {path.name for path in (tmp_path / "index").iterdir()}
    assert len(fetched) == len(named)


def test_torch_comes_with_its_torchvision_and_its_dependencies() -> None:
    words = wheel_command.wheel_command((3, 12), wheel_command.choose_release("2.7.1", (3, 12))).split(" ")
    assert {"torch==2.7.1", "torchvision==0.22.1"} < set(words)
    assert "--no-deps" not in words
    pins = {pin.name: pin.version for pin in read_pins(PROJECT / "requirements.txt")}
    assert wheel_command.choose_release("", (3, 14)).torch == pins["torch"]
    with pytest.raises(LightningDiTError, match=r"torch 2\.7\.1 has no wheels for Python 3\.14; fix: name another Py"):
        wheel_command.choose_release("2.7.1", (3, 14))
    with pytest.raises(LightningDiTError, match=r"--with-torch 2\.2\.0 is none of the releases "):
        wheel_command.choose_release("2.2.0", (3, 12))  # which needs an older numpy than the pin


def test_an_address_that_a_shell_would_change_is_refused_without_its_password() -> None:
    for url in ("https://me:s3cret@mirror.example.org/simple", "https://mirror.example.org/simple?a=1&b=%20"):
        with pytest.raises(LightningDiTError, match=r"and set PIP_INDEX_URL where you run the command") as refusal:
            wheel_command.wheel_command((3, 12), index_url=url)
        assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize(("kaggle", "origin"), [(True, "that of this notebook"), (False, "that of Kaggle's image")])
def test_the_command_alone_is_on_stdout(
    kaggle: bool, origin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    python = sys.version_info[:2] if kaggle else (3, 12)
    wheel_command.print_command(None, None, "")
    shown = capsys.readouterr()
    assert shown.out == wheel_command.wheel_command(python) + "\n"
    assert f"For Python {python[0]}.{python[1]}, {origin} (another: --python-version 3.x)" in shown.err
    assert "Without torch and torchvision, which Kaggle has (--with-torch adds them)" in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--python-version 3.12", "--python-version: has no effect without --write-wheel-command"),
        ("--with-torch", "--with-torch: has no effect without --write-wheel-command"),
        ("--write-wheel-command --wheels wheels", "--wheels: has no effect with --write-wheel-command"),
        ("--write-wheel-command --profile official", "--profile: has no effect with --write-wheel-command"),
        ("--write-wheel-command --dev --python-version 3.12", "--dev: has no effect with --write-wheel-command"),
        ("--write-wheel-command --python-version 3.9", "'3.9' given, 3.10, 3.11, 3.12 or newer expected"),
        ("--write-wheel-command --python-version 312", "'312' given, 3.10, 3.11, 3.12 or newer expected"),
        ("--index-url https://h/ --wheels wheels", "--index-url: has no effect with --wheels or --check-only"),
    ],
)
def test_an_option_without_effect_is_a_usage_error(
    options: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        step1.main(options.split())
    assert end.value.code == 2
    assert words in capsys.readouterr().err
