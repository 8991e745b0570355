"""quickstart.py as a person runs it, with small stand-ins for the steps."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import quickstart
from LightningDiT.console import INTERRUPTED
from LightningDiT.errors import LightningDiTError
from setup_steps import project as own
from setup_steps import weights
from tests.hub_server import running_hub
from tests.project_copy import copy_project, run_script
from tests.wheels import make_wheel

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
#: A step that puts things in order when it is stopped, as pip does, and takes longer than a parent would wait.
SLOW_STEP = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from setup_steps import project
def main():
    try:
        print("installing", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)
        Path(__file__).with_name("in-order").touch()
        raise
project.run(main)
"""
NOWHERE = "http://127.0.0.1:9"  # a closed port: every connection is refused at once
OFFLINE = {
    **dict.fromkeys(("HF_ENDPOINT", "http_proxy", "https_proxy", "PIP_INDEX_URL"), NOWHERE),
    "PIP_NO_INDEX": "1",
}


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
    index = ("--index-url", "https://mirror.example.org/simple")
    script = project / "quickstart.py"
    done = run_script(script, *index, python=PLAIN_PYTHON, cwd=Path("/"), KAGGLE_KERNEL_RUN_TYPE="")
    assert done.returncode == 0, done.stderr
    assert "Remaking the half-made" in done.stdout
    assert calls(project) == [
        f"step1_install_environment.py VENV {' '.join(index)}",
        "step2_download_models.py VENV --model bundled",
        "step3_setup_configs.py VENV --model bundled",
        "step4_run_inference.py VENV",
    ]
    assert str(project / "LightningDiT/demo_images/demo_samples.png") in done.stdout
    took, more = done.stdout.splitlines()[-2:]
    assert took.startswith("Took ")
    assert more == f"More: {own.venv_python(Path('.venv'))} step4_run_inference.py --help"
    made = (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns

    again = run_script(project / "quickstart.py", python=PLAIN_PYTHON)
    assert again.returncode == 0
    assert "aking" not in again.stdout
    assert (project / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made
    assert again.stdout.splitlines()[-1] == more
    assert len(calls(project)) == 8


def test_a_venv_that_is_a_link_to_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(tmp_path / "gone")
    with pytest.raises(LightningDiTError, match=r"\.venv is a link to .*gone, which is not there; fix: mv "):
        quickstart.ensure_venv(tmp_path / ".venv")


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").write_text("mine")
    with pytest.raises(LightningDiTError, match="is not a virtual environment that this project made"):
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
    assert "was not written; fix: python step4_run_inference.py" in done.stderr


def test_dry_run_does_nothing(project: Path) -> None:
    for python in (sys.executable, PLAIN_PYTHON):
        done = run_script(project / "quickstart.py", "--dry-run", python=python)
        assert done.returncode == 0
        assert "=== python step4_run_inference.py" in done.stdout
    assert not (project / ".venv").exists()
    assert not (project / "calls.txt").exists()


def test_the_test_command_installs_the_tools_and_ends_at_the_first_failure(project: Path) -> None:
    pytest.importorskip("ruff", reason="the stand-in of step 1 installs nothing")
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
    assert "No GPU works here by step 1's report, so python -m pytest --gpu is left out." in passed.stdout
    if sys.prefix != sys.base_prefix:  # in an environment of the reader's own, `python` is right
        assert passed.stdout.splitlines()[-1] == "More: python step4_run_inference.py --help"
    (project / "checks" / "test_one.py").write_text("import os, sys\n")
    unclean = run_script(project / "quickstart.py", "--test")
    assert unclean.returncode == 1
    assert "-m pytest" not in unclean.stdout


def test_the_tests_of_the_gpu_follow_where_one_works(project: Path) -> None:
    """In a second process, since the first hides the GPU."""
    (project / "environment_report.json").write_text('{"torch": {"device_memory": 16000000000}}')
    planned = run_script(project / "quickstart.py", "--test", "--dry-run")
    commands = [line for line in planned.stdout.splitlines() if line.startswith("=== ")]
    assert commands[-2:] == ["=== python -m pytest", "=== python -m pytest --gpu"]


def test_the_package_index_is_that_of_step_1_alone(project: Path) -> None:
    """And without the credentials on the screen."""
    url = "https://me:s3cret@mirror.example.org/simple"
    done = run_script(project / "quickstart.py", "--model=bundled", "--index-url", url)
    assert done.returncode == 0, done.stderr
    first, *others = [line.partition(" ")[2].split(" ")[1:] for line in calls(project)]
    assert first == ["--index-url", url]
    assert [options for options in others if "--index-url" in options] == []
    assert "=== python step1_install_environment.py --index-url https://****@mirror.example.org/simple\n" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    wrong = run_script(project / "quickstart.py", "--index-url", "mirror.example.org/simple")
    assert (wrong.returncode, len(calls(project))) == (2, 4)
    assert "--index-url: 'mirror.example.org/simple' given, https://HOST/..., http://HOST/... or" in wrong.stderr


def test_the_folder_of_the_weights_is_that_of_steps_2_and_3(project: Path, tmp_path: Path) -> None:
    """A relative path starts where the person stands, not in the project's folder."""
    done = run_script(project / "quickstart.py", "--model=64ep", "--models-dir", "weights", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    named = [line.partition(" --models-dir ")[2] for line in calls(project)]
    assert named == ["", str(tmp_path / "weights"), str(tmp_path / "weights"), ""]
    wrong = run_script(project / "quickstart.py", "--endpoint", "mirror.example")
    assert (wrong.returncode, len(calls(project))) == (1, 4)
    assert "quickstart.py --endpoint https://mirror.example, or unset HF_ENDPOINT" in wrong.stderr


def test_unknown_model_is_a_usage_error(project: Path) -> None:
    done = run_script(project / "quickstart.py", "--model", "huge")
    assert done.returncode == 2
    assert "'huge'" in done.stderr


def test_the_model_follows_from_gpu_files_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.json"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**12))  # a roomy disk
    monkeypatch.setattr(own, "REPORT", report)
    monkeypatch.setattr(weights, "MODELS", tmp_path / "models")
    for name in ("KAGGLE_KERNEL_RUN_TYPE", weights.ATTACHED_VARIABLE):
        monkeypatch.delenv(name, raising=False)
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


def test_a_rerun_needs_no_room_for_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that fills the disk is gone on with; the attached folder is walked through once."""
    (tmp_path / "report.json").write_text(json.dumps({"torch": {"device_memory": 16_000_000_000}}))
    models, attached = tmp_path / "models", tmp_path / "input"
    for folder in (models, attached):
        folder.mkdir()
    monkeypatch.setattr(own, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(weights, "MODELS", models)
    monkeypatch.setenv(weights.ATTACHED_VARIABLE, str(attached))
    walks, walk = [], weights.walk
    monkeypatch.setattr(weights, "walk", lambda folder: walks.append(folder) or walk(folder))
    dit = weights.DIT["800ep"]
    needed = dit.approx_bytes + weights.STATS.approx_bytes
    (attached / weights.VAVAE.name).touch()
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for part, free, model in (
            (0, needed, "800ep"),
            (0, needed - 1, "bundled"),
            (1000, needed - 1000, "800ep"),
            (1000, needed - 1001, "bundled"),
        ):
            (models / f"{dit.name}.part").write_bytes(b"x" * part)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            walks.clear()
            assert quickstart.choose_model()[0] == model
            assert walks == [attached]


@pytest.fixture
def venv(made_venv: Path, tmp_path: Path) -> Path:
    """The copy, with a package that somebody installed."""
    folder = tmp_path / "other project 图像" / ".venv"
    shutil.copytree(made_venv, folder, symlinks=True)
    (packages_of(folder) / "thesis.py").write_text("answer = 42\n")
    return folder


def packages_of(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))


def answer(venv: Path) -> str:
    """What the environment's interpreter says of pip and of the package; empty where it lacks one."""
    code = "import pip._vendor.rich, thesis; print(thesis.answer)"
    done = subprocess.run(
        [own.venv_python(venv), "-c", code], capture_output=True, text=True, check=False, cwd=venv.parent
    )
    return done.stdout.strip()


def test_a_venv_that_was_moved_or_copied_is_taken_as_it_is(venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = (venv / "pyvenv.cfg").stat().st_mtime_ns
    quickstart.ensure_venv(venv)
    assert capsys.readouterr().out == ""
    assert (venv / "pyvenv.cfg").stat().st_mtime_ns == made
    assert answer(venv) == "42"


def remove_pip(venv: Path) -> None:
    for part in packages_of(venv).glob("pip*"):
        shutil.rmtree(part)


def remove_python(venv: Path) -> None:
    for link in venv.glob("bin/python*"):
        link.unlink()


def leave_for_a_python_that_is_gone(venv: Path) -> None:
    remove_python(venv)
    (venv / "bin" / "python").symlink_to("/nowhere/python3.9")
    (venv / "lib" / packages_of(venv).parent.name).rename(venv / "lib" / "python3.9")


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "no python": remove_python,
    "of a Python that is gone": leave_for_a_python_that_is_gone,
    "no pyvenv.cfg": lambda venv: (venv / "pyvenv.cfg").unlink(),
    "a module of pip cut short": lambda venv: cut_short(packages_of(venv) / "pip" / "_vendor" / "rich" / "console.py"),
    "pip stopped before its RECORD": lambda venv: next(packages_of(venv).glob("pip-*/RECORD")).unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_half_made_venv_is_made_again(name: str, venv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[name](venv)
    assert not quickstart.examine_venv(venv)[1]
    quickstart.ensure_venv(venv)
    assert capsys.readouterr().out == f"Remaking the half-made {venv}\n"
    assert quickstart.examine_venv(venv) == (sys.version_info[:2], True)
    assert [part.name for part in (venv / "lib").iterdir()] == [f"python{sysconfig.get_python_version()}"]


def test_a_venv_that_lacks_pip_alone_keeps_its_packages(venv: Path) -> None:
    """Stopped in the last moment of its making, or made by a tool that puts no pip there."""
    remove_pip(venv)
    (venv / ".lock").touch()
    quickstart.ensure_venv(venv)
    assert answer(venv) == "42"


def test_a_broken_venv_with_other_things_in_it_is_left_alone(venv: Path) -> None:
    remove_python(venv)
    (venv / "thesis.txt").write_text("mine")
    with pytest.raises(LightningDiTError, match=r"that this project made; fix: mv '.*\.venv' '.*\.venv\.other' && "):
        quickstart.ensure_venv(venv)
    assert (venv / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="the interpreter's stand-in is a shell script")
def test_a_venv_of_a_python_that_is_too_old_is_left_alone(venv: Path) -> None:
    remove_python(venv)
    own.venv_python(venv).write_text("#!/bin/sh\necho 3 8\n")
    own.venv_python(venv).chmod(0o755)
    with pytest.raises(LightningDiTError, match=r"of Python 3\.8, 3\.10 or newer is needed; fix: mv "):
        quickstart.ensure_venv(venv)
    assert (packages_of(venv) / "thesis.py").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C as a signal to a group of processes")
def test_ctrl_c_lets_the_step_put_things_in_order_and_a_rerun_goes_on(project: Path) -> None:
    quick = project / "step1_install_environment.py"
    swift = quick.read_text()
    quick.write_text(SLOW_STEP)
    started = subprocess.Popen(
        [sys.executable, str(project / "quickstart.py"), "--model", "bundled"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert started.stdout is not None
    lines = iter(started.stdout.readline, "")
    assert "installing\n" in lines  # reads on until the step runs
    os.killpg(started.pid, signal.SIGINT)
    rest = started.stdout.read()
    assert started.wait() == INTERRUPTED
    assert (project / "in-order").exists()
    assert rest.count("stopped;") == 1
    assert not (project / "calls.txt").exists()
    quick.write_text(swift)
    assert run_script(project / "quickstart.py", "--model", "bundled").returncode == 0
    assert len(calls(project)) == 4


def test_the_second_run_needs_no_network_and_installs_nothing(tmp_path: Path, made_venv: Path) -> None:
    """The real steps, twice, from a plain Python to the pictures; the first run has one package to install,
    from an attached wheel.
    """
    project = copy_project(tmp_path / "my project 图像", "models/fashion-mnist")
    shutil.copytree(made_venv, project / ".venv", symlinks=True)
    packages = packages_of(project / ".venv")
    places = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (packages / "complete.pth").write_text("\n".join(places) + "\n")
    with (project / "requirements.txt").open("a") as pins:
        pins.write("tinyprobe==1.0\n")
    make_wheel(tmp_path / "input", "tinyprobe", "1.0", "")

    def run(name: str, attached: str) -> str:
        """The log of one run; pip writes each of its runs to the file of this name, too."""
        done = run_script(
            project / "quickstart.py",
            python=PLAIN_PYTHON,
            cwd=Path("/"),
            KAGGLE_KERNEL_RUN_TYPE="",
            LIGHTNINGDIT_ATTACHED=attached,
            PIP_LOG=str(tmp_path / name),
            **OFFLINE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"Working in virtual environment ({project / '.venv'})" in done.stdout
        assert "Model 'bundled' (" in done.stdout
        return done.stdout

    assert "Successfully installed tinyprobe-1.0" in run("first.log", str(tmp_path / "input"))
    assert "tinyprobe==1.0" in (tmp_path / "first.log").read_text(encoding="utf-8")
    before = sorted(path.name for path in packages.iterdir())
    assert "; nothing to install" in run("second.log", "")
    assert not (tmp_path / "second.log").exists()
    assert sorted(path.name for path in packages.iterdir()) == before
    with Image.open(project / "LightningDiT" / "demo_images" / "demo_samples.png") as image:
        assert len(image.convert("L").getcolors(256) or []) > 100


def refuse_root_too() -> None:
    """Take the right to write everywhere from a child that runs as root, so that a mode holds for it, too."""
    drop_from_bounds, override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE of linux/prctl.h and capability.h
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(drop_from_bounds, override, 0, 0, 0):
        raise OSError("this root may not give up its rights")


@pytest.mark.skipif(sys.platform == "win32", reason="modes of a POSIX file system")
@pytest.mark.parametrize("with_venv", [False, True])
def test_no_write_permission_is_one_line(project: Path, made_venv: Path, with_venv: bool) -> None:
    if with_venv:
        shutil.copytree(made_venv, project / ".venv", symlinks=True)
    environment = {key: value for key, value in os.environ.items() if key != "KAGGLE_KERNEL_RUN_TYPE"}
    project.chmod(0o555)
    try:
        done = subprocess.run(
            [PLAIN_PYTHON, str(project / "quickstart.py")],
            env=environment,
            preexec_fn=refuse_root_too if sys.platform == "linux" else None,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        project.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (
        f"{project} cannot be written (Permission denied); fix: choose a folder that you may write to, or copy the"
        in done.stderr
    )
    assert (project / ".venv").exists() == with_venv
    assert not (project / "calls.txt").exists()
