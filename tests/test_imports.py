"""Imports run one way: steps -> entry points -> sampling, training -> loading -> parts -> ground floor."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import PACKAGE, PROJECT

LIBRARY = PACKAGE.name
#: What each module of the ground floor and each part may import of the library, apart from itself.
GROUND: dict[str, set[str]] = {
    "errors": set(),
    "seeds": {"errors"},
    "console": {"errors"},
    "files": {"console", "errors"},
    "device": {"errors", "files"},
    "compiling": {"device", "errors", "files"},
    "distributed": {"console", "errors"},
    "config": {"errors", "files", "formats"},
    "idle_settings": {"config"},
    "formats": {"errors", "files"},
    "checkpoint": {"errors", "files", "formats"},
    "images": {"errors", "files"},
}
PARTS: dict[str, set[str]] = {
    "models": set(),
    "transport": set(),
    "tokenizer": {"checkpoint", "compiling", "config", "device", "errors", "files", "formats", "images"},
    "data": {"checkpoint", "config", "errors", "files", "images"},
}
BELOW = {*GROUND, *PARTS, "loading"}
ROWS: dict[str, set[str]] = {
    **GROUND,
    **PARTS,
    "loading": {"checkpoint", "config", "errors", "models", "tokenizer", "transport"},
    "metrics": {*GROUND, "data", "radar", "tokenizer"},  # judges of windows
    "radar": {*GROUND, "data"},
    "sampling": {*BELOW, "hub", "radar"},  # levels are shown in a colour map
    "training": {*BELOW, "metrics", "radar", "sampling"},  # a run shows and judges samples of its average
    "verdict": {*BELOW, "metrics", "radar", "sampling"},  # times networks; a report looks as that of a demonstration
    "__init__": {"config", "device", "hub", "sampling"},
    "pipeline": {"sampling"},
    "inference": {*GROUND, "data", "hub", "sampling", "reference"},
    "train": {*GROUND, "training", "reference"},
    "train_tokenizer": {*GROUND, "data", "radar", "tokenizer", "training", "reference"},
    "extract_features": {*GROUND, "data", "radar", "tokenizer", "training", "reference"},
    "evaluate": {*GROUND, "metrics", "reference"},
    "evaluate_tokenizer": {*GROUND, "metrics", "reference"},
    "hub": {*GROUND},
    "reference": {*GROUND, "tokenizer"},  # its YAML has keys too
    "demo": {*BELOW, "hub", "radar", "sampling", "verdict"},  # models of step 6 have the axes of their split
    "command": {*BELOW, "__init__", "demo", "hub", "metrics", "radar", "reference", "sampling", "training"},
    "interop": {*BELOW, "hub", "radar", "sampling"},
    "tools": {
        *BELOW,
        "interop",
        "metrics",
        "radar",
        "reference",
        "sampling",
        "training",
        "verdict",
    },  # the benchmark times the trainer's steps
}
SET_UP_MAY_USE = {f"{LIBRARY}.{name}" for name in ("errors", "console", "files", "hub.registry")}
STEPS = sorted(path.stem for path in PROJECT.glob("*.py"))


def module_name(path: Path, root: Path) -> str:
    """Return the dotted name of a file below `root`; that of a package is its folder's."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, package: str) -> list[str]:
    """Return the dotted names that one statement of a module in `package` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports_of(path: Path, root: Path, at_import: bool = False) -> set[str]:
    """Return the dotted names that a file imports, relative ones resolved.

    Args:
        at_import: leave out what is imported by functions when they run, and by type checkers alone.
    """
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = run_at_import(tree) if at_import else ast.walk(tree)
    return {found for node in nodes for found in imported(node, package)}


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_at_import(node)


def violations(root: Path, rows: Mapping[str, set[str]]) -> list[str]:
    """Return each import of the library below `root` that its row does not allow, as `file: row imports other`."""
    folder, found = root / LIBRARY, []
    for path in sorted(folder.rglob("*.py")):
        row = path.relative_to(folder).with_suffix("").parts[0]
        for name in sorted(imports_of(path, root)):
            top, _, rest = name.partition(".")
            if top == LIBRARY:
                other = rest.partition(".")[0]
                other = other if (folder / f"{other}.py").exists() or (folder / other).is_dir() else "__init__"
                if other not in rows.get(row, set()) | {row}:
                    found.append(f"{path.relative_to(root)}: {row} imports {other}")
    return found


def circle(root: Path) -> list[str]:
    """Return the modules of the library below `root` that import one another in a circle, none where there is none."""
    paths = {module_name(path, root): path for path in (root / LIBRARY).rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        names = imports_of(path, root) if name != LIBRARY else set()  # its names are imported on first use
        graph[name] = {other if other in paths else other.rpartition(".")[0] for other in names}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def spoken_words(tree: ast.AST) -> Iterator[str]:
    """Yield names, attributes, keywords and strings of code; comments and docstrings are none."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            word = getattr(node, field, None)
            if isinstance(word, str):
                yield word


def beyond_set_up(names: Iterable[str]) -> set[str]:
    """Return those of some dotted names that lie in no module which set-up may use."""
    return {name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in SET_UP_MAY_USE)}


def names_cuda(code: str) -> bool:
    return any("cuda" in word.lower() for word in spoken_words(ast.parse(code)))


def write_tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, code in files.items():
        path = root / LIBRARY / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return root


@pytest.mark.parametrize(
    "code",
    [
        "from ..models import x",
        "from .. import models",
        "from ..models.layers import y",
        f"import {LIBRARY}.models.layers",
        f"from {LIBRARY} import models",
        f"def later():\n    from {LIBRARY}.models import x",
        f"if TYPE_CHECKING:\n    from {LIBRARY}.models import x",
    ],
)
def test_an_import_that_leaves_its_row_is_found(code: str, tmp_path: Path) -> None:
    files = {"models/__init__.py": "", "models/layers.py": "", "transport/__init__.py": "", "transport/path.py": code}
    root = write_tree(tmp_path, files)
    assert violations(root, PARTS) == [f"{LIBRARY}/transport/path.py: transport imports models"]
    assert violations(root, {**PARTS, "transport": {"models"}}) == []


def test_imports_within_a_row_and_of_others_are_allowed(tmp_path: Path) -> None:
    files = {
        "__init__.py": "__version__ = '1'",
        "errors.py": "import sys",
        "data/__init__.py": "",
        "data/images.py": "from . import shards\nfrom .shards import read\nfrom ..errors import E\nimport numpy.linalg",
        "data/shards.py": f"from {LIBRARY}.data import images",
    }
    assert violations(write_tree(tmp_path, files), ROWS) == []
    write_tree(tmp_path, {"data/shards.py": f"from {LIBRARY} import __version__"})
    assert violations(tmp_path, ROWS) == [f"{LIBRARY}/data/shards.py: data imports __init__"]


def test_a_circle_is_found_at_any_depth_of_the_code(tmp_path: Path) -> None:
    files = {"__init__.py": "", "a.py": f"import {LIBRARY}.b", "b.py": "def f():\n    from . import c", "c.py": ""}
    assert circle(write_tree(tmp_path, files)) == []
    write_tree(tmp_path, {"c.py": "from .a import x"})
    assert set(circle(tmp_path)) == {f"{LIBRARY}.{name}" for name in "abc"}


def test_what_runs_at_import_is_told_from_what_runs_later(tmp_path: Path) -> None:
    code = (
        "try:\n    import a\nexcept ImportError:\n    import b\nif TYPE_CHECKING:\n    import c\n"
        "class K:\n    import d\n    def f(self):\n        import e\n"
    )
    path = write_tree(tmp_path, {"module.py": code}) / LIBRARY / "module.py"
    assert imports_of(path, tmp_path, at_import=True) == {"a", "b", "d"}
    assert imports_of(path, tmp_path) == {"a", "b", "c", "d", "e"}


def test_cuda_is_looked_for_in_code() -> None:
    for code in ("x.cuda()", "cuda = 1", "f(cuda=1)", "device = 'cuda:0'", "import torch.cuda", "f'{x} on CUDA'"):
        assert names_cuda(code), code
    for code in ("# cuda", '"""On cuda."""', "def f():\n    '''CUDA.'''", "X = 1\n'''Bytes on cuda.'''"):
        assert not names_cuda(code), code


def test_every_module_and_package_of_the_library_has_a_row() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.stem for path in PACKAGE.glob("*.py")} | packages == set(ROWS)


def test_each_row_allows_only_what_lies_below_it() -> None:
    graphlib.TopologicalSorter(ROWS).prepare()  # a circle of rows is an error
    assert all(not allowed & {*PARTS} for allowed in (*GROUND.values(), *PARTS.values()))
    assert all("tools" not in allowed for allowed in ROWS.values())


def test_each_module_imports_only_what_its_row_allows() -> None:
    assert violations(PROJECT, ROWS) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle(PROJECT) == []


def test_the_library_needs_neither_set_up_nor_studies() -> None:
    """Installed as a package it stands alone: neither lies beside it."""
    for path in PACKAGE.rglob("*.py"):
        names = {name.partition(".")[0] for name in imports_of(path, PROJECT)}
        assert not names & {"setup_steps", "studies", "tests", *STEPS}, path


def test_steps_are_used_by_nobody_and_studies_by_studies_alone() -> None:
    for path in [*PROJECT.glob("*.py"), *(PROJECT / "setup_steps").glob("*.py")]:
        names = {name.partition(".")[0] for name in imports_of(path, PROJECT)}
        assert not names & {"studies", "tests", *STEPS}, path


@pytest.mark.parametrize("name", [*STEPS, "setup_steps"])
def test_steps_and_set_up_need_nothing_installed_to_start(name: str) -> None:
    standard = {*sys.stdlib_module_names, "setup_steps"}
    for path in sorted((PROJECT / name).glob("*.py")) or [PROJECT / f"{name}.py"]:
        names = imports_of(path, PROJECT, at_import=True)
        assert not beyond_set_up(name for name in names if name.startswith(f"{LIBRARY}.")), path
        assert {name.partition(".")[0] for name in names} - {LIBRARY} <= standard, path


def test_what_set_up_uses_of_the_library_needs_the_standard_library_alone() -> None:
    packages = {name.rpartition(".")[0] for name in SET_UP_MAY_USE}  # run when a module in them is imported
    assert packages == {LIBRARY, f"{LIBRARY}.hub"}
    for name in (*packages, *SET_UP_MAY_USE):
        place = PROJECT / name.replace(".", "/")
        path = place / "__init__.py" if name in packages else place.with_suffix(".py")
        names = imports_of(path, PROJECT, at_import=True)
        assert not beyond_set_up(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names), path


def test_cuda_is_named_in_one_module() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(PROJECT / "studies").rglob("*.py")]:
        if path != PACKAGE / "device.py":
            assert not names_cuda(path.read_text(encoding="utf-8")), path


def test_an_installed_package_holds_all_of_the_library_and_nothing_else() -> None:
    """`LightningDiT.bundled` is the bundled model, which a clone has in models/."""
    pytest.importorskip("setuptools", minversion="77", reason="older ones take no licence as an SPDX expression")
    pyproject = pytest.importorskip("setuptools.config.pyprojecttoml")
    settings = pyproject.read_configuration(PROJECT / "pyproject.toml")["tool"]["setuptools"]
    packages = {module_name(path, PROJECT) for path in PACKAGE.rglob("__init__.py")}
    assert {*settings["packages"]} == {*packages, f"{LIBRARY}.bundled"}
    assert settings["package-dir"] == {f"{LIBRARY}.bundled": "models"}
