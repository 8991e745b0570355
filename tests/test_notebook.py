"""kaggle_reproduction.ipynb as Kaggle runs it: a real kernel, the real steps, a folder tree of Kaggle's shape."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.metrics.judge import load_judge
from setup_steps import weights
from tests.conftest import BUNDLED, PROJECT
from tests.hub_server import Fault, running_hub
from tests.kaggle import (
    NOTEBOOK,
    NOWHERE,
    RADAR_NOTEBOOK,
    SECONDS,
    Kaggle,
    cell,
    everything,
    kaggle_folders,
    nbclient,
    nbformat,
    place_project,
    said,
)
from tests.other_versions import other_pins
from tests.project_copy import copy_project

GRID_SIZE = (5 * (128 + 4) + 4, 2 * (128 + 19 + 4) + 4)  # ten pictures of 32 pixels, enlarged four times, with captions


@pytest.fixture
def kaggle(tmp_path: Path) -> Kaggle:
    return kaggle_folders(tmp_path, NOTEBOOK)


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


@pytest.mark.parametrize(
    ("notebook", "scripts"),
    [(NOTEBOOK, ["step[1-4]_*.py", "fix_*.py"]), (RADAR_NOTEBOOK, ["step1_*.py", "step[5-7]_*.py"])],
    ids=lambda given: given.stem if isinstance(given, Path) else "",
)
def test_the_notebook_is_valid_and_empty_and_names_every_step(notebook: Path, scripts: list[str]) -> None:
    book = nbformat.read(notebook, as_version=4)
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
    names = [sorted(path.name for path in PROJECT.glob(pattern)) for pattern in scripts]
    assert sorted(set(commands)) == sorted(name for some in names for name in some)
    numbered = [name for name in dict.fromkeys(commands) if name.startswith("step")]
    assert [name[:5] for name in numbered] == sorted(name[:5] for name in numbered)


def test_both_notebooks_find_the_project_and_install_in_the_same_way() -> None:
    books = [nbformat.read(notebook, as_version=4) for notebook in (NOTEBOOK, RADAR_NOTEBOOK)]
    for ident in ("project-words", "project", "step1-words", "step1"):
        assert cell(books[0], ident) == cell(books[1], ident)


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
