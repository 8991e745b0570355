"""Every command that documents, docstrings and messages name exists and explains itself."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from LightningDiT import extract_features, inference, train
from LightningDiT.checkpoint import load_weights
from LightningDiT.console import STOPPED, run_main
from LightningDiT.data.labels import CLASS_NAMES, LATENTS_MANIFEST
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from setup_steps import project
from tests.conftest import PROJECT, TINY_CONFIG

COMMAND = re.compile(r"python -m ((?:LightningDiT|studies)(?:\.[a-z_]+)+)(?!\.?\w)")
DOCUMENTS = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "models").glob("*/*.md")]
SOURCES = [
    path for folder in ("LightningDiT", "setup_steps", "studies") for path in (PROJECT / folder).rglob("*.py")
] + list(PROJECT.glob("*.py"))


def named_in(files: list[Path]) -> set[str]:
    return {name for path in files for name in COMMAND.findall(path.read_text(encoding="utf-8"))}


def test_documents_name_commands() -> None:
    found = named_in(DOCUMENTS)
    assert len(found) >= 20
    assert {"LightningDiT.inference", "LightningDiT.tools.benchmark", "studies.solver_study"} <= found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(named_in(DOCUMENTS + SOURCES)))
def test_a_named_command_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert stopped.value.code in (0, None)
    assert f"usage: python -m {name}" in capsys.readouterr().out


#: Modules that other programs of the project start in a process of their own, and whose answer these read.
ANSWERS = {"setup_steps/machine.py", "LightningDiT/tools/benchmark/demo.py"}
PROGRAMS = [
    path
    for path in SOURCES
    if any(
        isinstance(node, ast.Compare) and "__main__" in ast.dump(node)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )
    and path.relative_to(PROJECT).as_posix() not in ANSWERS
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_every_entry_point_ends_by_the_one_handler(path: Path) -> None:
    """The last statement of a program is `sys.exit(run_main(main))`; the steps' `run` ends in `run_main` too."""
    last = ast.unparse(ast.parse(path.read_text("utf-8")).body[-1])
    assert re.search(r"sys\.exit\(run_main\(main\)\)|project\.run\(main\)", last), last


#: Starts a program in which Ctrl-C comes with the first import of a package.
STOPPED_AT_IMPORT = """
import runpy, sys

class Stop:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in packages:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop)
path, packages = sys.argv[1], sys.argv[2].split(", ")
sys.argv[1:] = ["--help"]
if path.endswith(".py"):
    runpy.run_path(path, run_name="__main__")
else:
    runpy.run_module(path, run_name="__main__", alter_sys=True)
"""
FOR_USERS = [
    name
    for name in (path.relative_to(PROJECT).with_suffix("").as_posix().replace("/", ".") for path in PROGRAMS)
    if not name.startswith(("studies.", "LightningDiT.tools.benchmark"))
]


@pytest.mark.parametrize("name", FOR_USERS)
def test_ctrl_c_while_a_program_imports_is_one_line(name: str) -> None:
    """At once, or not at all where the program shows its help without those imports."""
    start = name if name.startswith("LightningDiT.") else f"{name}.py"
    packages = "setup_steps" if name == "step2_download_models" else "numpy, torch"
    command = [sys.executable, "-c", STOPPED_AT_IMPORT, start, packages]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        assert done.stdout.startswith("usage: ") and not done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{STOPPED}\n")


def not_unicode(name: bytes) -> str:
    try:
        return os.fsdecode(name)
    except UnicodeDecodeError:
        pytest.skip("file names are Unicode here")


@pytest.fixture
def odd_classes(tiny_folder: Path) -> Path:
    """The small pipeline with the class names of folders one of which is no UTF-8."""
    names = ["ant", not_unicode(b"b\xe9e"), "cat"]
    (tiny_folder / LATENTS_MANIFEST).write_text(json.dumps({CLASS_NAMES: names}))
    (tiny_folder / "config.yaml").write_text(re.sub(r", class_names: \[.*?\]", "", TINY_CONFIG))
    return tiny_folder


@pytest.mark.parametrize("output", [b"plain", b"od\xe9"])
def test_names_that_are_no_unicode_are_sampled_and_reported(
    odd_classes: Path, output: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import step4_demo_inference

    folder = odd_classes / not_unicode(output)
    options = ["--config", str(odd_classes / "config.yaml"), "--output", str(folder / "images")]
    assert run_main(lambda: inference.main([*options, "--count", "3", "--by-class", "--npz", "--classes", "1"])) == 0
    assert len(list((folder / "images").glob("*/*.png"))) == 3
    monkeypatch.setattr(project, "CONFIG", odd_classes / "config.yaml")
    monkeypatch.setattr("LightningDiT.sampling.options.DEMO_CLASSES", (0, 1, 2), raising=False)
    assert run_main(lambda: step4_demo_inference.main(["--output", str(folder / "demo")])) == 0
    assert r"b\udce9e" in (folder / "demo" / "report.html").read_text("utf-8")
    assert "error" not in capsys.readouterr().err


def test_names_that_are_no_unicode_are_trained(odd_classes: Path) -> None:
    (odd_classes / "latents").mkdir()
    for name in ("latents_stats.pt", LATENTS_MANIFEST):
        (odd_classes / name).rename(odd_classes / "latents" / name)
    write_shard(shard_path(odd_classes / "latents", 0, 0), torch.randn(8, 4, 8, 8), torch.arange(8) % 3)
    config = odd_classes / "config.yaml"
    text = config.read_text().replace("data_path: .", "data_path: latents")
    config.write_text(text + "train: {max_steps: 1, global_batch_size: 2}\n")
    options = ["--config", str(config), "--output"]
    assert run_main(lambda: train.main([*options, str(odd_classes / "run")])) == 0
    assert load_weights(odd_classes / "run" / "transformer.safetensors")


def test_folders_whose_tensors_could_not_be_read_are_refused_at_the_start(odd_classes: Path) -> None:
    """By name, and not as damaged files that are to be deleted."""
    folder = odd_classes / not_unicode(b"od\xe9")
    options = ["--config", str(odd_classes / "config.yaml"), "--output", str(folder)]
    with pytest.raises(LightningDiTError, match=r"od\\udce9 is no UTF-8, which files of tensors need; fix: rename"):
        train.main(options)
    with pytest.raises(LightningDiTError, match=r"od\\udce9 is no UTF-8, which files of tensors need; fix: rename"):
        extract_features.main([*options, "--data-root", str(odd_classes), "--dry-run"])
    assert not folder.exists()
    folder.mkdir()
    (odd_classes / "transformer.safetensors").rename(folder / "transformer.safetensors")
    with pytest.raises(LightningDiTError, match="is no UTF-8, which files of tensors need; fix: rename"):
        load_weights(folder / "transformer.safetensors")
