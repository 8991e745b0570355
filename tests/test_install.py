"""Pins, rows and constraints, and who may install where."""

from __future__ import annotations

import itertools
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from LightningDiT.errors import LightningDiTError
from setup_steps import conflicts, install
from setup_steps.install import Pin, Row
from setup_steps.machine import UNKNOWN
from setup_steps.pip_calls import InstallError, Source
from setup_steps.project import PROJECT
from setup_steps.releases import INSTALL, KEEP, REPLACE, Decision
from tests.project_copy import PYTHON
from tests.wheels import make_wheel


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-official.txt"])
@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 13)])
def test_pins_are_read_as_pip_reads_them(name: str, python: tuple[int, int]) -> None:
    wanted = set()
    for line in (PROJECT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            environment = {"python_version": "{}.{}".format(*python)}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                wanted.add((requirement.name, str(requirement.specifier)))
    pins = install.read_pins(PROJECT / name, python)
    assert {(pin.name, f"=={pin.version}") for pin in pins} == wanted
    assert len(pins) == len(wanted) == len({pin.name for pin in pins})
    assert {"torch", "torchvision", "numpy", "huggingface_hub"} <= {pin.name for pin in pins}


def test_the_tested_ranges_are_read_as_pip_reads_them() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (every,) = (Requirement(line) for line in extras.pop("all"))
    assert (every.name, every.extras) == (project["name"], set(extras))
    requirements = [Requirement(line) for line in [*project["dependencies"], *itertools.chain(*extras.values())]]
    ranges = install.read_ranges(PROJECT / "pyproject.toml")
    assert {(one.name, one.specifier) for one in requirements} == {
        (name, SpecifierSet(tested)) for name, tested in ranges.items()
    }


def test_the_ranges_reach_from_the_lowest_versions_to_the_pins() -> None:
    """Each starts at the version in requirements-official.txt and ends before the series behind the newest pin."""
    ranges = install.read_ranges(PROJECT / "pyproject.toml")
    newest = {pin.name: pin.version for pin in install.read_pins(PROJECT / "requirements-dev.txt", (3, 13))}
    lowest = {pin.name: pin.version for pin in install.read_pins(PROJECT / "requirements-official.txt")}
    pinned = {pin.name for pin in install.read_pins(PROJECT / "requirements.txt")}
    assert pinned <= lowest.keys() <= ranges.keys() & newest.keys()
    for name, version in lowest.items():
        major, minor, *_ = Version(newest[name]).release
        assert ranges[name] == f">={version},<{major}.{minor + 1}"
    for pin in install.read_pins(PROJECT / "requirements-dev.txt", (3, 10)):
        assert pin.name not in ranges or pin.version in SpecifierSet(ranges[pin.name])


def test_a_project_without_the_table_is_said(tmp_path: Path) -> None:
    for words in ("is not there", "has no tested range"):
        with pytest.raises(LightningDiTError, match=rf"pyproject.toml {words}; fix: fetch the project again"):
            install.read_ranges(tmp_path / "pyproject.toml")
        (tmp_path / "pyproject.toml").write_text("[project]\n")


def test_development_pins_include_the_others() -> None:
    names = {pin.name for pin in install.read_pins(PROJECT / "requirements-dev.txt")}
    assert {"torch", "numpy", "pytest", "ruff"} <= names


def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# note\na==1.0\nb>=2\n")
    with pytest.raises(LightningDiTError, match=r"r.txt:3: 'b>=2' is no pin"):
        install.read_pins(tmp_path / "r.txt")
    with pytest.raises(LightningDiTError, match=r"r.txt pins no torch"):
        install.pinned([Pin("a", "1.0")], "torch", tmp_path / "r.txt")


@pytest.mark.parametrize(
    "version",
    [
        *["2.14.1", "2.14.1+cu126", "2.14.0", "0.29.1", "0.2.9", "1.26.4", "1.26", "1.26.4.post1", "2.0.0", "2", "0"],
        *["2.2.0rc1", "2.2.dev3", "2.2.0a0+git1a2b", "2.2", "2.15.0rc1", "2.15.0.post1", "2.9.1", "10.4.0", "0.24.0"],
    ],
)
@pytest.mark.parametrize("wanted", ["2.14.1", "0.29.*", "0.2.*", "<2", ">=2.2.0,<2.15", ">=1.26.4,<2", ">=0,<0.3"])
def test_versions_are_compared_as_pip_does(version: str, wanted: str) -> None:
    specifier = SpecifierSet(wanted if wanted.startswith(("<", ">")) else f"=={wanted}")
    assert install.satisfies(version, wanted) == specifier.contains(version, prereleases=True)


def test_a_text_that_is_no_version_is_in_no_range() -> None:
    assert not any(install.satisfies("unknown", wanted) for wanted in ("<2", ">=0,<2", "2"))


PINS = [Pin("torch", "2.14.1"), Pin("torchvision", "0.29.1"), Pin("numpy", "2.4.6")]
NEWEST = ("2.14.1", "0.29.1", "")


@pytest.mark.parametrize(
    ("decision", "installed", "requirements", "constraints"),
    [
        # nothing there
        (
            (INSTALL, *NEWEST),
            {},
            ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"],
            ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"],
        ),
        # all as pinned, torch as a local build
        (
            (KEEP, *NEWEST),
            {"torch": "2.14.1+cpu", "torchvision": "0.29.1", "numpy": "2.4.6"},
            [],
            ["torch==2.14.1+cpu", "torchvision==0.29.1", "numpy==2.4.6"],
        ),
        # another torch that works is kept, and asks for the torchvision of its release
        (
            (KEEP, "2.9.0", "0.24.*", ""),
            {"torch": "2.9.0+cu126", "numpy": "2.4.6"},
            ["torchvision==0.24.*"],
            ["torch==2.9.0+cu126", "torchvision==0.24.*", "numpy==2.4.6"],
        ),
        # the official one wants numpy 1
        (
            (KEEP, "2.2.0", "0.17.*", "<2"),
            {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "2.4.6"},
            ["numpy<2"],
            ["torch==2.2.0", "torchvision==0.17.0", "numpy<2"],
        ),
        (
            (KEEP, "2.2.0", "0.17.*", "<2"),
            {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "1.26.4"},
            [],
            ["torch==2.2.0", "torchvision==0.17.0", "numpy==1.26.4"],
        ),
        # a device that the stock torch does not serve
        (
            (REPLACE, "2.7.1", "0.22.1", ""),
            {"torch": "2.10.0", "torchvision": "0.25.0", "numpy": "2.4.6"},
            ["torch==2.7.1", "torchvision==0.22.1"],
            ["torch==2.7.1", "torchvision==0.22.1", "numpy==2.4.6"],
        ),
        # the right version, built for the processor alone
        (
            (REPLACE, *NEWEST),
            {"torch": "2.14.1+cpu", "torchvision": "0.29.1+cpu", "numpy": "2.4.6"},
            ["torch==2.14.1", "torchvision==0.29.1"],
            ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"],
        ),
    ],
)
def test_what_is_installed_what_is_kept_and_what_is_held(
    monkeypatch: pytest.MonkeyPatch,
    decision: tuple[str, str, str, str],
    installed: dict[str, str],
    requirements: list[str],
    constraints: list[str],
) -> None:
    monkeypatch.setattr(install, "installed_version", installed.get)
    rows = install.make_rows(PINS, Decision(*decision, reason="why"), {})
    assert [row.requirement for row in rows if not row.met] == requirements
    assert install.constraint_text(rows).splitlines()[1:] == constraints


RANGES = {"torch": ">=2.2.0,<2.15", "torchvision": ">=0.17.0,<0.30", "numpy": ">=1.26.4,<2.5"}
OLD = ("2.2.0", "0.17.*", "<2")
LATER = ("2.16.0", "0.31.*", "")


@pytest.mark.parametrize(
    ("decision", "installed", "requirements", "states"),
    [
        # inside, of one release
        ((KEEP, *NEWEST), ("2.14.0", "0.29.0", "2.0.2"), [], ["right", "right", "right"]),
        # inside, but the torchvision belongs to another torch
        (
            (KEEP, *NEWEST),
            ("2.14.1", "0.25.0", "1.26.4"),
            ["torchvision==0.29.1"],
            ["right", "torchvision==0.29.1 is wanted", "right"],
        ),
        # torch 2.2 beside numpy 2, and beside one that is too old
        (
            (KEEP, *OLD),
            ("2.2.0", "0.17.0", "2.0.2"),
            ["numpy>=1.26.4,<2"],
            [
                *["right on this machine (2.14.1 is pinned)", "right on this machine (0.29.1 is pinned)"],
                "not usable: torch 2.2.0 works with numpy<2 alone",
            ],
        ),
        (
            (KEEP, *OLD),
            ("2.2.0", "0.17.0", "1.25.0"),
            ["numpy>=1.26.4,<2"],
            [
                *["right on this machine (2.14.1 is pinned)", "right on this machine (0.29.1 is pinned)"],
                "outside the tested range >=1.26.4,<2.5",
            ],
        ),
        # newer than the pins: torch stays, because it works
        (
            (KEEP, *LATER),
            ("2.16.0", "0.31.0", "2.6.0"),
            ["numpy==2.4.6"],
            [
                "outside the tested range >=2.2.0,<2.15, stays: it works on this machine",
                "outside the tested range >=0.17.0,<0.30, stays: it works on this machine",
                "outside the tested range >=1.26.4,<2.5",
            ],
        ),
        # inside, but without kernels for this machine
        (
            (REPLACE, *NEWEST),
            ("2.7.1", "0.22.1", "2.4.6"),
            ["torch==2.14.1", "torchvision==0.29.1"],
            ["not usable: why", "torchvision==0.29.1 is wanted", "right"],
        ),
    ],
)
def test_any_tested_version_will_do_that_goes_with_this_torch(
    monkeypatch: pytest.MonkeyPatch,
    decision: tuple[str, str, str, str],
    installed: tuple[str, str, str],
    requirements: list[str],
    states: list[str],
) -> None:
    there = dict(zip(RANGES, installed, strict=True))
    monkeypatch.setattr(install, "installed_version", there.get)
    monkeypatch.setattr(conflicts, "who_needs", lambda *question: "")
    rows = install.make_rows(PINS, Decision(*decision, reason="why"), {}, RANGES)
    assert ([row.requirement for row in rows if not row.met], [row.state for row in rows]) == (requirements, states)


def test_damaged_metadata_of_any_package_do_not_end_step_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that imports stays usable, but nothing is held at a version that nobody knows."""
    (tmp_path / "another-1.0.dist-info").mkdir()
    (tmp_path / "another-1.0.dist-info" / "METADATA").write_bytes("Name: another\nAuthor: André\n".encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(install, "installed_version", lambda name: UNKNOWN)
    for row in install.make_rows(PINS, Decision(KEEP, *NEWEST, reason=""), {}, RANGES):
        assert (row.works, row.met, row.constraint) == (True, False, row.requirement)


def test_what_does_not_import_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_version", {"numpy": "2.4.6"}.get)
    (row,) = install.make_rows(PINS[2:], Decision(KEEP, *NEWEST, reason=""), {"numpy": "half a file"})
    assert (row.met, row.state) == (False, "not usable: half a file")


def test_an_interpreter_of_the_system_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    install.refuse_unfit_process([])
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    with pytest.raises(LightningDiTError, match=r"fix: .*-m venv .venv && .venv/bin/python step1"):
        install.refuse_unfit_process([])


def test_an_imported_torch_is_never_replaced_under_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Row("torch", "2.14.1", "2.7.1", "2.14.1")
    right = Row("torch", "2.14.1", "2.14.1", "2.14.1")
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1")
    monkeypatch.setitem(sys.modules, "torch", sys)
    install.refuse_unfit_process([right])
    with pytest.raises(
        LightningDiTError, match=rf"torch is imported in this process.*; fix: restart .* !{PYTHON} step1"
    ):
        install.refuse_unfit_process([wrong])
    monkeypatch.delitem(sys.modules, "torch")
    install.refuse_unfit_process([wrong])


TORCH, OTHER = Row("torch", "2", "2", None), Row("tqdm", "4", "4", None)


@pytest.mark.parametrize(
    ("row", "free", "enough"),
    [(TORCH, 9_100_000_000, True), (TORCH, 8_900_000_000, False), (OTHER, 1_100_000_000, True), (OTHER, 9e8, False)],
)
def test_the_disk_holds_what_is_really_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: Row, free: float, enough: bool
) -> None:
    """Packages and temporary files on one disk: both count."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(install, "free_bytes", lambda folder: int(free))
    if enough:
        install.require_disk([row], Source())
    else:
        with pytest.raises(InstallError, match=r"packages need up to .* at .* are free; fix: free space"):
            install.require_disk([row], Source())


def test_local_wheels_take_what_they_unpack_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_wheel(tmp_path, "torch", "2.0", "x" * 100)
    size = next(tmp_path.glob("*.whl")).stat().st_size
    source = Source((tmp_path,), index=False)
    monkeypatch.setattr(install, "free_bytes", lambda folder: 3 * size)
    install.require_disk([TORCH], source)
    monkeypatch.setattr(install, "free_bytes", lambda folder: 3 * size - 1)
    with pytest.raises(InstallError):
        install.require_disk([TORCH], source)
