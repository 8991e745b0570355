"""Step 2 against a hub on 127.0.0.1: fetching, linking, checking, keeping and refusing."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import step2_download_models as step2
from LightningDiT.console import INTERRUPTED, format_bytes
from LightningDiT.errors import LightningDiTError
from setup_steps import checks, downloads, weights
from setup_steps.project import PROJECT
from tests.hub_server import Fault, Hub, running_hub
from tests.project_copy import PYTHON, copy_project, run_script
from tests.published import good_stats


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub that answers, no login, nothing attached, whatever this machine has."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    for name in (weights.ATTACHED_VARIABLE, weights.MODELS_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, published: dict[str, bytes]) -> Iterator[Hub]:
    """A hub that holds the 800-epoch model."""
    with running_hub() as running:
        for file in weights.files_of("800ep"):
            running.put(file.repo, file.name, published[file.role])
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def attached(tmp_path: Path, published: dict[str, bytes]) -> Path:
    """The 800-epoch model's files as data sets that someone attached, at several depths."""
    folder = tmp_path / "input"
    for place, file in zip(("vavae", "set/stats", "x/y/z"), weights.files_of("800ep"), strict=True):
        (folder / place).mkdir(parents=True)
        (folder / place / file.name).write_bytes(published[file.role])
    return folder


@pytest.fixture
def tiny_table(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A transformer of 20 values in the place of the published one, which is 2.7 GB in fp32."""
    tensors = {"blocks.0.weight": torch.randn(4, 4), "blocks.0.bias": torch.randn(4)}
    monkeypatch.setattr(checks, "published_table", lambda _: {key: tuple(t.shape) for key, t in tensors.items()})
    return tensors


def fetch_models(folder: Path, *options: str) -> int:
    return step2.main(["--models-dir", str(folder), *options])


def fetch_offline(folder: Path, *options: str) -> int:
    return fetch_models(folder, "--endpoint", "http://127.0.0.1:9", "--attempts", "1", *options)


DIT = weights.DIT["800ep"]
FP16 = weights.converted_name(DIT.name, "fp16")
Usage = namedtuple("Usage", "total used free")


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
    next_step = shlex.join(["step3_setup_configs.py", "--model", "800ep", "--models-dir", str(folder)])
    assert said.splitlines()[-1] == f"Next: {PYTHON} {next_step}"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch_models(folder) == 0
    assert capsys.readouterr().out.count("already there and verified") == 3
    assert fetch_models(folder, "--verify") == 0


def test_step2_as_a_person_runs_it(hub: Hub, tmp_path: Path) -> None:
    """A process of its own in another working directory, with the mirror as an option."""
    folder = copy_project(tmp_path / "copy")
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


def test_step2_says_on_kaggle_what_is_kept_and_checks_the_room(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(weights, "KAGGLE_WORKING", tmp_path / "working")
    options = ("--source", "hub", "--only", "stats")
    monkeypatch.setattr(weights, "KEPT_BYTES", 10)
    with pytest.raises(LightningDiTError, match="Kaggle keeps 10 B of it; fix: .*--models-dir .*/temp/models"):
        fetch_models(tmp_path / "working" / "models", *options)
    assert hub.ranges() == []
    assert fetch_models(tmp_path / "temp" / "models", *options) == 0
    assert f"{tmp_path}/temp/models is gone when the session ends" in capsys.readouterr().out


def test_step2_dry_run_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    assert fetch_models(tmp_path, "--dry-run", "--model", "all") == 0
    assert hub.log == []
    assert list(tmp_path.iterdir()) == []


def test_step2_a_right_hash_of_a_wrong_file_is_an_error(hub: Hub, tmp_path: Path) -> None:
    page = b"<html>please log in</html>"
    hub.put(weights.VAVAE.repo, weights.VAVAE.name, page)
    kept = f"{weights.VAVAE.name}.bad-1"
    with pytest.raises(
        LightningDiTError, match=f"is a web page, not weights.*; it came so from the hub and is kept as {kept}"
    ):
        fetch_models(tmp_path, "--only", "vavae")
    assert (tmp_path / kept).read_bytes() == page
    assert not (tmp_path / weights.VAVAE.name).exists()  # no later step may take it
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(3)}}, tmp_path / "other")
    hub.put(weights.VAVAE.repo, weights.VAVAE.name, (tmp_path / "other").read_bytes())
    with pytest.raises(LightningDiTError, match=r"lacks encoder\..* and 338 more: it is no vavae-f16d32"):
        fetch_models(tmp_path, "--only", "vavae")
    torch.save({"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}, tmp_path / "o")
    hub.put(weights.STATS.repo, weights.STATS.name, (tmp_path / "o").read_bytes())
    with pytest.raises(LightningDiTError, match=rf"placeholder.*; fix: {PYTHON} fix_latents_stats.py"):
        fetch_models(tmp_path, "--only", "stats")
    names = {f"{weights.VAVAE.name}.bad-1", f"{weights.VAVAE.name}.bad-2", "latents_stats.pt.bad-1", checks.RECORD}
    assert {path.name for path in tmp_path.iterdir()} - {"other", "o"} == names


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
    with pytest.raises(LightningDiTError, match="is not the file that the hub has"):
        fetch_models(tmp_path, "--only", "dit", "--verify")
    assert fetch_models(tmp_path, "--only", "dit") == 0
    assert fetch_models(tmp_path, "--only", "dit", "--verify") == 0
    with pytest.raises(LightningDiTError, match="is not there"):
        fetch_models(tmp_path / "empty", "--only", "dit", "--verify")


def test_step2_offline_takes_a_file_that_was_put_there_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(good_stats(), tmp_path / "latents_stats.pt")
    assert fetch_offline(tmp_path, "--only", "stats") == 0
    assert "not compared with the hub (latents_stats.pt: 127.0.0.1:9 cannot" in capsys.readouterr().out


def test_step2_moves_a_damaged_copy_out_of_step_3s_way(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original is good; the fp32 copy, which step 3 would take before it, is cut short."""
    assert fetch_models(tmp_path, "--only", "dit") == 0
    copy = tmp_path / weights.converted_name(weights.DIT["800ep"].name, "fp32")
    copy.write_bytes(b"cut short")
    assert fetch_models(tmp_path, "--only", "dit") == 0
    assert f"the damaged {copy.name} is kept as {copy.name}.bad-1" in capsys.readouterr().out
    assert not copy.exists()


@pytest.mark.parametrize("folder", ["~nobody-of-this-name/models", "loop"])
def test_step2_a_path_that_leads_nowhere_is_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    place = folder if folder.startswith("~") else str(tmp_path / folder)
    done = run_script(PROJECT / "step2_download_models.py", "--models-dir", place, "--dry-run")
    if folder.startswith("~"):
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "leads nowhere" in done.stderr
    else:
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("short", [0, 1])
def test_step2_disk_is_checked_before_the_first_byte(
    hub: Hub, tmp_path: Path, tiny_table: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    """Downloads and the converted copy (20 values of 2 bytes) are counted to the byte."""
    torch.save({"ema": tiny_table}, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    hub.put(DIT.repo, DIT.name, content)
    monkeypatch.setattr(downloads, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, len(content) + 40 - short))
    if short:
        with pytest.raises(LightningDiTError, match=r"the files may take .*, and .* has .* free"):
            fetch_models(tmp_path, "--only", "dit", "--convert", "fp16")
        assert hub.ranges() == []
    else:
        assert fetch_models(tmp_path, "--only", "dit", "--convert", "fp16") == 0


def test_step2_links_need_no_disk(
    tmp_path: Path, attached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(downloads, "SPARE_BYTES", 10**18)
    assert fetch_offline(tmp_path / "models", "--attached", str(attached)) == 0
    assert "to write" not in capsys.readouterr().out


def test_step2_explains_folders_and_files_in_each_others_place(hub: Hub, tmp_path: Path) -> None:
    tmp_path = tmp_path / "Li's models"
    tmp_path.mkdir()
    (tmp_path / "latents_stats.pt").mkdir()
    with pytest.raises(LightningDiTError, match=r"is a folder, the file latents_stats.pt belongs there") as refusal:
        fetch_models(tmp_path, "--only", "stats")
    path = f"{tmp_path / 'latents_stats.pt'}"
    assert shlex.split(refusal.value.fix)[:4] == ["mv", path, f"{path}.folder", "&&"]
    (tmp_path / "file").touch()
    with pytest.raises(LightningDiTError, match="is a file, a folder was expected"):
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
    with pytest.raises(LightningDiTError, match=r"lacks config.yaml, .*; fix: git restore"):
        step2.main(["--model", "bundled"])
    link_bundled(tmp_path)
    assert step2.main(["--model", "bundled"]) == 0
    said = capsys.readouterr().out
    size = sum((tmp_path / name).stat().st_size for name in weights.BUNDLED_FILES)
    assert f"({format_bytes(size)})" in said
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
    (tmp_path / name).write_bytes(whole[: len(whole) // 4] if content is None else content)
    monkeypatch.setattr(weights, "BUNDLED", tmp_path)
    with pytest.raises(
        LightningDiTError, match=rf"{Path(name).stem}\..*; fix: git restore models/fashion-mnist"
    ) as caught:
        step2.main(["--model", "bundled"])
    assert "\n" not in str(caught.value)
    assert "Nothing to download" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "huge"],
        ["--only", "everything"],
        ["--model", "bundled", "--only", "dit"],
        ["--model", "bundled", "--convert", "fp16"],
        ["--model", "bundled", "--folder", "x"],
        ["--timeout", "0"],
        ["--attempts", "0"],
        ["--source", "elsewhere"],
        ["--source", "folder"],
        ["--source", "hub", "--folder", "x"],
        ["--source", "attached", "--folder", "x"],
        ["--source", "hub", "--attached", "x"],
        ["--folder", "x", "--attached", "x"],
        ["--source", "attached"],
        ["--convert", "int8"],
        ["--replace"],
        ["--convert", "fp16", "--only", "vavae"],
        ["--convert", "fp16", "--only", "stats"],
        ["--convert", "fp16", "--verify"],
    ],
)
def test_step2_wrong_options_are_usage_errors(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delenv(weights.ATTACHED_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as ended:
        step2.main(options)
    assert ended.value.code == 2


def test_step2_a_refusal_of_the_hub_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.hub_faults = [Fault(status=401)]
    with pytest.raises(LightningDiTError, match="not open to this login") as caught:
        fetch_models(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*.pt")) == []


def test_step2_links_what_is_attached_and_asks_nobody(
    hub: Hub, tmp_path: Path, attached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(weights.ATTACHED_VARIABLE, str(attached))
    models = tmp_path / "models"
    for _ in range(2):
        assert fetch_models(models) == 0
        said = capsys.readouterr().out
        for file in weights.files_of("800ep"):
            (source,) = attached.rglob(file.name)
            assert (models / file.name).readlink() == source
            assert f"linked to {source}; opens, " in said
    assert said.count("already there and linked to") == 3
    assert hub.log == []


@pytest.mark.parametrize(
    "options", [("--source", "attached", "--attached"), ("--source", "folder", "--folder"), ("--folder",)]
)
def test_step2_takes_a_folder_that_is_named(hub: Hub, tmp_path: Path, attached: Path, options: tuple[str, ...]) -> None:
    assert fetch_models(tmp_path / "models", *options, str(attached)) == 0
    assert all((tmp_path / "models" / file.name).is_symlink() for file in weights.files_of("800ep"))
    assert hub.log == []


def test_step2_auto_names_what_does_not_fit_and_goes_to_the_hub_for_it(
    hub: Hub, tmp_path: Path, attached: Path, published: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (bad,) = attached.rglob(DIT.name)
    bad.write_bytes(published["vavae"])
    assert fetch_models(tmp_path / "models", "--attached", str(attached)) == 0
    assert re.search(
        rf"{bad} is passed over: .* lacks .*: it is no LightningDiT-XL/1 checkpoint", capsys.readouterr().out
    )
    assert len(hub.ranges()) == 1
    assert not (tmp_path / "models" / DIT.name).is_symlink()
    assert (tmp_path / "models" / weights.VAVAE.name).is_symlink()


def test_step2_a_second_candidate_is_tried(tmp_path: Path, attached: Path, hub: Hub) -> None:
    good = attached / "set" / "stats" / "latents_stats.pt"
    (attached / "a").mkdir()
    (attached / "a" / "latents_stats.pt").write_bytes(b"")
    assert fetch_models(tmp_path / "models", "--attached", str(attached), "--only", "stats") == 0
    assert (tmp_path / "models" / "latents_stats.pt").readlink() == good
    assert hub.log == []


def test_step2_says_where_it_searched_for_what(hub: Hub, tmp_path: Path, attached: Path) -> None:
    options = ("--source", "attached", "--attached", str(attached), "--model", "64ep", "--only", "dit")
    with pytest.raises(
        LightningDiTError, match=r"input holds no usable lightningdit-xl-imagenet256-64ep.pt .*; fix: "
    ) as caught:
        fetch_models(tmp_path / "models", *options)
    assert "\n" not in str(caught.value)
    assert hub.log == []


def test_step2_a_good_file_is_never_replaced_by_a_link(
    hub: Hub, tmp_path: Path, attached: Path, published: dict[str, bytes]
) -> None:
    models = tmp_path / "models"
    assert fetch_models(models, "--only", "dit") == 0
    mine = models / "latents_stats.pt"
    mine.write_bytes(published["stats"])
    for source in ("auto", "attached"):
        assert fetch_offline(models, "--source", source, "--attached", str(attached)) == 0
        assert not (models / DIT.name).is_symlink()
        assert not mine.is_symlink()
        assert (models / weights.VAVAE.name).is_symlink()


def test_step2_says_how_to_take_a_file_that_differs_from_the_one_that_stays(
    tmp_path: Path, attached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command works."""
    mine, options = tmp_path / "models" / weights.STATS.name, ("--only", "stats", "--folder", str(attached))
    mine.parent.mkdir()
    torch.save({**good_stats(), "more": torch.zeros(9)}, mine)
    assert fetch_offline(mine.parent, *options) == 0
    (source,) = attached.rglob(mine.name)
    line = f"  {mine.name}: {source} has another size and is not taken; to take it: mv {mine} {mine}.old && "
    assert line in capsys.readouterr().out
    mine.rename(f"{mine}.old")
    assert fetch_offline(mine.parent, *options) == 0
    assert mine.readlink() == source
    assert "another size" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["auto", "attached"])
def test_step2_a_bad_file_is_set_aside_for_a_link(
    tmp_path: Path, attached: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    (tmp_path / "latents_stats.pt").write_bytes(b"bad")
    assert fetch_offline(tmp_path, "--only", "stats", "--source", source, "--attached", str(attached)) == 0
    assert (tmp_path / "latents_stats.pt").is_symlink()
    assert (tmp_path / "latents_stats.pt.bad-1").read_bytes() == b"bad"
    assert "the earlier one is kept as latents_stats.pt.bad-1" in capsys.readouterr().out


def test_step2_a_bad_file_stays_where_neither_link_nor_copy_is_to_be_had(
    tmp_path: Path, attached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    (tmp_path / "latents_stats.pt").write_bytes(b"bad")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(downloads, "SPARE_BYTES", 10**18)
    with pytest.raises(LightningDiTError, match=r"the files may take .*, and .* has .* free"):
        fetch_offline(tmp_path, "--only", "stats", "--attached", str(attached))
    assert [path.name for path in tmp_path.glob("latents*")] == ["latents_stats.pt"]


def test_step2_a_link_replaces_nothing_without_keeping_it(tmp_path: Path, tiny_table: dict[str, torch.Tensor]) -> None:
    """Beside a bad original a converted copy of the linked one's name."""
    models = tmp_path / "models"
    source = save_copy(tmp_path / "input" / FP16, tiny_table)
    mine = save_copy(models / FP16, {"mine": torch.ones(2)}).read_bytes()
    (models / DIT.name).write_bytes(b"bad")
    assert fetch_offline(models, "--only", "dit", "--attached", str(source.parent)) == 0
    assert (models / FP16).readlink() == source
    assert (models / f"{FP16}.bad-1").read_bytes() == mine
    assert (models / f"{DIT.name}.bad-1").read_bytes() == b"bad"
    assert not (models / DIT.name).exists()


def test_step2_without_torch_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "copy")
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n")
    script, options = folder / "step2_download_models.py", ("--endpoint", hub.endpoint)
    for more in ((), ("--verify",)):
        done = run_script(script, *options, *more)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "needs torch, which does not import (no torch here); fix: " in done.stderr
    assert hub.log == []
    assert run_script(script, *options, "--dry-run").returncode == 0


def test_step2_a_bad_file_and_no_other_names_both_troubles(tmp_path: Path) -> None:
    (tmp_path / "latents_stats.pt").write_bytes(b"bad")
    with pytest.raises(
        LightningDiTError, match=r"latents_stats.pt is not usable \(.*\); .* 127.0.0.1:9 cannot be reached"
    ):
        fetch_offline(tmp_path, "--only", "stats")
    assert (tmp_path / "latents_stats.pt").read_bytes() == b"bad"


def test_step2_a_newer_version_wins_over_the_linked_one(
    tmp_path: Path, published: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    name, models = weights.STATS.name, tmp_path / "models"
    first, second, third = (tmp_path / "input" / "vavae" / "pytorch" / "default" / number / name for number in "123")
    options = (models, "--only", "stats", "--attached", str(tmp_path / "input"))
    for version in (first, second):
        version.parent.mkdir(parents=True)
        version.write_bytes(published["stats"])
        assert fetch_offline(*options) == 0
        assert (models / name).readlink() == version
    said = capsys.readouterr().out
    assert f"  {name}: {first} has a newer version, {second}" in said
    assert not list(models.glob("*.bad-*"))
    third.parent.mkdir()
    third.write_bytes(b"bad")
    assert fetch_offline(*options) == 0
    assert (models / name).readlink() == second
    (models / name).unlink()
    capsys.readouterr()
    assert fetch_offline(*options) == 0
    assert f"{name}: 2 files of that name below {tmp_path / 'input'}; the highest version is taken: {second}" in (
        capsys.readouterr().out
    )


def test_step2_says_that_a_linked_file_was_renewed(
    tmp_path: Path, attached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = attached.rglob(weights.STATS.name)
    options = (tmp_path / "models", "--only", "stats", "--attached", str(attached))
    assert fetch_offline(*options) == 0
    stats = good_stats()
    torch.save({"mean": stats["mean"], "std": stats["std"] * 2, "more": 1}, source)
    for words in (f"linked to {source}, which changed since it was checked;", f"linked to {source};"):
        capsys.readouterr()
        assert fetch_offline(*options) == 0
        assert words in capsys.readouterr().out


AGREE = f"""
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from setup_steps.downloads import describe
where = {weights.VAVAE.repo!r}, {weights.VAVAE.name!r}
ours, theirs = describe(*where), get_hf_file_metadata(hf_hub_url(*where))
assert (ours.revision, ours.size, ours.etag) == (theirs.commit_hash, theirs.size, theirs.etag)
"""


def test_step2_in_an_interpreter_with_the_lowest_versions(
    hub: Hub, tmp_path: Path, attached: Path, other_python: Path
) -> None:
    """The tokenizer comes from the hub in two pieces, the rest is linked, and the client of that interpreter reads the
    same metadata.
    """
    hub.faults = [Fault(drop_after=100_000)]
    (attached / "vavae" / weights.VAVAE.name).unlink()
    where = ("--models-dir", str(tmp_path / "models"), "--attached", str(attached))
    script = PROJECT / "step2_download_models.py"
    done = run_script(script, *where, python=str(other_python), HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert "hash right; opens" in done.stdout
    assert hub.ranges() == [None, "bytes=100000-"]
    assert [path.name for path in (tmp_path / "models").glob("*.pt") if not path.is_symlink()] == [weights.VAVAE.name]
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint}
    command = [str(other_python), "-c", AGREE]
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", ["auto", "hub"])
def test_step2_a_link_that_leads_nowhere_is_replaced(
    hub: Hub, tmp_path: Path, attached: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """A data set that was attached earlier is gone."""
    models = tmp_path / "models"
    assert fetch_models(models, "--source", "attached", "--attached", str(attached)) == 0
    (models / FP16).symlink_to(attached / FP16)
    moved = attached.rename(tmp_path / "elsewhere")
    assert fetch_models(models, "--source", source, *(("--attached", str(moved)) if source == "auto" else ())) == 0
    said = capsys.readouterr().out
    assert f"{DIT.name}: the link to {attached}/x/y/z/{DIT.name} leads nowhere" in said
    assert (models / DIT.name).is_symlink() == (source == "auto")
    assert (models / DIT.name).is_file()
    assert not (models / FP16).is_symlink()
    assert len(hub.ranges()) == (3 if source == "hub" else 0)


def test_step2_a_link_is_compared_where_the_hub_is_asked_for(hub: Hub, tmp_path: Path, attached: Path) -> None:
    assert fetch_models(tmp_path / "models", "--attached", str(attached), "--only", "vavae") == 0
    assert fetch_models(tmp_path / "models", "--source", "hub", "--only", "vavae") == 0
    assert [seen.method for seen in hub.log] == ["HEAD"]
    assert (tmp_path / "models" / weights.VAVAE.name).is_symlink()


def save_copy(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    return path


def test_step2_a_converted_copy_in_place_of_the_original_is_complete(
    hub: Hub, tmp_path: Path, tiny_table: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = save_copy(tmp_path / FP16, tiny_table)
    assert fetch_models(tmp_path, "--only", "dit") == 0
    said = capsys.readouterr().out
    assert f"{FP16}: already there, converted from the original; opens, 2 tensors named and shaped" in said
    assert hub.log == []
    hub.put(DIT.repo, DIT.name, original_of(tmp_path, tiny_table))
    copy.write_bytes(b"damaged")
    assert fetch_models(tmp_path, "--only", "dit") == 0
    assert (tmp_path / (FP16 + ".bad-1")).read_bytes() == b"damaged"
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")].count(DIT.name) == 1


def original_of(folder: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    torch.save({"ema": tensors}, folder / "original")
    content = (folder / "original").read_bytes()
    (folder / "original").unlink()
    return content


def test_step2_an_attached_converted_copy_counts_too(
    hub: Hub, tmp_path: Path, tiny_table: dict[str, torch.Tensor]
) -> None:
    copy = save_copy(tmp_path / "input" / "deep" / FP16, tiny_table)
    assert fetch_models(tmp_path / "models", "--only", "dit", "--attached", str(tmp_path / "input")) == 0
    assert (tmp_path / "models" / FP16).readlink() == copy
    assert hub.log == []


def test_step2_converts_what_it_fetched(
    hub: Hub, tmp_path: Path, tiny_table: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put(DIT.repo, DIT.name, original_of(tmp_path, tiny_table))
    assert fetch_models(tmp_path, "--only", "dit", "--convert", "fp16") == 0
    expected = {name: tensor.half() for name, tensor in tiny_table.items()}
    torch.testing.assert_close(load_file(tmp_path / FP16), expected, rtol=0, atol=0)
    assert (tmp_path / DIT.name).is_file()
    requests = len(hub.log)
    for _ in range(2):
        assert fetch_models(tmp_path, "--only", "dit", "--convert", "fp16", "--replace") == 0
        assert not (tmp_path / DIT.name).exists()
        torch.testing.assert_close(load_file(tmp_path / FP16), expected, rtol=0, atol=0)
    assert len(hub.log) == requests
    assert f"{FP16}: is what was asked for already" in capsys.readouterr().out


def test_step2_converts_a_linked_original_and_removes_only_the_link(
    tmp_path: Path, tiny_table: dict[str, torch.Tensor]
) -> None:
    source = tmp_path / "input" / DIT.name
    source.parent.mkdir()
    content = original_of(tmp_path, tiny_table)
    source.write_bytes(content)
    options = ("--only", "dit", "--folder", str(source.parent), "--convert", "bf16", "--replace")
    assert fetch_models(tmp_path / "models", *options) == 0
    assert source.read_bytes() == content
    copy = tmp_path / "models" / weights.converted_name(DIT.name, "bf16")
    assert [path for path in (tmp_path / "models").iterdir() if path.name != checks.RECORD] == [copy]
    assert not copy.is_symlink()


def test_step2_dry_run_says_what_would_be_linked_and_converted(
    hub: Hub, tmp_path: Path, attached: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    options = ("--dry-run", "--convert", "fp16", "--replace", "--model", "all")
    assert fetch_models(models, "--attached", str(attached), *options) == 0
    said = capsys.readouterr().out
    assert f"{DIT.name}: absent, would be linked to {attached}/x/y/z/{DIT.name}\n" in said
    assert f"{FP16}: would be written in place of the original" in said
    assert "lightningdit-xl-imagenet256-64ep.pt: absent, about 6.0 GB from hustvl/" in said
    assert fetch_models(models, "--folder", str(attached), *options) == 0
    assert f"imagenet256-64ep.pt: absent, and not below {attached}" in capsys.readouterr().out
    models.mkdir()
    (models / FP16).write_bytes(b"1234")
    assert fetch_models(models, "--dry-run", "--only", "dit") == 0
    assert f"{FP16}: is there (4 B), would be checked" in capsys.readouterr().out
    assert hub.log == []


def test_step2_verify_without_a_hub_takes_the_checksums_of_the_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, stats = tmp_path / "latents_stats.pt", good_stats()
    torch.save(stats, path)
    assert fetch_offline(tmp_path, "--only", "stats", "--verify") == 0
    assert re.search(
        r"  latents_stats.pt: \d+ checksums of the archive itself right \(not compared with the hub: .*\); opens",
        capsys.readouterr().out,
    )
    assert fetch_offline(tmp_path, "--only", "stats", "--verify", "--folder", str(tmp_path)) == 0
    assert "checksums of the archive itself right; opens" in capsys.readouterr().out
    content = bytearray(path.read_bytes())
    content[content.index(stats["std"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(LightningDiTError, match=r"latents_stats.pt is damaged \(Bad CRC-32 .*\); fix: "):
        fetch_offline(tmp_path, "--only", "stats", "--verify")


def test_step2_verify_says_where_there_are_no_checksums(
    tmp_path: Path,
    tiny_table: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_copy(tmp_path / FP16, tiny_table)
    assert fetch_offline(tmp_path, "--only", "dit", "--verify") == 0
    assert f"  {FP16}: has no checksums and can only be opened; opens" in capsys.readouterr().out
    torch.save(good_stats(), tmp_path / "latents_stats.pt", _use_new_zipfile_serialization=False)
    assert fetch_offline(tmp_path, "--only", "stats", "--verify") == 0
    assert "latents_stats.pt: has no checksums" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes them")
def test_step2_verify_knows_archives_without_checksums(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(good_stats(), tmp_path / "latents_stats.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert fetch_offline(tmp_path, "--only", "stats", "--verify") == 0
    assert "latents_stats.pt: was written without checksums" in capsys.readouterr().out


def test_step2_verify_names_every_fault(hub: Hub, tmp_path: Path, attached: Path) -> None:
    assert fetch_models(tmp_path / "models", "--attached", str(attached)) == 0
    assert fetch_models(tmp_path / "models", "--verify") == 0
    with (attached / "vavae" / weights.VAVAE.name).open("ab") as file:
        file.write(b"x")
    (attached / "set").rename(tmp_path / "gone")
    words = (
        r"vavae.* \(linked to .*\) is not the file that the hub has .*; .*latents_stats.pt is a link to .*, which is "
    )
    with pytest.raises(
        LightningDiTError, match=words + rf"not there; fix: {PYTHON} step2_download_models.py --source hub$"
    ):
        fetch_models(tmp_path / "models", "--verify")
    assert (tmp_path / "models" / "latents_stats.pt").is_symlink()


def test_step2_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert fetch_models(tmp_path, "--only", "vavae") == 0
    assert {(seen.host, seen.token) for seen in hub.log} == {("hub", "Bearer secret"), ("cdn", None)}


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C as a signal to one process")
def test_step2_ctrl_c_in_the_middle(hub: Hub, tmp_path: Path, published: dict[str, bytes]) -> None:
    """A process of its own: exit code 130, one line, and the next run goes on behind the part."""
    hub.always = Fault(pace=20_000)
    part = tmp_path / (weights.VAVAE.name + ".part")
    script = PROJECT / "step2_download_models.py"
    child = subprocess.Popen(
        [sys.executable, str(script), "--models-dir", str(tmp_path), "--only", "vavae"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == INTERRUPTED
    assert errors == "stopped; finished work is kept, and the same command goes on from there\n"
    held = part.read_bytes()
    assert 0 < len(held) < len(published["vavae"])
    assert published["vavae"].startswith(held)
    hub.always = None
    hub.log.clear()
    assert fetch_models(tmp_path, "--only", "vavae") == 0
    assert hub.ranges() == [f"bytes={len(held)}-"]
    assert not part.exists()
