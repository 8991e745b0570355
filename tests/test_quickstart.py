"""quickstart.py as a person runs it, with small stand-ins for the steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import quickstart
from setup_steps import console, weights
from setup_steps.console import StepError
from tests.hub_server import running_hub
from tests.project_copy import copy_project, run_script

PLAIN_PYTHON = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
STEP = """
import sys
from pathlib import Path
here = Path(__file__).resolve().parent
with open(here / "calls.txt", "a") as log:
    log.write(" ".join([Path(__file__).name, sys.prefix, *sys.argv[1:]]) + "\\n")
if "step4" in __file__:
    picture = here / "LightningDiT" / "demo_images" / "demo_samples.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(b"picture")
sys.exit(CODE)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy whose steps only note that they were called; its path has a space and Chinese."""
    folder = copy_project(tmp_path / "my project 图像")
    for name in (
        "step1_install_environment.py",
        "step2_download_models.py",
        "step3_setup_configs.py",
        "step4_run_inference.py",
    ):
        (folder / name).write_text(STEP.replace("CODE", "0"))
    return folder


def calls(project: Path) -> list[str]:
    """The steps that were called, in turn, with their options."""
    lines = (project / "calls.txt").read_text().splitlines()
    return [line.replace(str(project / ".venv"), "VENV") for line in lines]


def test_from_a_plain_python_to_the_picture_and_again(project: Path) -> None:
    """A half-made .venv is made again, every step runs in it, and the second run makes nothing."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "pyvenv.cfg").write_text("home = /nowhere\n")
    (project / ".venv" / "bin" / "python").symlink_to("python-that-is-gone")
    done = run_script(project / "quickstart.py", python=PLAIN_PYTHON, cwd=Path("/"), KAGGLE_KERNEL_RUN_TYPE="")
    assert done.returncode == 0, done.stderr
    assert "Remaking the half-made" in done.stdout
    assert calls(project) == [
        "step1_install_environment.py VENV",
        "step2_download_models.py VENV --model bundled",
        "step3_setup_configs.py VENV --model bundled",
        "step4_run_inference.py VENV",
    ]
    assert str(project / "LightningDiT/demo_images/demo_samples.png") in done.stdout
    took, more = done.stdout.splitlines()[-2:]
    assert took.startswith("Took ")
    assert more == f"More: {console.venv_python(Path('.venv'))} step4_run_inference.py --help"
    made = (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns

    again = run_script(project / "quickstart.py", python=PLAIN_PYTHON)
    assert again.returncode == 0
    assert "aking" not in again.stdout
    assert (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made
    assert again.stdout.splitlines()[-1] == more
    assert len(calls(project)) == 8


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").write_text("mine")
    with pytest.raises(StepError, match="is no virtual environment"):
        quickstart.ensure_venv(tmp_path / ".venv")
    assert (tmp_path / ".venv" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_stops_at_the_first_step_that_fails(project: Path, failing: int) -> None:
    script = next(project.glob(f"step{failing}_*.py"))
    if failing == 4:
        script = project / "step4_run_inference.py"
    script.write_text(STEP.replace("CODE", "7"))
    done = run_script(project / "quickstart.py", "--model", "64ep")
    assert done.returncode == 7
    assert len(calls(project)) == failing
    assert "Took" not in done.stdout


def test_a_step_that_writes_no_picture_is_a_failure(project: Path) -> None:
    (project / "step4_run_inference.py").write_text("")
    done = run_script(project / "quickstart.py", "--model", "bundled")
    assert done.returncode == 1
    assert "was not written; mend: python step4_run_inference.py" in done.stderr


def test_dry_run_does_nothing(project: Path) -> None:
    for python in (sys.executable, PLAIN_PYTHON):
        done = run_script(project / "quickstart.py", "--dry-run", python=python)
        assert done.returncode == 0
        assert "=== python step4_run_inference.py" in done.stdout
    assert not (project / ".venv").exists()
    assert not (project / "calls.txt").exists()


def test_the_test_command_installs_the_tools_and_ends_at_the_first_failure(project: Path) -> None:
    (project / "pyproject.toml").write_text(
        "[tool.ruff]\ninclude = ['checks/*.py']\n[tool.pytest.ini_options]\ntestpaths = ['checks']\n"
    )
    (project / "checks").mkdir()
    (project / "checks" / "test_one.py").write_text("def test_one() -> None:\n    assert False\n")
    done = run_script(project / "quickstart.py", "--test")
    assert "=== python step1_install_environment.py --dev" in done.stdout
    assert "=== python -m ruff format --check ." in done.stdout
    assert "1 failed" in done.stdout
    assert done.returncode == 1
    (project / "checks" / "test_one.py").write_text("def test_one() -> None:\n    assert True\n")
    passed = run_script(project / "quickstart.py", "--test")
    assert passed.returncode == 0
    assert "All checks passed" in passed.stdout
    if sys.prefix != sys.base_prefix:  # in an environment of the reader's own, `python` is right
        assert passed.stdout.splitlines()[-1] == "More: python step4_run_inference.py --help"
    (project / "checks" / "test_one.py").write_text("import os, sys\n")
    unclean = run_script(project / "quickstart.py", "--test")
    assert unclean.returncode == 1
    assert "-m pytest" not in unclean.stdout


def test_unknown_model_is_a_usage_error(project: Path) -> None:
    done = run_script(project / "quickstart.py", "--model", "huge")
    assert done.returncode == 2
    assert "'huge'" in done.stderr


def test_the_model_follows_from_gpu_files_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setattr(quickstart, "REPORT", report)
    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert quickstart.choose_model()[0] == "bundled"  # no report
    for memory in (0, 2_000_000_000):
        report.write_text(json.dumps({"torch": {"device_memory": memory}}))
        assert quickstart.choose_model()[0] == "bundled"
    report.write_text(json.dumps({"torch": {"device_memory": 16_000_000_000}}))
    assert quickstart.choose_model() == (
        "bundled",
        "a GPU, but neither the published files nor the hub",
    )
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert quickstart.choose_model()[0] == "800ep"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "models").mkdir()
    for file in weights.files_of("64ep"):
        (tmp_path / "models" / file.name).write_bytes(b"x")
    assert quickstart.choose_model()[0] == "64ep"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root")
def test_no_write_permission_is_one_line(project: Path) -> None:
    with pytest.raises(StepError, match=r"cannot write in /proc .*; mend: copy the project to"):
        quickstart.ensure_venv(Path("/proc/.venv"))
    if os.geteuid() == 0:
        return
    project.chmod(0o555)
    try:
        done = run_script(project / "quickstart.py", python=PLAIN_PYTHON)
    finally:
        project.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot write in" in done.stderr
