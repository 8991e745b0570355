"""kaggle_reproduction.ipynb as Kaggle runs it: a real kernel, the real steps, a folder tree of Kaggle's shape."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.metrics.judge import load_judge
from setup_steps import weights
from tests.conftest import BUNDLED, PROJECT
from tests.hub_server import Fault, running_hub
from tests.other_versions import other_pins
from tests.project_copy import copy_project

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
from jupyter_client.kernelspec import KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

NOTEBOOK = PROJECT / "kaggle_reproduction.ipynb"
NOWHERE = "http://127.0.0.1:9"  # a closed port: every connection is refused at once
HERE_ALONE = "127.0.0.1,localhost"
SECONDS = 300  # for one cell
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
GRID_SIZE = (5 * (128 + 4) + 4, 2 * (128 + 19 + 4) + 4)  # ten pictures of 32 pixels, enlarged four times, with captions


@dataclass(frozen=True)
class Kaggle:
    """Folders as on Kaggle: read-only inputs, the working folder in which the kernel starts, temp."""

    root: Path

    @property
    def inputs(self) -> Path:
        return self.root / "input"

    @property
    def working(self) -> Path:
        return self.root / "working"

    def close_inputs(self) -> dict[str, int]:
        """Make the inputs read-only; their files with the time of their last change."""
        paths = [self.inputs, *self.inputs.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        return self.state_of_inputs()

    def state_of_inputs(self) -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in self.inputs.rglob("*")}

    def run(
        self,
        hub: str,
        before: Callable[[str], None] | None = None,
        python: Path | None = None,
        cells: int | None = None,
        **settings: str,
    ) -> nbformat.NotebookNode:
        """Run the cells with the hub at this address and no other way out; returns the notebook with its outputs.

        Args:
            before: is called with each cell's id before the cell runs.
            python: of the kernel; by default that of the tests.
            cells: run no more than these first ones.
            settings: more environment variables.
        """
        book = nbformat.read(NOTEBOOK, as_version=4)
        book.cells = book.cells[:cells]
        client = nbclient.NotebookClient(
            book,
            km=self.kernels(python) if python else None,
            timeout=SECONDS,
            resources={"metadata": {"path": str(self.working)}},
            on_cell_start=lambda cell, cell_index: before(cell["id"]) if before else None,
        )
        mine = ("LIGHTNINGDIT_", "HF_", "COLAB_", "JUPYTER_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
        environment.update(dict.fromkeys(PROXIES, NOWHERE), no_proxy=HERE_ALONE, NO_PROXY=HERE_ALONE)
        environment.update(
            KAGGLE_KERNEL_RUN_TYPE="Interactive",
            LIGHTNINGDIT_ATTACHED=str(self.inputs),
            HF_ENDPOINT=hub,
            HF_HOME=str(self.root / "temp" / "hub"),
            IPYTHONDIR=str(self.root / "temp" / "ipython"),
            PATH=f"{self.false_python()}{os.pathsep}{environment['PATH']}",
            PIP_NO_INDEX="1",
            **settings,
        )
        try:
            client.execute(env=environment)
        except nbclient.exceptions.CellExecutionError:
            book.metadata["stopped"] = True
        return book

    def kernels(self, python: Path) -> AsyncKernelManager:
        """A manager of one kernel, which this interpreter runs."""
        folder = self.root / "temp" / "kernels" / "other"
        folder.mkdir(parents=True)
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "other", "language": "python"}))
        return AsyncKernelManager(
            kernel_name="other", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(folder.parent)])
        )

    def false_python(self) -> Path:
        """A folder whose `python` fails: the notebook must run the steps with its own."""
        folder = self.root / "temp" / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "python").write_text("#!/bin/sh\necho another Python\nexit 99\n")
        (folder / "python").chmod(0o755)
        return folder


@pytest.fixture
def kaggle(tmp_path: Path) -> Kaggle:
    for name in ("input", "working", "temp"):
        (tmp_path / "kaggle" / name).mkdir(parents=True)
    return Kaggle(tmp_path / "kaggle")


def place_project(folder: Path) -> Path:
    """A clone of the project without any output, in `folder`."""
    return copy_project(folder, "models/fashion-mnist")


def cell(book: nbformat.NotebookNode, ident: str) -> nbformat.NotebookNode:
    return next(cell for cell in book.cells if cell.id == ident)


def said(book: nbformat.NotebookNode, ident: str) -> str:
    """What a cell printed, with the error that ended it."""
    texts = []
    for output in cell(book, ident).outputs:
        texts.append(output.text if output.output_type == "stream" else "\n".join(output.get("traceback", [])))
    return "".join(texts)


def everything(book: nbformat.NotebookNode) -> str:
    return "\n".join(said(book, cell.id) for cell in book.cells if cell.cell_type == "code")


def assert_shows_ten_classes(book: nbformat.NotebookNode, ident: str, file: Path) -> None:
    """The cell shows the file: a PNG of the grid's size whose pictures the judge takes for the ten classes."""
    shown = base64.b64decode(cell(book, ident).outputs[0].data["image/png"])
    assert shown == file.read_bytes()
    with Image.open(io.BytesIO(shown)) as image:
        assert (image.format, image.size) == ("PNG", GRID_SIZE)
        pixels = np.asarray(image.convert("L"))
    places = [(4 + row * 151, 4 + column * 132) for row in range(2) for column in range(5)]
    tiles = np.stack([pixels[y : y + 128 : 4, x : x + 128 : 4] for y, x in places])  # (10, 32, 32)
    assert tiles.std(axis=(1, 2)).min() > 20
    images = torch.from_numpy(tiles).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1  # (10, 3, 32, 32)
    seen = load_judge(BUNDLED / "judge.safetensors")(images).argmax(1).tolist()
    assert sum(one == label for label, one in enumerate(seen)) >= 8


def test_offline_with_other_versions_and_the_project_deep_among_read_only_inputs(
    kaggle: Kaggle, other_python: Path
) -> None:
    """Every cell passes without a network by packages that none of the pins names, and statistics that were emptied in
    between are repaired."""
    place_project(kaggle.inputs / "datasets" / "someone" / "light ning" / "1" / "a" / "b" / "my project 图像")
    before = kaggle.close_inputs()
    project = kaggle.working / "lightningdit"
    stats = project / "models" / "fashion-mnist" / "latents_stats.pt"

    def damage(ident: str) -> None:
        if ident == "repair":
            stats.write_bytes(b"")

    book = kaggle.run(NOWHERE, damage, other_python)
    assert "stopped" not in book.metadata, everything(book)
    assert f"Project: {project}" in said(book, "project")
    report = json.loads((project / "environment_report.json").read_text())
    installed = {name: row["installed"] for name, row in report["packages"].items()}
    other = {name: version for name, version in other_pins().items() if name in installed}
    assert len(other) > 6
    assert {name: installed[name] for name in other} == other
    assert kaggle.state_of_inputs() == before
    assert all(path.stat().st_mode & 0o200 for path in [project, *project.rglob("*")])
    assert not (kaggle.working / ".copying").exists()
    assert "sample with 'bundled'" in said(book, "choice")
    assert_shows_ten_classes(book, "picture4a", project / "LightningDiT" / "demo_images" / "demo_samples.png")
    assert_shows_ten_classes(book, "picture4b", project / "LightningDiT" / "demo_output" / "demo_grid.png")
    page = cell(book, "picture4b").outputs[1].data["text/html"]
    assert page == (project / "LightningDiT" / "demo_output" / "report.html").read_text(encoding="utf-8")
    assert "good ones from" in said(book, "repair")
    good, repaired = (torch.load(path, weights_only=True) for path in (BUNDLED / stats.name, stats))
    torch.testing.assert_close(repaired, good)


def test_online_the_files_come_from_the_hub(kaggle: Kaggle, published: dict[str, bytes]) -> None:
    """Three files by the real client, each large one cut in the middle and resumed; the repair from the hub."""
    project = place_project(kaggle.working / "my project 图像")
    models = kaggle.root / "temp" / "weights of mine"
    half = max(map(len, published.values())) // 2 + 1

    def damage(ident: str) -> None:
        if ident == "repair":
            (models / "latents_stats.pt").write_bytes(b"")

    with running_hub() as hub:
        for file in weights.files_of("800ep"):
            hub.put(file.repo, file.name, published[file.role])
        hub.always = Fault(drop_after=half)
        settings = {
            "LIGHTNINGDIT_MODEL": "bundled",
            "LIGHTNINGDIT_DOWNLOAD": "800ep",
            "LIGHTNINGDIT_MODELS": f"~/{models.name}",
            "HOME": str(models.parent),
        }
        book = kaggle.run(hub.endpoint, damage, **settings)
    assert "stopped" not in book.metadata, everything(book)
    resumed = [None, f"bytes={half}-"]
    assert hub.ranges() == [*resumed, None, *resumed, None]  # tokenizer, statistics, transformer; the repair
    for file in weights.files_of("800ep"):
        assert (models / file.name).read_bytes() == published[file.role]
    assert (models / "latents_stats.pt.bad-1").read_bytes() == b""
    assert "it is good" in said(book, "repair")  # the bundled model's, which is in use
    assert_shows_ten_classes(book, "picture4a", project / "LightningDiT" / "demo_images" / "demo_samples.png")
    assert_shows_ten_classes(book, "picture4b", project / "LightningDiT" / "demo_output" / "demo_grid.png")


def test_a_step_that_fails_stops_the_notebook_with_its_line(kaggle: Kaggle) -> None:
    project = place_project(kaggle.working / "project")
    (project / "models" / "fashion-mnist" / "transformer.safetensors").write_bytes(b"")
    book = kaggle.run(NOWHERE, LIGHTNINGDIT_MODEL="bundled")
    assert book.metadata["stopped"]
    step, stop = said(book, "step2").strip().splitlines()[-2:]
    assert re.match(r"error: .* lacks transformer\.safetensors; fix: ", step)
    assert stop.startswith("stopped: exit code 1;")
    assert "Traceback" not in said(book, "step2")
    assert cell(book, "step3").execution_count is None


def test_without_the_project_one_line_says_what_to_attach(kaggle: Kaggle) -> None:
    book = kaggle.run(NOWHERE)
    assert book.metadata["stopped"]
    (line,) = said(book, "project").splitlines()
    assert line.startswith("stopped: no step1_install_environment.py near ")
    assert str(kaggle.inputs) in line
    assert line.endswith("attach the project (Add Input) or clone it here")
    assert list(kaggle.working.iterdir()) == []


def project_cell(book: nbformat.NotebookNode) -> int:
    return 1 + [cell.id for cell in book.cells].index("project")


def test_an_attached_project_that_was_updated_is_named_with_the_way_to_renew_its_copy(kaggle: Kaggle) -> None:
    """Of two attached ones the newer is copied; its copy stays as it is, and a line says that it is older."""
    old, new = (kaggle.inputs / name / "project" for name in ("a", "b"))
    for age, folder in ((1000, old), (0, new)):
        folder.mkdir(parents=True)
        script = folder / "step1_install_environment.py"
        script.write_text(f"print({age})")
        os.utime(script, (1e9 - age, 1e9 - age))
    cells = project_cell(nbformat.read(NOTEBOOK, as_version=4))
    copy = kaggle.working / "lightningdit"
    first = said(kaggle.run(NOWHERE, cells=cells), "project").splitlines()
    assert first == [
        f"note: {new} is newer than {old}, which is not used",
        f"Copied from {new}",
        f"Project: {copy}",
    ]
    (copy / "mine.txt").write_text("an output")
    unchanged = said(kaggle.run(NOWHERE, cells=cells), "project").splitlines()
    assert unchanged == [first[0], first[2]]
    (new / "step1_install_environment.py").write_text("print('an update')")
    older = said(kaggle.run(NOWHERE, cells=cells), "project").splitlines()
    assert older[1:] == [
        f"note: {new} has changed since it was copied to {copy}",
        f"to renew the copy: run `%cd {copy.parent}` and `!mv {copy} {copy}.old`, then this cell again",
        first[2],
    ]
    assert (copy / "step1_install_environment.py").read_text() == "print(0)"
    copy.rename(f"{copy}.old")
    assert said(kaggle.run(NOWHERE, cells=cells), "project").splitlines() == first
    assert (copy / "step1_install_environment.py").read_text() == "print('an update')"
    other = kaggle.working / "my project"
    other.mkdir()
    (other / "step1_install_environment.py").touch()
    assert said(kaggle.run(NOWHERE, cells=cells), "project").splitlines() == [
        f"note: {copy} is used, and {other} is not; to use that one: `%cd {other}`, then this cell again",
        *unchanged,
    ]


def test_a_repository_is_cloned_where_no_project_is(kaggle: Kaggle) -> None:
    origin = kaggle.root / "origin"
    origin.mkdir()
    (origin / "step1_install_environment.py").write_text("print('cloned')")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    cells = project_cell(nbformat.read(NOTEBOOK, as_version=4))
    book = kaggle.run(NOWHERE, cells=cells, LIGHTNINGDIT_REPOSITORY=str(origin))
    assert said(book, "project").splitlines()[-1] == f"Project: {kaggle.working / 'lightningdit'}"
    assert (kaggle.working / "lightningdit" / "step1_install_environment.py").read_text() == "print('cloned')"


def test_the_notebook_is_valid_and_empty_and_names_every_step() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    commands = []
    for position, one in enumerate(book.cells):
        if one.cell_type == "markdown":
            assert len(re.findall(r"[\u4e00-\u9fff]", one.source)) >= 20, one.source
            assert len(re.findall(r"\b[A-Za-z]{2,}\b", one.source)) >= 20, one.source
            continue
        assert (one.outputs, one.execution_count) == ([], None)
        assert book.cells[position - 1].cell_type == "markdown", f"nothing explains the cell {one.id}"
        lines = one.source.splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if line.strip().startswith("!"):
                commands += re.findall(r"^\s*!python (\w+\.py)", line)
                assert following.strip() == "go_on_if_ok()"
    steps = sorted(path.name for path in PROJECT.glob("step[1-4]_*.py"))
    assert sorted(set(commands)) == sorted(["fix_latents_stats.py", *steps])
    assert [name for name in dict.fromkeys(commands) if name.startswith("step")][:3] == steps[:3]


def test_run_in_the_kernel_ends_in_one_line_and_replaces_no_imported_torch(tmp_path: Path) -> None:
    """%run in place of an exclamation mark: the notebook's streams are no files, and torch is imported."""
    project = copy_project(tmp_path / "project")
    (project / "torch.py").write_text("__version__ = '2.9.0'\n")
    (project / "requirements.txt").write_text("torch==0.0.1\ntorchvision==0.0.1\n")
    cells = ["import torch", "%run step1_install_environment.py --profile current", "%run step2_download_models.py"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    book.cells[2].source += " --dry-run"
    client = nbclient.NotebookClient(
        book, timeout=SECONDS, allow_errors=True, resources={"metadata": {"path": str(project)}}
    )
    client.execute(env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1", "IPYTHONDIR": str(tmp_path / "ipython")})
    refused, planned = (cell.outputs for cell in book.cells[1:])
    (line,) = (output.text for output in refused if output.get("name") == "stderr")
    assert re.fullmatch(r"error: torch.* is imported in this process and cannot be replaced .*; fix: .*\n", line)
    assert [output.ename for output in refused if output.output_type == "error"] == ["SystemExit"]
    assert "Decision: torch" in refused[0].text
    assert planned[-1].text.splitlines()[-1] == "Next: python step3_setup_configs.py --model 800ep"
