"""Files that are whole or absent: writing, locks and free space."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from LightningDiT import files
from LightningDiT.errors import LightningDiTError
from tests.conftest import PACKAGE, PROJECT, largest_file


def test_a_new_file_takes_its_place_when_all_is_written(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.txt", tmp_path / "a.txt.old"
    path.write_text("before")
    with files.atomic_path(path, aside) as fresh:
        fresh.write_text("after")
        assert path.read_text() == "before"
    assert (path.read_text(), aside.read_text()) == ("after", "before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a.txt.old"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path, tmp_path / "aside") as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"


@pytest.mark.skipif(sys.platform == "win32", reason="modes of a POSIX file system")
def test_the_mode_is_that_of_a_plain_file_and_of_a_linked_one_its_own(tmp_path: Path) -> None:
    plain, path, other = tmp_path / "plain", tmp_path / "a.txt", tmp_path / "other"
    plain.touch()
    files.write_text(path, "图像")
    assert path.read_text(encoding="utf-8") == "图像"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    other.touch(mode=0o400)
    with files.atomic_path(path) as fresh:
        fresh.unlink()
        fresh.symlink_to(other)
    assert (path.readlink(), stat.S_IMODE(other.stat().st_mode)) == (other, 0o400)


KILLED = """
import sys, time
from LightningDiT.files import atomic_path
with atomic_path(sys.argv[1]) as fresh:
    fresh.write_bytes(b"x" * 1000)
    print("written", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """And nothing else: neither what another process writes at the moment, nor files of other names."""
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a[1].npz")]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "written\n"
        for other in (".a[1].npz.x1y2z3w4.tmp", "a.npz"):
            (tmp_path / other).touch()
        before = set(tmp_path.iterdir())
        files.remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == before
        writer.send_signal(signal.SIGKILL)
    with files.held_folder(tmp_path, "run"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a[1].npz.x1y2z3w4.tmp", files.LOCK, "a.npz"]


def test_a_leftover_on_a_disk_without_locks_is_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    young, old = (tmp_path / f".a.{name}{files.UNFINISHED}" for name in ("youngone", "oldoldol"))
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]


def test_what_safetensors_left_is_removed(tmp_path: Path) -> None:
    """At once in a folder that is held, else after an hour without a change; files of others stay."""
    torn = [tmp_path / f".tmp{name}" for name in ("Youngo", "oldold", "empty1")]
    for path, content in zip(torn, (b"\x40" + b"\0" * 7 + b'{"a":', b"\x40" + b"\0" * 7 + b'{"b":', b""), strict=True):
        path.write_bytes(content)
    mine = tmp_path / ".tmpnotes1"
    mine.write_text("a list of things")
    os.utime(torn[1], (0, 0))
    os.utime(mine, (0, 0))
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([torn[0], torn[2], mine])
    with files.held_folder(tmp_path, "run"):
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / files.LOCK, mine])


def make(kind: str, path: Path) -> None:
    """Put something that is no regular file at `path`."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("makes a device")
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        path.symlink_to(path.with_name("precious.txt"))


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of a POSIX file system")
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "socket", "device"])
def test_a_name_that_is_no_file_is_not_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last component of a path is never followed and never replaced; it may get another name if it can have one."""
    monkeypatch.chdir(tmp_path)
    precious, path = tmp_path / "precious.txt", tmp_path / "a"
    precious.write_text("mine")
    make(kind, path)
    assert files.kind_of(path) == kind
    for write in (
        lambda: files.write_text(path, "new"),
        lambda: files.check_target(path),
        lambda: files.open_own(path).close(),
    ):
        with pytest.raises(LightningDiTError, match=rf"a (cannot be written \(it is a {kind}\)|is a folder)"):
            write()
    assert (files.kind_of(path), precious.read_text()) == (kind, "mine")
    if kind in ("link", "folder"):
        assert files.rename_command(path, ".old").startswith("mv ")
        assert files.set_aside(path, "old") == tmp_path / "a.old-1"
        assert files.kind_of(tmp_path / "a.old-1") == kind
    else:
        assert files.rename_command(path, ".old") == f"ls -l {path}"
        with pytest.raises(LightningDiTError, match=f"it is a {kind}"):
            files.set_aside(path, "old")
        assert files.kind_of(path) == kind
    assert precious.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of a POSIX file system")
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_only_files_are_read_and_nothing_is_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, link = tmp_path / "a", tmp_path / "link"
    make(kind, path)
    link.symlink_to(path)
    for read in (files.open_regular, files.require_regular, files.read_json, files.digest, files.fingerprint):
        for name in (path, link):
            with pytest.raises(OSError):
                read(name)
    (tmp_path / "file").write_bytes('{"a": "图"}\r\n'.encode())
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "file")
    assert files.read_json(link) == {"a": "图"}
    assert files.read_text(link).endswith("}\n")


def test_what_is_read_at_once_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    assert files.read_bytes(path, at_most=6) == b"[1, 2]"
    with pytest.raises(OSError, match="larger than 5 B"):
        files.read_bytes(path, at_most=5)
    for text in ("[" * 200_000, "{", '"\ud800'):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError):
            files.read_json(path)


def test_a_file_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("precious")

    def ours(file: Path) -> bool:
        return file.read_text().startswith("{")

    with pytest.raises(
        LightningDiTError,
        match=r"report.json cannot be written \(this program did not write .*; fix: name another file",
    ):
        files.write_text(path, "{1}", ours)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["precious"]
    path.write_text("")
    for text in ("{1}", "{2}"):  # in place of an empty file, and of an own one
        files.write_text(path, text, ours)
    assert path.read_text() == "{2}"


@pytest.mark.skipif(sys.platform == "win32", reason="links of a POSIX file system")
def test_a_file_that_grows_has_one_name(tmp_path: Path) -> None:
    """A log or a part of a download is written where it is: a hard link would carry it to another file."""
    precious, path = tmp_path / "precious.txt", tmp_path / "log.jsonl"
    precious.write_text("mine")
    os.link(precious, path)
    with pytest.raises(LightningDiTError, match="has another name elsewhere.*fix: cp ") as refusal:
        files.open_own(path)
    subprocess.run(refusal.value.fix, shell=True, check=True)
    with files.open_own(path) as log:
        log.write(b" and more")
    assert (precious.read_text(), path.read_text()) == ("mine", "mine and more")


@pytest.mark.skipif(sys.platform == "win32", reason="links of a POSIX file system")
def test_the_lock_of_a_folder_is_no_link(tmp_path: Path) -> None:
    (tmp_path / files.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LightningDiTError, match="it is a link"), files.held_folder(tmp_path, "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


#: Calls that open or write a file by its path; of `replace` those with one argument, which no text has.
OPENERS = {
    *("open", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "rename", "replace"),
    *("symlink_to", "hardlink_to", "link", "symlink", "safe_open", "load_file", "save_file", "ZipFile", "savez"),
    *("memmap", "fromfile", "tofile", "savefig", "copy2", "copyfile", "copytree", "move", "mkstemp"),
    *("NamedTemporaryFile", "TemporaryFile"),
}
#: The same by modules whose `load`, `save` and `open` take a path.
MODULES = {"torch": {"load", "save"}, "np": {"load", "save"}, "OmegaConf": {"load", "save"}, "Image": {"open"}}
#: What a function may do with a path after one of these.
CHECKED = frozenset(("atomic_path", "_saved", "open_regular", "require_regular", "TemporaryDirectory"))
#: Functions that open or write in another way, and why they may.
MAY: dict[str, str] = {
    "LightningDiT/checkpoint.py": "opens what `_existing_file` has found to be a regular file",
    "LightningDiT/console.py _prepare_streams": "the null device in place of a closed stream",
    "LightningDiT/config.py read_yaml": "text that the gate has read",
    "LightningDiT/console.py _give_up_stdout": "the null device in place of a closed stream",
    "LightningDiT/data/labels.py _imagenet_tables": "timm's own tables",
    "LightningDiT/sampling/all_gpus.py share_run": "a file without a name, for the words of another process",
    "LightningDiT/tools/benchmark/": "files of its own temporary folder, and of /proc",
    "LightningDiT/loading.py": "`load_file` of LightningDiT/checkpoint.py",
    "LightningDiT/tokenizer/vavae.py": "`load_file` of LightningDiT/checkpoint.py",
    "LightningDiT/metrics/extractors.py": "writes to memory",
    "setup_steps/checks.py published_table": "a file of the project",
    "setup_steps/checks.py own_checksums": "opens what `present` has found to be a file",
    "setup_steps/convert.py _write": "writes to the path that `atomic_path` gave",
    "setup_steps/convert.py _compare": "opens what `_write` wrote, or `inspect` has opened",
    "setup_steps/downloads.py _open": "an address, which is http or https",
    "setup_steps/downloads.py PartFile": "renames its own open and locked part",
    "setup_steps/plans.py carry_out": "`link` of setup_steps/sources.py",
    "setup_steps/stats_repair.py Repair": "writes to the path that `atomic_path` gave",
}


def passes_by(path: Path) -> Iterator[str]:
    """Yield the calls of a module that open or write a file otherwise than through `LightningDiT.files`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for outer in tree.body:
        functions = [node for node in ast.walk(outer) if isinstance(node, ast.FunctionDef)] or [outer]
        for function in functions:
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            names = {called(call)[1] for call in calls}
            if names & CHECKED:
                continue
            for call in calls:
                owner, name = called(call)
                if name in ("read_text", "read_bytes", "write_text") and not owner:  # those of the gate
                    continue
                if name == "replace" and (len(call.args) != 1 or owner == "dataclasses" or not owner):
                    continue
                if (name in OPENERS) or name in MODULES.get(owner, ()):
                    where = path.relative_to(PROJECT).as_posix()
                    scope = outer.name if isinstance(outer, ast.FunctionDef | ast.ClassDef) else "module"
                    yield f"{where} {scope}: {ast.unparse(call.func)}"


def called(call: ast.Call) -> tuple[str, str]:
    """Return owner and name of the function called."""
    if isinstance(call.func, ast.Attribute):
        return ast.unparse(call.func.value), call.func.attr
    return "", call.func.id if isinstance(call.func, ast.Name) else ""


def test_no_module_passes_the_gate_by() -> None:
    """Every other way to open or write a file has its row and its reason."""
    modules = [*PACKAGE.rglob("*.py"), *(PROJECT / "setup_steps").glob("*.py"), *PROJECT.glob("*.py")]
    found = [line for path in sorted(modules) if path != PACKAGE / "files.py" for line in passes_by(path)]
    assert [line for line in found if not line.startswith(tuple(MAY))] == []
    assert [row for row in MAY if not any(line.startswith(row) for line in found)] == []


def test_every_promise_names_a_test_that_is_there() -> None:
    """`docs/trust.md` has a test in each row."""
    page = (PROJECT / "docs" / "trust.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("|") and not row.startswith(("|---", "| what"))]
    assert len(rows) >= 13
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row.rpartition("| ")[0].rpartition("| ")[2] + row)
        assert named, row
        file = ""
        for other, name in named:
            file = other or file
            assert f"def {name}(" in (PROJECT / "tests" / file).read_text(encoding="utf-8"), (row, file, name)


def test_a_refusal_of_the_system_is_one_line_with_its_fix(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(LightningDiTError, match=r"a.txt cannot be written .*; fix: free space on"):
        files.write_text(tmp_path / "a.txt", "x" * 10_000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LightningDiTError, match=r"a.txt cannot be written .*; fix: write to another folder"):
        files.write_text(tmp_path / "file" / "a.txt", "x")
    error = PermissionError(13, "Permission denied")
    with pytest.raises(LightningDiTError, match="fix: choose a folder that you may write to"), files.disk_errors("a"):
        raise error


@pytest.mark.skipif(sys.platform == "win32", reason="mv of a POSIX shell")
def test_a_command_that_renames_holds_for_any_name(tmp_path: Path) -> None:
    """A shell runs the command as a person pastes it."""
    path = tmp_path / "Li's models $HOME 图像"
    path.write_text("mine")
    with pytest.raises(LightningDiTError, match="is a file, a folder was expected; fix: mv ") as refusal:
        files.require_writable(path / "models")
    subprocess.run(refusal.value.fix, shell=True, check=True)
    assert (path.exists(), path.with_name(path.name + ".old").read_text()) == (False, "mine")
    files.require_writable(path / "models")
    assert [path.name for path in tmp_path.iterdir()] == [f"{path.name}.old"]
    assert shlex.split(files.rename_command(path, ".x")) == ["mv", str(path), f"{path}.x"]


def test_the_first_free_name(tmp_path: Path) -> None:
    (tmp_path / "a.bad-1").touch()
    (tmp_path / "a.bad-2").symlink_to(tmp_path / "nowhere")
    assert files.free_name(tmp_path / "a", "bad") == tmp_path / "a.bad-3"


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "a").touch()
    with (tmp_path / "a").open("rb") as first, (tmp_path / "a").open("rb") as second:
        assert files.try_lock(first)
        assert not files.try_lock(second)
    with (tmp_path / "a").open("rb") as third:
        assert files.try_lock(third)


def test_free_space_is_that_of_the_folder_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=1000))
    files.require_space(tmp_path / "not" / "there", 1000, "the files", "free it")
    assert asked == [tmp_path]
    with pytest.raises(LightningDiTError, match=r"^the files may take 1.0 kB, and .* has 1.0 kB free; fix: free it$"):
        files.require_space(tmp_path, 1001, "the files", "free it")
