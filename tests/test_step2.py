"""Step 2 against a hub on 127.0.0.1: fetching, checking, keeping and refusing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import step2_download_models as step2
from setup_steps import console, downloads, weights
from setup_steps.console import PROJECT, StepError
from tests.hub_server import Fault, Hub, running_hub
from tests.project_copy import copy_project, run_script
from tests.published import good_stats


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
