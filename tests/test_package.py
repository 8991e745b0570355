"""The package: built, checked, installed into a fresh environment, and used there in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

import LightningDiT
from LightningDiT.errors import LightningDiTError
from LightningDiT.hub import bundled
from setup_steps.project import venv_python
from setup_steps.weights import BUNDLED_FILES
from tests.conftest import BUNDLED, PACKAGE, PROJECT
from tests.project_copy import copy_project
from tests.workers import shared_folder

PAGE = PROJECT / "docs" / "package.md"
#: Modules of the extras, which the installed package does not require.
EXTRAS = ["accelerate", "matplotlib", "tensorboard", "torch_fidelity", "scipy", "peft", "diffusers", "gradio"]


def run(*command: object, cwd: Path) -> str:
    """Run a command that must succeed, and return what it says."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of a clean copy, and the wheel that is built from it without a network."""
    pytest.importorskip("build", reason="python -m pip install -r requirements-dev.txt")
    with shared_folder(request, tmp_path_factory, "built") as folder:
        if not (folder / "dist").exists():
            copy = copy_project(folder / "project", "models/fashion-mnist", "README.md", "LICENSE")
            run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "made", copy, cwd=folder)
            (folder / "made").rename(folder / "dist")
    return folder / "dist"


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, built: Path) -> Path:
    """The interpreter of a fresh environment into which pip installed the wheel; for all else it has our packages.

    pip has no index to ask, so it fails if one of these were outside the ranges that the package requires.
    """
    with shared_folder(request, tmp_path_factory, "installed") as folder:
        python = venv_python(folder / "venv")
        if not (folder / "made").exists():
            run(sys.executable, "-m", "venv", "--without-pip", "--clear", folder / "venv", cwd=folder)
            places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
            (next(folder.glob("venv/lib/python*/site-packages")) / "ours.pth").write_text("\n".join(places) + "\n")
            pip = (python, "-m", "pip", "install", "--no-index", "--no-compile", "--disable-pip-version-check")
            run(*pip, next(built.glob("*.whl")), cwd=folder)
            (folder / "made").touch()
    return python


def test_the_wheel_holds_the_library_and_the_bundled_model(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        for name in BUNDLED_FILES:
            assert wheel.read(f"LightningDiT/bundled/fashion-mnist/{name}") == (BUNDLED / name).read_bytes(), name
    assert {name for name in names if not name.startswith("LightningDiT/bundled/")} == {
        path.relative_to(PROJECT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".json", ".yaml") or path.name == "py.typed"
    }


def test_the_source_distribution_holds_what_the_wheel_needs(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.replace("LightningDiT/bundled/", "models/") for name in needed} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not any(name.startswith(("tests", "setup_steps", "LightningDiT/bundled")) for name in names)


def test_twine_finds_nothing(built: Path) -> None:
    pytest.importorskip("twine", reason="python -m pip install -r requirements-dev.txt")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert len(re.findall("PASSED", said)) == 2


def test_the_metadata_names_ranges_extras_and_the_command(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        info = f"lightningdit_runnable-{LightningDiT.__version__}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        commands = wheel.read(f"{info}/entry_points.txt").decode()
    required = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    assert all({one.operator for one in need.specifier} == {">=", "<"} for need in required if not need.extras)
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"train", "eval", "radar", "lora", "diffusers", "demo", "all"}
    assert "lightningdit = LightningDiT.command.main:main" in commands


def test_what_is_not_released_says_so() -> None:
    newest = re.search(r"^## (.*)$", (PROJECT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version = Version(LightningDiT.__version__)
    assert newest is not None
    assert newest[1] == ("Unreleased" if version.is_devrelease else str(version))


def test_three_lines_draw_a_picture_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 3
    lines = block.replace('["Bag"]', '["Bag"], num_inference_steps=4')
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n"  # Python's own mark of absent modules
    run(installed, "-c", hidden + lines, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bag.png"]
    expected = LightningDiT.LightningDiTPipeline.from_pretrained(BUNDLED)(["Bag"], num_inference_steps=4).images[0]
    difference = np.array(Image.open(tmp_path / "bag.png"), int) - np.array(expected, int)
    assert abs(difference).max() <= 1  # other threads, other last bits


def test_the_console_command_samples_and_writes_nothing_into_the_package(installed: Path, tmp_path: Path) -> None:
    package = next(installed.parent.parent.glob("lib/python*/site-packages/LightningDiT"))
    before = {path for path in package.parent.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    command = (installed.with_name("lightningdit"), "sample", "--config", "bundled", "--steps", "3")
    said = run(*command, "--demo", "--classes", "Bag", "8", cwd=tmp_path)
    assert str(package / "bundled" / "fashion-mnist") in said
    assert Image.open(tmp_path / "demo_images" / "demo_samples.png").size[0] > 64
    run(*command, "--num-samples", "1", cwd=tmp_path)
    assert (tmp_path / "output" / "samples" / "000000.png").is_file()
    after = {path for path in package.parent.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    assert after == before


def test_the_bundled_model_is_found_in_a_wheel_and_in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled.bundled_model() == BUNDLED
    inside, beside = tmp_path / "bundled" / "fashion-mnist", tmp_path / "models" / "fashion-mnist"
    monkeypatch.setattr(bundled, "PLACES", (inside, beside))
    with pytest.raises(LightningDiTError, match=f"is neither {inside} nor {beside}; fix: pip install"):
        bundled.bundled_model()
    for folder in (beside, inside):  # the package's own comes first
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        assert bundled.bundled_model() == folder


def test_a_torch_that_cannot_use_this_numpy_is_said_at_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    with pytest.raises(LightningDiTError, match=r"cannot use numpy .* fix: python -m pip install 'numpy>=1.26.4,<2'"):
        from LightningDiT import LightningDiTPipeline  # noqa: F401
