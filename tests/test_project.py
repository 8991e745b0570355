"""The project's own folder: commands as a person types them there, and the interpreter that has the packages."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from setup_steps import project
from setup_steps.downloads import another_endpoint
from setup_steps.project import PROJECT
from tests.project_copy import copy_project, run_script


def test_an_absent_package_is_one_line_with_the_interpreter_that_has_it(tmp_path: Path) -> None:
    """Step 4 by a bare Python: without .venv, with one beside it, and by the one in it."""
    folder = copy_project(tmp_path / "copy")
    bare = tmp_path / "bare"
    for made in (bare, folder / ".venv"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    own = folder / ".venv"
    own.rename(tmp_path / "aside")

    def complaint(environment: Path, *options: str) -> str:
        python = project.venv_python(environment)
        done = run_script(folder / "step4_run_inference.py", *options, python=str(python), cwd=tmp_path, PYTHONPATH="")
        assert done.returncode == 1
        head, _, fix = done.stderr.partition("; fix: ")
        assert re.fullmatch(
            rf"error: package '\w+' is not installed for this Python \({re.escape(str(python))}\)", head
        )
        return fix

    assert complaint(bare) == "python step1_install_environment.py\n"
    (tmp_path / "aside").rename(own)
    python = project.venv_python(Path(".venv"))
    assert complaint(bare, "--seed", "3") == f"{python} step4_run_inference.py --seed 3\n"
    assert complaint(own) == f"{python} step1_install_environment.py\n"
    program = "from setup_steps import machine\nmachine.require_torch('this')\n"
    done = run_script(Path("-c"), program, python=str(project.venv_python(bare)), cwd=folder, PYTHONPATH="")
    assert done.stderr.endswith(f"; fix: {python} step1_install_environment.py\n")


def test_the_interpreter_of_an_environment_on_both_systems() -> None:
    assert str(project.venv_python(PureWindowsPath(".venv"), "nt")) == r".venv\Scripts\python.exe"
    assert str(project.venv_python(PurePosixPath(".venv"), "posix")) == ".venv/bin/python"


def test_set_up_loads_without_torch_and_of_the_library_four_modules_and_a_package() -> None:
    program = (
        "import sys, quickstart, step1_install_environment, step2_download_models\n"
        "from setup_steps import configs, downloads, checks, install, machine, stats_repair\n"
        "found = {name.split('.')[0] for name in sys.modules}\n"
        "print(found & {'torch', 'huggingface_hub', 'numpy', 'yaml', 'tqdm'})\n"
        "print(*sorted(name for name in sys.modules if name.startswith('LightningDiT.')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    loaded = [f"LightningDiT.{name}" for name in ("console", "errors", "files", "hub", "hub.registry")]
    assert done.stdout == f"set()\n{' '.join(loaded)}\n"


LOADED_FIRST = [path.name for path in PROJECT.glob("*.py")] + ["setup_steps/__init__.py"]
LOADED_FIRST += [
    f"LightningDiT/{name}.py" for name in ("__init__", "console", "errors", "files", "hub/__init__", "hub/registry")
]


@pytest.mark.parametrize("name", LOADED_FIRST)
def test_an_old_python_gets_far_enough_to_be_told(name: str) -> None:
    """What loads before the version is checked is in the language of Python 3.7."""
    assert ast.parse((PROJECT / name).read_text(encoding="utf-8"), feature_version=(3, 7)).body


@pytest.mark.parametrize("script", [path.name for path in PROJECT.glob("*.py")])
def test_an_old_python_is_told_in_one_line(script: str) -> None:
    """The version is a stand-in; nothing behind the check may be needed for the message."""
    program = (
        "import sys\nsys.version_info = (3, 7, 16, 'final', 0)\nsys.argv = [sys.argv[1]]\n"
        "sys.modules['setup_steps.project'] = sys.modules['setup_steps.machine'] = None\n"
        "import runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = run_script(Path("-c"), program, script, cwd=PROJECT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: this is Python 3.7.16, 3.10 or newer is needed; "
        "fix: install Python 3.10 or newer and run the same script with it\n"
    )


def test_the_command_is_given_back_with_other_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["step2_download_models.py", "--model", "64ep", "--source=attached", "--attached", "a b", "--verify"]
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{given[0]}", *given[1:]])
    monkeypatch.setattr(project, "interpreter", lambda: "python")
    assert project.again("step1.py") == "python " + shlex.join(given)
    without = project.again("step1.py", "--source", "hub", without=("--source", "--attached", "--verify"))
    assert without == "python step2_download_models.py --model 64ep --source hub"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "-q"])
    assert project.again("step1_install_environment.py", "--dev") == "python step1_install_environment.py --dev"


def test_options_that_a_command_was_given_are_found_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["step2_download_models.py", "--model", "64ep", "--convert", "fp16", "--models-dir=my weights", "--verify"]
    monkeypatch.setattr(sys, "argv", argv)
    assert project.given("--models-dir", "--model") == ["--model", "64ep", "--models-dir", "my weights"]
    assert project.given("--only") == []
    elsewhere = another_endpoint().rpartition("; or fetch the files elsewhere: ")[2]
    assert elsewhere.endswith("step2_download_models.py --model 64ep --models-dir 'my weights' --folder FOLDER")
    monkeypatch.setattr(sys, "argv", argv[:1])
    assert project.given("--model") == []
