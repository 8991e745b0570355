"""Steps 1 to 3 and what they are made of; installs run in a fresh environment from local wheels."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
import torch
from packaging.requirements import Requirement

import step1_install_environment as step1
import step2_download_models as step2
import step3_setup_configs as step3
from LightningDiT.config import load_config
from LightningDiT.transport import ADAPTIVE_METHODS, FIXED_METHODS
from setup_steps import configs, console, downloads, install, machine, weights
from setup_steps.console import PROJECT, StepError
from setup_steps.fetch import published_table
from setup_steps.install import Pin
from setup_steps.machine import TorchFacts
from tests.hub_server import Fault, Hub, running_hub
from tests.project_copy import copy_project, run_script

CPU_TORCH = TorchFacts(version="2.14.1", works=True)


# The console


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (6_000_000_000, "6.0 GB"), (1e13, "10.0 TB")],
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert console.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert console.format_seconds(seconds) == text


def test_progress_on_a_pipe_is_plain_lines() -> None:
    stream = io.StringIO()
    progress = console.Progress("file", 4000, start=1000, stream=stream, period=0.0)
    progress.began -= 1.0  # one second ago, so that 1000 new bytes are 1 kB/s
    progress.update(2000)
    progress.close()
    assert re.fullmatch(r"  file: 50 %, 2\.0 kB of 4\.0 kB, (1\.0 k|99\d )B/s, 2\.\d s left\n", stream.getvalue())


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("return 0", 0, ""),
        ("raise console.StepError('x is 3, 4 was expected', 'python y.py')", 1, "error: x is 3, 4"),
        ("raise PermissionError(13, 'Permission denied', '/a/b')", 1, "error: /a/b: Permission"),
        ("raise KeyboardInterrupt", 130, ""),
        (
            "from LightningDiT import errors\n    raise errors.LightningDiTError('bad', 'mend')",
            1,
            "error: bad; mend: mend",
        ),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(body: str, code: int, words: str) -> None:
    program = f"from setup_steps import console\ndef main():\n    {body}\nconsole.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == (1 if words else 0)


def test_a_bug_keeps_its_traceback() -> None:
    program = "from setup_steps import console\nconsole.run(lambda: 1 / 0)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    "package", ["LightningDiT.no_such_module", "setup_steps.no_such_module", "lzma.no_such_module"]
)
def test_a_missing_module_of_the_project_or_of_python_is_a_bug(package: str) -> None:
    program = f"from setup_steps import console\ndef main():\n    import {package}\nconsole.run(main)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_an_absent_package_is_one_line_with_the_interpreter_that_has_it(tmp_path: Path) -> None:
    """Step 4 by a bare Python: without .venv, with one beside it, and by the one in it."""
    folder = copy_project(tmp_path / "copy", "LightningDiT")
    bare = tmp_path / "bare"
    for made in (bare, folder / ".venv"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    own = folder / ".venv"
    own.rename(tmp_path / "aside")

    def complaint(environment: Path, *options: str) -> str:
        python = console.venv_python(environment)
        done = run_script(folder / "step4_run_inference.py", *options, python=str(python), cwd=tmp_path, PYTHONPATH="")
        assert done.returncode == 1
        head, _, mend = done.stderr.partition("; mend: ")
        assert re.fullmatch(
            rf"error: package '\w+' is not installed for this Python \({re.escape(str(python))}\)", head
        )
        return mend

    assert complaint(bare) == "python step1_install_environment.py\n"
    (tmp_path / "aside").rename(own)
    python = console.venv_python(Path(".venv"))
    assert complaint(bare, "--seed", "3") == f"{python} step4_run_inference.py --seed 3\n"
    assert complaint(own) == f"{python} step1_install_environment.py\n"
    program = "from setup_steps import machine\nmachine.require_torch('this')\n"
    done = run_script(Path("-c"), program, python=str(console.venv_python(bare)), cwd=folder, PYTHONPATH="")
    assert done.stderr.endswith(f"; mend: {python} step1_install_environment.py\n")


def test_the_interpreter_of_an_environment_on_both_systems() -> None:
    assert str(console.venv_python(PureWindowsPath(".venv"), "nt")) == r".venv\Scripts\python.exe"
    assert str(console.venv_python(PurePosixPath(".venv"), "posix")) == ".venv/bin/python"


def test_steps_1_and_2_load_without_torch_and_the_library() -> None:
    program = (
        "import sys, quickstart, step1_install_environment, step2_download_models\n"
        "from setup_steps import configs, downloads, fetch, install, machine, stats_repair\n"
        "found = {name.split('.')[0] for name in sys.modules}\n"
        "print(found & {'torch', 'LightningDiT', 'huggingface_hub', 'numpy', 'yaml'})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Step 1


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 13)])
def test_pins_are_read_as_pip_reads_them(python: tuple[int, int]) -> None:
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    wanted = set()
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            environment = {"python_version": "{}.{}".format(*python)}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                wanted.add((requirement.name, str(requirement.specifier)))
    pins = install.read_pins(PROJECT / "requirements.txt", python)
    assert {(pin.name, f"=={pin.version}") for pin in pins} == wanted
    assert len(pins) == len(wanted) == len({pin.name for pin in pins})
    assert {"torch", "torchvision", "numpy", "huggingface_hub"} <= {pin.name for pin in pins}


def test_development_pins_include_the_others() -> None:
    names = {pin.name for pin in install.read_pins(PROJECT / "requirements-dev.txt")}
    assert {"torch", "numpy", "pytest", "ruff"} <= names


def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# note\na==1.0\nb>=2\n")
    with pytest.raises(StepError, match=r"r.txt:3: 'b>=2' is no pin"):
        install.read_pins(tmp_path / "r.txt")


PINS = [Pin("torch", "2.14.1"), Pin("torchvision", "0.29.1"), Pin("numpy", "2.4.6")]


@pytest.mark.parametrize(
    ("torch_version", "works", "installed", "requirements"),
    [
        # nothing there
        ("", False, {}, ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"]),
        # all as pinned, torch as a local build
        (
            "2.14.1+cpu",
            True,
            {"torch": "2.14.1+cpu", "torchvision": "0.29.1", "numpy": "2.4.6"},
            [],
        ),
        # another torch that works is kept, and asks for the torchvision of its release
        ("2.9.0+cu126", True, {"torch": "2.9.0", "numpy": "2.4.6"}, ["torchvision==0.24.*"]),
        ("2.9.0", True, {"torch": "2.9.0", "torchvision": "0.24.1", "numpy": "2.4.6"}, []),
        # the official one wants numpy 1
        (
            "2.2.0",
            True,
            {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "2.4.6"},
            ["numpy<2"],
        ),
        ("2.2.0", True, {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "1.26.4"}, []),
        # too old, or broken
        (
            "2.1.0",
            True,
            {"torch": "2.1.0", "torchvision": "0.16.0", "numpy": "2.4.6"},
            ["torch==2.14.1", "torchvision==0.29.1"],
        ),
        (
            "2.9.0",
            False,
            {"torch": "2.9.0", "torchvision": "0.24.1", "numpy": "2.4.6"},
            ["torch==2.14.1", "torchvision==0.29.1"],
        ),
    ],
)
def test_what_is_installed_and_what_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    works: bool,
    installed: dict[str, str],
    requirements: list[str],
) -> None:
    monkeypatch.setattr(install, "installed_version", installed.get)
    rows = install.make_rows(PINS, TorchFacts(torch_version, works), {})
    assert [row.requirement for row in rows if not row.met] == requirements


def test_what_does_not_import_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_version", {"numpy": "2.4.6"}.get)
    (row,) = install.make_rows(PINS[2:], TorchFacts(), {"numpy": "broken"})
    assert not row.met


def test_an_interpreter_of_the_system_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    install.refuse_managed_interpreter()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    with pytest.raises(StepError, match=r"mend: .*-m venv .venv && .venv/bin/python step1"):
        install.refuse_managed_interpreter()
    # So does a dry run, where there is something to install.
    monkeypatch.setattr(install, "read_pins", lambda path: [Pin("no-such-package-here", "1.0")])
    with pytest.raises(StepError, match=r"mend: .*-m venv .venv && .venv/bin/python step1"):
        step1.main(["--dry-run"])


def test_torch_facts_are_true_here() -> None:
    facts = machine.torch_facts()
    assert facts.version == torch.__version__
    assert facts.works
    assert (facts.device_memory > 0) == (facts.device != "cpu")


def test_the_probe_blames_only_what_is_broken(tmp_path: Path) -> None:
    probe = machine.probe(["json", "no_such_module_at_all"], with_torch=False)
    assert probe.faults["json"] == ""
    assert "No module named" in probe.faults["no_such_module_at_all"]
    # `this_kills` ends the probing process: the others are then probed one by one.
    folder = copy_project(tmp_path / "copy")
    (folder / "this_kills.py").write_text("import os\nos._exit(3)\n")
    program = "from setup_steps import machine\nprint(machine.probe(['json', 'this_kills'], with_torch=False).faults)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str({"json": "", "this_kills": "the process ended with code 3"})


def make_wheel(folder: Path, name: str, version: str, body: str) -> None:
    """A wheel of one module, as pip installs it."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", body)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_step1_installs_checks_and_repairs_in_a_fresh_environment(tmp_path: Path) -> None:
    """Absent, outdated and broken packages are put right; a rerun installs nothing."""
    wheels = tmp_path / "wheels"
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "tinyprobe", version, f"version = '{version}'\n")
    folder = copy_project(tmp_path / "copy")
    (folder / "requirements.txt").write_text("tinyprobe==2.0\n")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHONPATH": ""}

    def step(*options: str) -> subprocess.CompletedProcess[str]:
        return run_script(folder / "step1_install_environment.py", *options, python=python, cwd=tmp_path, **env)

    dry = step("--dry-run")
    assert (dry.returncode, "tinyprobe==2.0" in dry.stdout) == (0, True)
    assert not (folder / "environment_report.json").exists()
    assert step("--check-only").returncode == 1

    first = step()
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "Next: python step2_download_models.py"
    report = json.loads((folder / "environment_report.json").read_text())
    assert report["packages"]["tinyprobe"]["installed"] == "2.0"
    assert report["decision"] == "to install: tinyprobe==2.0"

    second = step()
    assert second.returncode == 0
    assert "Nothing to install" in second.stdout
    assert "Successfully installed" not in second.stdout

    module = next((tmp_path / "env").rglob("tinyprobe.py"))
    module.write_text("raise ImportError('half a file')\n")
    assert "does not import: half a file" in step("--check-only").stdout
    assert step().returncode == 0
    assert module.read_text() == "version = '2.0'\n"

    (folder / "requirements.txt").write_text("tinyprobe==3.0\n")
    failed = step()
    assert failed.returncode == 1
    assert "pip ended with code 1 while it installed tinyprobe==3.0" in failed.stderr


# Step 2


def light_checkpoint(path: Path, table: str, key: str) -> bytes:
    """A file with every published name and shape whose tensors share one stored value, so that
    6 GB of names and shapes take some 100 kB.
    """
    shapes = published_table(table)
    content = {key: {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}}
    torch.save(content, path)
    return path.read_bytes()


def good_stats(channels: int = 32) -> dict[str, torch.Tensor]:
    values = torch.arange(1.0, channels + 1).view(1, channels, 1, 1)
    return {"mean": values / 10, "std": values}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Contents of the three files by role, light but whole."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(good_stats(), folder / "stats.pt")
    return {
        "vavae": light_checkpoint(folder / "vavae.pt", "vavae-f16d32", "state_dict"),
        "stats": (folder / "stats.pt").read_bytes(),
        "dit": light_checkpoint(folder / "dit.pt", "LightningDiT-XL/1", "ema"),
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, published: dict[str, bytes]) -> Iterator[Hub]:
    """A hub that holds the 800-epoch model."""
    with running_hub() as running:
        for file in weights.files_of("800ep"):
            running.put(file.repo, file.name, published[file.role])
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(downloads, "PATIENCE", downloads.Patience(backoff=0.01))
        yield running


def fetch_models(folder: Path, *options: str) -> int:
    return step2.main(["--models-dir", str(folder), *options])


def test_step2_fetches_checks_and_then_needs_no_hub(
    hub: Hub,
    tmp_path: Path,
    published: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "models"
    assert fetch_models(folder) == 0
    for file in weights.files_of("800ep"):
        assert (folder / file.name).read_bytes() == published[file.role]
    said = capsys.readouterr().out
    assert "342 tensors named and shaped as published" in said
    assert "351 tensors named and shaped as published" in said
    assert "32 means and standard deviations" in said
    assert said.splitlines()[-1] == "Next: python step3_setup_configs.py --model 800ep"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_models(folder) == 0
    assert capsys.readouterr().out.count("already there and verified") == 3
    assert fetch_models(folder, "--verify") == 0


def test_step2_as_a_person_runs_it(hub: Hub, tmp_path: Path) -> None:
    """A process of its own in another working directory, with the mirror as an option."""
    folder = copy_project(tmp_path / "copy", "LightningDiT")
    done = run_script(
        folder / "step2_download_models.py",
        *("--only", "stats", "--endpoint", hub.endpoint),
        cwd=Path("/"),
        HF_ENDPOINT="",
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "models" / "latents_stats.pt").is_file()
    assert hub.ranges() == [None]


def test_step2_only_takes_one_kind(hub: Hub, tmp_path: Path) -> None:
    assert fetch_models(tmp_path, "--only", "stats") == 0
    assert [path.name for path in tmp_path.glob("*.pt")] == ["latents_stats.pt"]


def test_step2_dry_run_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    assert fetch_models(tmp_path, "--dry-run", "--model", "all") == 0
    assert hub.log == []
    assert list(tmp_path.iterdir()) == []


def test_step2_a_right_hash_of_a_wrong_file_is_an_error(hub: Hub, tmp_path: Path) -> None:
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(3)}}, tmp_path / "other")
    hub.put(weights.VAVAE.repo, weights.VAVAE.name, (tmp_path / "other").read_bytes())
    with pytest.raises(StepError, match=r"lacks encoder\..* and 338 more: it is no vavae-f16d32"):
        fetch_models(tmp_path, "--only", "vavae")
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, tmp_path / "o")
    hub.put(weights.STATS.repo, weights.STATS.name, (tmp_path / "o").read_bytes())
    with pytest.raises(StepError, match=r"placeholder.*; mend: python fix_latents_stats.py"):
        fetch_models(tmp_path, "--only", "stats")


def test_step2_sets_a_file_aside_that_is_not_the_hubs(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "latents_stats.pt").write_bytes(b"")
    assert fetch_models(tmp_path, "--only", "stats") == 0
    assert (tmp_path / "latents_stats.pt.bad-1").read_bytes() == b""
    assert torch.load(tmp_path / "latents_stats.pt", weights_only=True)["std"][0, 31] == 32


def test_step2_verify_finds_a_byte_that_changed(hub: Hub, tmp_path: Path) -> None:
    assert fetch_models(tmp_path, "--only", "dit") == 0
    path = tmp_path / weights.DIT["800ep"].name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(StepError, match="is not the file that the hub has"):
        fetch_models(tmp_path, "--only", "dit", "--verify")
    assert fetch_models(tmp_path, "--only", "dit") == 0
    assert fetch_models(tmp_path, "--only", "dit", "--verify") == 0
    with pytest.raises(StepError, match="is not there"):
        fetch_models(tmp_path / "empty", "--only", "dit", "--verify")


def test_step2_offline_takes_a_file_that_was_put_there_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    torch.save(good_stats(), tmp_path / "latents_stats.pt")
    assert fetch_models(tmp_path, "--only", "stats") == 0
    assert "not compared with the hub (latents_stats.pt: 127.0.0.1:9 cannot" in capsys.readouterr().out


def test_step2_disk_is_checked_before_the_first_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SPARE_BYTES", 10**18)
    with pytest.raises(StepError, match="are needed on the disk of"):
        fetch_models(tmp_path)
    assert hub.ranges() == []


def test_step2_explains_folders_and_files_in_each_others_place(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "latents_stats.pt").mkdir()
    with pytest.raises(StepError, match=r"is a folder, the file latents_stats.pt belongs there"):
        fetch_models(tmp_path, "--only", "stats")
    (tmp_path / "file").touch()
    with pytest.raises(StepError, match="is a file, a folder was expected"):
        fetch_models(tmp_path / "file")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9702856\n"


def link_bundled(folder: Path) -> None:
    """The bundled model's files, the large ones by links; a test may replace one."""
    for name in weights.BUNDLED_FILES:
        source = PROJECT / "models" / "fashion-mnist" / name
        if source.suffix == ".safetensors":
            (folder / name).symlink_to(source)
        else:
            shutil.copy2(source, folder / name)  # the paths in a YAML start at its own folder


def test_step2_bundled_model_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "BUNDLED", tmp_path)
    with pytest.raises(StepError, match=r"lacks config.yaml, .*; mend: git restore"):
        step2.main(["--model", "bundled"])
    link_bundled(tmp_path)
    assert step2.main(["--model", "bundled"]) == 0
    said = capsys.readouterr().out
    size = sum((tmp_path / name).stat().st_size for name in weights.BUNDLED_FILES)
    assert f"({console.format_bytes(size)})" in said
    assert "Nothing to download" in said


@pytest.mark.parametrize("name", weights.BUNDLED_FILES)
@pytest.mark.parametrize("content", [b"", None, b"<!doctype html><p>Not found</p>", LFS_POINTER])
def test_step2_opens_the_bundled_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
) -> None:
    """Each file empty, cut short (None), a web page, or what git leaves where LFS is missing."""
    link_bundled(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    monkeypatch.setattr(weights, "BUNDLED", tmp_path)
    with pytest.raises(StepError, match=rf"{Path(name).stem}\..*; mend: git restore models/fashion-mnist") as caught:
        step2.main(["--model", "bundled"])
    assert "\n" not in str(caught.value)
    assert "Nothing to download" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "huge"],
        ["--only", "everything"],
        ["--model", "bundled", "--only", "dit"],
        ["--timeout", "0"],
        ["--attempts", "0"],
    ],
)
def test_step2_wrong_options_are_usage_errors(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        step2.main(options)
    assert ended.value.code == 2


def test_step2_a_refusal_of_the_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.hub_faults = [Fault(status=401)]
    with pytest.raises(StepError, match="not open to this login") as caught:
        fetch_models(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*.pt")) == []


# Step 3


@pytest.mark.parametrize(
    ("kind", "memory", "batch"),
    [
        ("published", 16_000_000_000, 16),  # (13.6 - 3.5) / 0.5 = 20, at most 16
        ("published", 8_000_000_000, 6),  # (6.8 - 3.5) / 0.5 = 6.6
        ("published", 4_000_000_000, 1),
        ("bundled", 4_000_000_000, 64),
    ],
)
def test_the_batch_follows_the_memory(kind: str, memory: int, batch: int) -> None:
    assert configs.choose_batch(kind, TorchFacts("2", True, "cuda", "GPU", memory)) == batch


@pytest.fixture
def models(tmp_path: Path, published: dict[str, bytes]) -> Path:
    """A folder with the three files of the 800-epoch model; its path has a space."""
    folder = tmp_path / "my models"
    folder.mkdir()
    for file in weights.files_of("800ep"):
        (folder / file.name).write_bytes(published[file.role])
    return folder


def write_config(models: Path, output: Path, *options: str) -> int:
    return step3.main(["--models-dir", str(models), "--output", str(output), "--model", "800ep", *options])


def test_step3_writes_what_the_library_reads(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--print") == 0
    config = load_config(output)
    assert config.ckpt_path == str(models / weights.DIT["800ep"].name)
    assert config.vae.ckpt_path == str(models / weights.VAVAE.name)
    assert config.data.data_path == str(models)
    sample = config.sample
    assert (sample.num_sampling_steps, sample.cfg_scale) == (50, 9.0)
    assert (sample.cfg_interval_start, sample.timestep_shift) == (0.0, 0.0)
    said = capsys.readouterr().out
    assert "cfg_scale: 9.0  # guidance; 1 is off" in said
    assert said.splitlines()[-1] == "Next: python step4_run_inference.py"
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_again_and_after_an_edit(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    first = output.read_text()
    capsys.readouterr()
    write_config(models, output)
    assert f"{output} was right already" in capsys.readouterr().out
    for number, name in ((4.0, "config.yaml.bak"), (5.0, "config.yaml.bak-1")):
        edited = first.replace("cfg_scale: 9.0", f"cfg_scale: {number}")
        output.write_text(edited)
        write_config(models, output)
        said = capsys.readouterr().out
        assert f"sample.cfg_scale: {number} -> 9.0" in said
        assert said.count("->") == 1
        assert (tmp_path / name).read_text() == edited
        assert output.read_text() == first


def test_step3_keeps_the_good_file_when_the_new_one_is_refused(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "config.yaml"
    write_config(models, output)
    before = output.read_text()
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(StepError, match=r"is empty \(0 bytes\); mend: python fix_latents_stats.py"):
        write_config(models, output)
    assert output.read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["config.yaml"]


def test_step3_names_every_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"vavae.*latents_stats.*800ep.*--model 800ep"):
        write_config(tmp_path, tmp_path / "config.yaml")


def test_step3_finds_attached_files_at_any_depth(models: Path, tmp_path: Path) -> None:
    attached = tmp_path / "input" / "some-set" / "v1"
    attached.mkdir(parents=True)
    dit = weights.DIT["800ep"].name
    (models / dit).rename(attached / dit)
    output = tmp_path / "config.yaml"
    assert write_config(models, output, "--attached", str(tmp_path / "input")) == 0
    assert load_config(output).ckpt_path == str(attached / dit)


def test_step3_explains_folders_and_files_in_each_others_place(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "config.yaml"
    stats = models / "latents_stats.pt"
    cases = [
        (["--models-dir", str(stats)], "is a file, the folder that holds the weights"),
        (["--stats", str(models)], f"is a folder, a file was expected; mend: .*{stats.name}"),
        (["--checkpoint", str(tmp_path / "none.pt")], "none.pt is not there"),
        (["--stats", str(models / weights.VAVAE.name)], "is not called latents_stats.pt"),
        (["--output", str(models)], "is a folder, a YAML file was expected"),
    ]
    for options, words in cases:
        with pytest.raises(StepError, match=words):
            write_config(models, output, *options)
    stats.rename(models / "moved.pt")
    stats.mkdir()
    with pytest.raises(StepError, match=r"is a folder, the file latents_stats.pt was expected"):
        write_config(models, output)


def test_step3_dry_run_checks_all_and_writes_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = sorted(tmp_path.rglob("*")), tmp_path / "config.yaml"
    assert write_config(models, output, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"configuration {output}: LightningDiT-XL/1, 1000 classes" in said
    assert f"would write the configuration of the model '800ep' to {output}" in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StepError, match="is a folder, a YAML file was expected"):
        write_config(models, models, "--dry-run")
    (models / "latents_stats.pt").write_bytes(b"")
    with pytest.raises(StepError, match=r"is empty \(0 bytes\); mend: python fix_latents_stats.py"):
        write_config(models, output, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


def test_step3_offers_solvers_that_there_are() -> None:
    offered = configs.COMMENTS["sample.sampling_method"].partition(": ")[2].removesuffix(", ...").split(", ")
    assert offered == ["euler", "heun2", "dopri5"]
    assert set(offered) <= {*FIXED_METHODS, *ADAPTIVE_METHODS}


def test_step3_options_that_do_not_go_together(models: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        step3.main(["--checkpoint", str(models / "x.pt")])
    assert ended.value.code == 2


def test_step3_auto_passes_a_damaged_model_over(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a GPU: one published file is cut short, the other absent, so the bundled model is next."""
    gpu = TorchFacts("2.14.1", True, "cuda", "GPU", 16_000_000_000)
    tried: list[str] = []
    monkeypatch.setattr(machine, "torch_facts", lambda: gpu)
    whole = step3.build

    def build(model: str, *rest: object) -> configs.Config:
        tried.append(model)
        return whole("800ep" if model == "bundled" else model, *rest)

    monkeypatch.setattr(step3, "build", build)
    dit = models / weights.DIT["800ep"].name
    content = dit.read_bytes()
    dit.write_bytes(content[: len(content) // 2])
    with pytest.raises(StepError, match="cut short"):
        step3.main(["--models-dir", str(models), "--output", str(tmp_path / "config.yaml")])
    assert tried == ["800ep", "64ep", "bundled"]
    said = capsys.readouterr().out
    assert "model '800ep' is passed over: " in said
    assert "model '64ep' is passed over: " in said


def test_step3_bundled_settings_with_absolute_paths() -> None:
    assert not weights.missing_bundled()
    config = configs.bundled_config(64)
    for path in (config["ckpt_path"], config["vae"]["ckpt_path"], config["vae"]["model_name"]):
        assert Path(path).is_absolute()
        assert Path(path).is_file()
    assert config["data"]["num_classes"] == 10
    assert "train" not in config


def test_numbers_come_back_from_yaml(tmp_path: Path) -> None:
    import yaml

    values = [1e-06, 9.0, 1e22, 0, True, None, "a: b", "none", [1, "x y"], "微多普勒"]
    text = "".join(f"k{i}: {configs._scalar(value)}\n" for i, value in enumerate(values))
    assert list(yaml.safe_load(text).values()) == values
