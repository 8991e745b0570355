"""Imports run one way: entry points -> pipeline -> {models, tokenizer, transport, data} -> {checkpoint, images}."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import PACKAGE, PROJECT

PARTS = ("models", "tokenizer", "transport", "data")
#: What each layer may import of the library, besides itself.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "seeds": set(),
    "console": {"errors"},
    "cli": {"config", "errors"},
    "labels": {"config", "errors"},
    "locks": {"errors"},
    "differences": set(),
    "curves": {"errors"},
    "checkpoint": {"errors"},
    "device": {"errors"},
    "finite": set(),
    "images": {"checkpoint", "errors"},
    "npz": {"checkpoint", "errors", "images"},
    "batches": {"device", "errors"},
    "compiled": {"device"},
    "calibrated": {"checkpoint", "config", "errors"},
    "processes": {"errors"},
    "training": {"checkpoint", "device", "differences", "errors", "locks", "processes", "seeds"},
    "fine_tuning": {"checkpoint", "errors", "models"},
    "training_memory": {"checkpoint", "device", "models"},
    "latent_batches": {"config", "data", "errors", "loading", "seeds", "tokenizer", "training", "transport"},
    "models": set(),
    "transport": set(),
    "tokenizer": {"checkpoint", "config", "device", "errors", "images"},
    "data": {"checkpoint", "errors", "images"},
    "procedure": {"calibrated", "config", "errors", "transport"},
    "loading": {
        "calibrated",
        "checkpoint",
        "compiled",
        "config",
        "errors",
        "models",
        "procedure",
        "tokenizer",
        "transport",
    },
    "pipeline": {
        "batches",
        "calibrated",
        "checkpoint",
        "config",
        "device",
        "errors",
        "finite",
        "images",
        "labels",
        "loading",
        "models",
        "procedure",
        "seeds",
        "tokenizer",
        "transport",
    },
}
TORCH_FREE = ["step1_install_environment.py", "step2_download_models.py", "quickstart.py", "setup_steps"]


def library_imports(path: Path, package: str) -> set[str]:
    """Return the first names below `package` that a file imports, at any depth of the code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1:
                found.add(parts[1])
    return found


def files_of(layer: str) -> list[Path]:
    file = PACKAGE / f"{layer}.py"
    return [file] if file.exists() else sorted((PACKAGE / layer).glob("*.py"))


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    files = files_of(layer)
    assert files
    for path in files:
        beyond = library_imports(path, "LightningDiT") - ALLOWED[layer] - {layer}
        assert not beyond, f"{path.name} imports {beyond}"


def test_every_module_of_the_library_has_a_place_in_the_order() -> None:
    entry_points = {
        "inference",
        "train",
        "train_tokenizer",
        "extract_features",
        "extraction",
        "runs",
        "preview",
        "demo",
        "tools",
    }
    entry_points |= {"watching"}
    entry_points |= {"evaluate", "evaluate_tokenizer", "metrics"}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | folders == set(ALLOWED) | entry_points


def test_the_parts_never_import_one_another() -> None:
    for part in PARTS:
        for path in files_of(part):
            assert not library_imports(path, "LightningDiT") & (set(PARTS) - {part}), path


def test_tools_are_used_by_tools_alone() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "tools":
            assert "tools" not in library_imports(path, "LightningDiT"), path


def test_the_library_needs_nothing_of_the_set_up() -> None:
    """Installed as a package it stands alone: neither setup_steps nor a step lies beside it."""
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in all_imports(path) if name == "setup_steps" or name.startswith("step")}, path


def all_imports(path: Path) -> set[str]:
    """Return the first names of what a file imports, at any depth of the code."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in names}


def top_level_imports(path: Path) -> set[str]:
    """Return the modules that importing a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("name", TORCH_FREE)
def test_set_up_needs_nothing_that_it_installs(name: str) -> None:
    place = PROJECT / name
    for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
        assert not top_level_imports(path) & {
            "torch",
            "LightningDiT",
            "numpy",
            "omegaconf",
            "huggingface_hub",
        }, path


def test_cuda_is_named_in_one_module_of_the_library() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "device.py":
            assert "cuda" not in path.read_text(encoding="utf-8").lower(), path
