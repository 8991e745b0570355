"""A notebook as Kaggle runs it: a real kernel, the real steps, a folder tree of Kaggle's shape."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.project_copy import copy_project

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
from jupyter_client.kernelspec import KernelSpecManager  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402

NOTEBOOK = PROJECT / "kaggle_reproduction.ipynb"
RADAR_NOTEBOOK = PROJECT / "kaggle_micro_doppler.ipynb"
NOWHERE = "http://127.0.0.1:9"  # a closed port: every connection is refused at once
HERE_ALONE = "127.0.0.1,localhost"
SECONDS = 900  # for one cell: beside other work a step takes many times as long
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class Kaggle:
    """Folders as on Kaggle: read-only inputs, the working folder in which the kernel starts, temp."""

    root: Path
    notebook: Path

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
        lines: Mapping[str, object] | None = None,
        again: Sequence[str] = (),
        **settings: str,
    ) -> nbformat.NotebookNode:
        """Run the cells with the hub at this address and no other way out; returns the notebook with its outputs.

        Args:
            before: is called with each cell's id before the cell runs.
            python: of the kernel; by default that of the tests.
            cells: run no more than these first ones.
            lines: values of names that the cell of settings sets, in place of its own; one line each.
            again: cells to run once more at the end, under their own names with `-again`.
            settings: more environment variables.
        """
        book = nbformat.read(self.notebook, as_version=4)
        book.cells = book.cells[:cells]
        for name, value in (lines or {}).items():
            own = cell(book, "settings")
            own.source, count = re.subn(rf"(?m)^{name} = .*$", lambda _, text=f"{name} = {value!r}": text, own.source)
            assert count == 1, name
        book.cells += [nbformat.from_dict(cell(book, name) | {"id": f"{name}-again"}) for name in again]
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


def kaggle_folders(root: Path, notebook: Path) -> Kaggle:
    """Return empty folders of Kaggle's shape below `root`, for this notebook."""
    for name in ("input", "working", "temp"):
        (root / "kaggle" / name).mkdir(parents=True)
    return Kaggle(root / "kaggle", notebook)


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
